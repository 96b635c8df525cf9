"""What is to be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .outcome import (
    APPEND,
    FINISH,
    MASS,
    NOTHING,
    RAGGED,
    RETENTION,
    STEP,
    SUM,
    NotMeasuredError,
    Results,
)


@dataclass(frozen=True)
class Goal:
    """One inequality. ``at_most`` tells its direction."""

    number: str
    quantity: str
    unit: str
    at_most: bool
    goal: float
    stretch: float | None
    measure: Callable[[Results], float]

    def row(self, results: Results) -> dict[str, Any]:
        """The goal beside what was measured: ``met``, ``missed`` or ``not measured``."""
        sign = "<=" if self.at_most else ">="
        row = {
            "goal": self.number,
            "quantity": self.quantity,
            "target": f"{sign} {self.goal:g} {self.unit}".rstrip(),
            "stretch": "" if self.stretch is None else f"{self.stretch:g}",
        }
        try:
            value = self.measure(results)
        except NotMeasuredError as missing:
            return row | {"measured": None, "verdict": "not measured", "note": str(missing)}
        verdict = "met" if self._reached(value, self.goal) else "missed"
        beyond = self.stretch is not None and self._reached(value, self.stretch)
        note = "stretch met" if beyond else ""
        return row | {"measured": value, "verdict": verdict, "note": note}

    def _reached(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


SDPA = ("sdpa_flash", "sdpa_cudnn")
SDPA += ("sdpa_flash_packed", "sdpa_cudnn_packed", "sdpa_efficient_packed")
LONG = {"seq": 8192}


def _backward(results: Results, contestant: str, mode: str = "add") -> float:
    """Time of a backward pass: what it adds to the forward pass."""
    forward = contestant.removesuffix("_frozen_bias")
    both = results.us(RETENTION, contestant, mode=mode, backward=True, **LONG)
    return both - results.us(RETENTION, forward, mode=mode, backward=False, **LONG)


def _added(more: str, less: str) -> Callable[[Results], float]:
    """The most that one decode launch takes beyond another one, over batches."""

    def measure(results: Results) -> float:
        costs = [
            results.us("decode", more, **record.shape) - results.us("decode", less, **record.shape)
            for record in results.find("decode", more, slots=1024)
        ]
        if not costs:
            raise NotMeasuredError("no decode case with 1024 slots")
        return max(costs)

    return measure


def _decode_us(batch: int) -> Callable[[Results], float]:
    return lambda results: results.us("decode", APPEND, batch=batch, slots=1024)


def _decode_ratio(*rivals: str) -> Callable[[Results], float]:
    return lambda results: results.ratio("decode", rivals, APPEND)


def _copy_percent(results: Results) -> float:
    record = results.one("decode", APPEND, batch=64, slots=4096)
    return 100 * results.figure(record, "copy_share")


def _shared_cost(results: Results, skewed: bool) -> float:
    """The worst ratio of a step's attention in pages to that in as many slots of fixed budgets."""
    costs = [
        results.us(RAGGED, RAGGED, batch=batch, slots=1024, skewed=skewed)
        / results.us("decode", APPEND, batch=batch, slots=1024)
        for batch in (1, 8, 64)
    ]
    return max(costs)


def _never(reason: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        raise NotMeasuredError(reason)

    return measure


ONE, MANY = {"buffer": 1, "full": True}, {"buffer": 128, "full": True}
GOALS = (
    Goal("D1", "decode, 1024 slots, b=1", "us", True, 6, 5, _decode_us(1)),
    Goal("D2", "decode, 1024 slots, b=8", "us", True, 12, 10, _decode_us(8)),
    Goal("D3", "decode, 1024 slots, b=16", "us", True, 20, 18, _decode_us(16)),
    Goal("D3", "decode, 1024 slots, b=64", "us", True, 73, 68, _decode_us(64)),
    Goal("D4", "decode, 4096 slots, b=64, of the copy", "%", False, 90, 94, _copy_percent),
    Goal("D5", "SGLang Triton decode / ours", "x", False, 1.4, 1.8, _decode_ratio("sglang_triton")),
    Goal("D6", "FlexDecoding default / ours", "x", False, 1.5, 2, _decode_ratio("flex")),
    Goal("D6", "FlexDecoding tuned / ours", "x", False, 1.2, 1.4, _decode_ratio("flex_tuned")),
    Goal("D6", "best SDPA backend / ours", "x", False, 1.2, 1.5, _decode_ratio(*SDPA)),
    Goal("D7", "FlashInfer / ours, up to 1024 slots", "x", False, 1.0, 1.2,
         lambda r: r.ratio("decode", ["flashinfer"], APPEND, slots=(512, 1024))),
    Goal("D7", "FlashInfer / ours, 4096 slots", "x", False, 0.95, 1.0,
         lambda r: r.ratio("decode", ["flashinfer"], APPEND, slots=4096)),
    Goal("D8", "decode b=8 with attention mass, slower by", "%", True, 12, 6,
         lambda r: 100 * (r.us("decode", MASS, batch=8, slots=1024)
                          / r.us("decode", APPEND, batch=8, slots=1024) - 1)),
    Goal("B1", "a shared budget, even lengths / fixed budgets, 1024 slots", "x", True, 1.15, 1.05,
         lambda r: _shared_cost(r, skewed=False)),
    Goal("B1", "a shared budget, one long head / fixed budgets, 1024 slots", "x", True, 1.15, 1.05,
         lambda r: _shared_cost(r, skewed=True)),
    Goal("E1", "evict one of 1025, all layers, b=8", "us", True, 8, 5,
         lambda r: r.us("evict", "evict", batch=8, **ONE)),
    Goal("E2", "eager torch by layer / evict, wall", "x", False, 15, 30,
         lambda r: r.wall_ratio("evict", "torch_eager", "evict", **ONE)),
    Goal("E2", "compiled torch / evict, in graph", "x", False, 3, None,
         lambda r: r.ratio("evict", ["torch_compiled"], "evict", **ONE)),
    Goal("E3", "storing the token, 1024 slots", "us", True, 1.0, 0.5, _added(APPEND, NOTHING)),
    Goal("E4", "norm, RoPE and the gate's end, 1024 slots", "us", True, 1.0, 0.5,
         _added(FINISH, APPEND)),
    Goal("C1", "compact 1152 to 1024, all layers, b=4", "us", True, 60, 45,
         lambda r: r.us("evict", "evict", batch=4, **MANY)),
    Goal("C2", "trimkv 0.1.5 sequence / evict, in graph", "x", False, 5, 8,
         lambda r: r.ratio("evict", ["trimkv_0.1.5_eager"], "evict", **MANY)),
    Goal("C2", "trimkv 0.1.5 sequence / evict, wall", "x", False, 20, 40,
         lambda r: r.wall_ratio("evict", "trimkv_0.1.5_eager", "evict", **MANY)),
    Goal("X1", "extend 1024 on 1024, b=4", "TFLOP/s", False, 380, 450,
         lambda r: r.figure(r.one("extend", "extend_attention", tokens=1024), "tflop_per_s")),
    Goal("X2", "SGLang extend / ours", "x", False, 1.3, 1.6, _never("not among the rivals")),
    Goal("X2", "FlexAttention / ours", "x", False, 1.0, 1.2,
         lambda r: r.ratio("extend", ["flex"], "extend_attention", tokens=1024)),
    Goal("X2", "SDPA with a mask / ours", "x", False, 2, 3,
         lambda r: r.ratio("extend", ["sdpa_masked_cudnn", "sdpa_masked_efficient"],
                           "extend_attention", tokens=1024)),
    Goal("T1", "forward, S=8192: Flex captured bias / ours", "x", False, 1.05, 1.2,
         lambda r: r.ratio(RETENTION, ["flex"], RETENTION, backward=False, mode="add", **LONG)),
    Goal("T2", "backward: Flex with bias gradient / ours", "x", False, 2.5, 5,
         lambda r: _backward(r, "flex") / _backward(r, RETENTION)),
    Goal("T3", "backward: Flex without bias gradient / ours", "x", False, 0.9, 1.0,
         lambda r: _backward(r, "flex_frozen_bias") / _backward(r, RETENTION)),
    Goal("T3", "backward: fla parallel_attn / ours", "x", False, 1.1, 1.3,
         _never("not among the rivals")),
    Goal("T4", "forward: additive mode / scale mode", "x", False, 0.8, 0.9,
         lambda r: r.us(RETENTION, RETENTION, backward=False, mode="add", **LONG)
         / r.us(RETENTION, RETENTION, backward=False, mode="scale", **LONG)),
    Goal("T4", "backward: additive mode / scale mode", "x", False, 0.8, 0.9,
         lambda r: _backward(r, RETENTION) / _backward(r, RETENTION, "scale")),
    Goal("R1", "sum, both ways, 288 x 16K: chunked torch / ours", "x", False, 50, 100,
         lambda r: r.ratio(SUM, ["torch_chunked"], SUM, seq=16384)),
    Goal("R1", "sum, both ways, 288 x 16K: compiled pairs / ours", "x", False, 4, 8,
         lambda r: r.ratio(SUM, ["torch_compiled"], SUM, seq=16384)),
    Goal("R2", "sum, forward, 8 x 128K", "ms", True, 4, 2,
         lambda r: r.us(SUM, SUM, seq=131072, backward=False) / 1e3),
    Goal("R2", "sum, both ways, 8 x 128K", "ms", True, 12, 7,
         lambda r: r.us(SUM, SUM, seq=131072, backward=True) / 1e3),
)  # fmt: skip


def _step_ms(batch: int) -> Callable[[Results], float]:
    return lambda results: results.us(STEP, "trimkv_loop", model=Q4, batch=batch) / 1e3


def _over_loop(contestant: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        rival = results.us(STEP, contestant, model=Q4, batch=4, context=32768)
        return rival / results.us(STEP, "trimkv_loop", model=Q4, batch=4)

    return measure


def _compile_faults(results: Results) -> float:
    """Graph breaks, CUDA graphs skipped, and recompiles after the first period, of all batches."""
    found = results.find(STEP, "trimkv_compiled")
    if not found:
        raise NotMeasuredError(f"trimkv_compiled: {results._reason(STEP, 'trimkv_compiled')}")
    faults = ("graph_breaks", "cudagraph_skips", "recompiles")
    return sum(record.compile[name] for record in found for name in faults)


Q4 = "qwen3-4b"
STEP_GOALS = (
    Goal("G1", "step of Qwen3-4B, b=4, decode_loop", "ms", True, 3.4, 2.85, _step_ms(4)),
    Goal("G2", "step of Qwen3-4B, b=8, decode_loop", "ms", True, 3.7, 3.05, _step_ms(8)),
    Goal("G3", "step of Qwen3-4B, b=64, decode_loop", "ms", True, 6.6, 5.6, _step_ms(64)),
    Goal("G4", "full cache of 32K, eager / decode_loop, b=4", "x", False, 12, 16,
         _over_loop("full_eager")),
    Goal("G4", "StaticCache of 32K, compiled / decode_loop, b=4", "x", False, 2.5, 3.2,
         _over_loop("static_compiled")),
    Goal("G5", "ours compiled: breaks, skips, recompiles", "", True, 0, None, _compile_faults),
)  # fmt: skip
