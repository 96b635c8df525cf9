"""What is written: a line of JSON per case and contestant, a table, the goals, a few plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .measure import Timing

OK, ABSENT, FAILED, NOT_RUN = "ok", "absent", "failed", "not run"
APPEND, DECODE = "append_attention", "decode_attention"
MASS = "append_attention_mass"
RETENTION, SUM = "retention_attention", "retention_sum"
STEP = "generate"  # a whole decode step, see `decode`
OUR_STEPS = ("trimkv_eager", "trimkv_compiled", "trimkv_loop")
OURS = (APPEND, MASS, DECODE, "evict", "fill_slots", "extend_attention", RETENTION, SUM, *OUR_STEPS)
# The ops that share a picture.
PICTURES = {
    "decode": ("decode", STEP),
    "evict": ("evict", "fill_slots"),
    "extend": ("extend",),
    "retention": (RETENTION,),
    "sum": (SUM,),
}


@dataclass
class Record:
    """One contestant in one case. What was not measured is None.

    ``status`` is ``ok`` (computed, checked and, on a GPU, timed), ``absent`` (cannot run here),
    ``failed`` or ``not run`` (its part's time was up); ``note`` says why. Of a decode step,
    ``bytes`` are what it must read; ``compile`` counts graphs, breaks, skips and recompiles.
    """

    op: str
    contestant: str
    shape: dict[str, Any]
    dtype: str
    status: str
    note: str | None = None
    launches: int | None = None
    replays: int | None = None
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    drift: float | None = None
    wall_us: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    flops: int | None = None
    tflop_per_s: float | None = None
    max_error: float | None = None
    relative_error: float | None = None
    peak_bytes: int | None = None
    tokens_per_s: float | None = None
    compile: dict[str, int] = field(default_factory=dict)
    clocks: dict[str, str] = field(default_factory=dict)

    def set_timing(
        self, timing: Timing, clocks: dict[str, str], copy_gb_per_s: float | None
    ) -> None:
        """Fill in a measurement and what follows from it; 1 GB is 10^9 bytes."""
        for name, value in asdict(timing).items():
            setattr(self, name, value)
        self.clocks = clocks
        if self.bytes is not None:
            self.gb_per_s = self.bytes / timing.median_us / 1e3
            self.copy_share = self.gb_per_s / copy_gb_per_s if copy_gb_per_s else None
        if self.flops is not None:
            self.tflop_per_s = self.flops / timing.median_us / 1e6

    @property
    def shape_text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.shape.items())


class NotMeasuredError(Exception):
    """A goal's figures are not among the results; the message says which."""


class Results:
    """Everything measured so far, and how to ask for it."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records = list(records)

    def find(self, op: str, contestant: str, **shape: Any) -> list[Record]:
        """Timed records whose shape agrees with ``shape``; a tuple means any of its values."""
        wanted = {name: x if isinstance(x, tuple) else (x,) for name, x in shape.items()}
        return [
            record
            for record in self.records
            if record.op == op
            and record.contestant == contestant
            and record.median_us is not None
            and all(record.shape[name] in values for name, values in wanted.items())
        ]

    def one(self, op: str, contestant: str, **shape: Any) -> Record:
        found = self.find(op, contestant, **shape)
        if len(found) != 1:
            where = " ".join(f"{name}={value}" for name, value in shape.items())
            raise NotMeasuredError(f"{contestant} at {where or op}: {self._reason(op, contestant)}")
        return found[0]

    def us(self, op: str, contestant: str, **shape: Any) -> float:
        """Median microseconds per launch."""
        return self.figure(self.one(op, contestant, **shape), "median_us")

    def ratio(self, op: str, rivals: Sequence[str], ours: str, **shape: Any) -> float:
        """The best rival's time over ours, geometric mean over the cases that have both."""
        ratios = []
        for record in self.find(op, ours, **shape):
            times = [
                self.figure(rival, "median_us")
                for name in rivals
                for rival in self.find(op, name, **record.shape)
            ]
            if times:
                ratios.append(min(times) / self.figure(record, "median_us"))
        if not ratios:
            reasons = {name: self._reason(op, name) for name in (ours, *rivals)}
            raise NotMeasuredError("; ".join(f"{name}: {why}" for name, why in reasons.items()))
        return statistics.geometric_mean(ratios)

    def wall_ratio(self, op: str, rival: str, ours: str, **shape: Any) -> float:
        """As `ratio` for one case, in the time that Python sees."""
        times = [self.figure(self.one(op, x, **shape), "wall_us") for x in (rival, ours)]
        return times[0] / times[1]

    def figure(self, record: Record, name: str) -> float:
        """A number of a record that has to be there."""
        value = getattr(record, name)
        if value is None:
            raise NotMeasuredError(f"{record.contestant} has no {name}")
        return float(value)

    def _reason(self, op: str, contestant: str) -> str:
        notes = [
            record.note or "not timed"
            for record in self.records
            if record.op == op and record.contestant == contestant
        ]
        return notes[0] if notes else "its part was not run"


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


def _append_cost(results: Results) -> float:
    """The most that storing the token adds, over batches."""
    costs = [
        results.us("decode", APPEND, **record.shape) - results.us("decode", DECODE, **record.shape)
        for record in results.find("decode", APPEND, slots=1024)
    ]
    if not costs:
        raise NotMeasuredError("no decode case with 1024 slots")
    return max(costs)


def _decode_us(batch: int) -> Callable[[Results], float]:
    return lambda results: results.us("decode", APPEND, batch=batch, slots=1024)


def _decode_ratio(*rivals: str) -> Callable[[Results], float]:
    return lambda results: results.ratio("decode", rivals, APPEND)


def _copy_percent(results: Results) -> float:
    record = results.one("decode", APPEND, batch=64, slots=4096)
    return 100 * results.figure(record, "copy_share")


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
    Goal("E1", "evict one of 1025, all layers, b=8", "us", True, 8, 5,
         lambda r: r.us("evict", "evict", batch=8, **ONE)),
    Goal("E2", "eager torch by layer / evict, wall", "x", False, 15, 30,
         lambda r: r.wall_ratio("evict", "torch_eager", "evict", **ONE)),
    Goal("E2", "compiled torch / evict, in graph", "x", False, 3, None,
         lambda r: r.ratio("evict", ["torch_compiled"], "evict", **ONE)),
    Goal("E3", "append, added to decode, 1024 slots", "us", True, 1.0, 0.5, _append_cost),
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


def append_lines(path: Path, machine: dict[str, Any], records: Iterable[Record]) -> None:
    """Add records to the JSON lines: what is written stays written if the run is cut short."""
    with path.open("a") as lines:
        for record in records:
            fields = {name: _finite(value) for name, value in asdict(record).items()}
            lines.write(json.dumps(fields | machine, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(
    machine: dict[str, Any], rates: dict[str, float], notes: Sequence[str], results: Results
) -> str:
    """The report: what it ran on, what to know about it, goals, and every figure."""
    rows = [_figures(record) for record in results.records if record.op != STEP]
    steps = [record for record in results.records if record.op == STEP]
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    ceilings = ", ".join(
        f"{name} {rates[name]:.0f} {unit}"
        for name, unit in (("copy", "GB/s (10^9, read and written)"), ("matmul", "TFLOP/s (bf16)"))
        if name in rates
    )
    return "\n".join([
        "# Kernels on one GPU", "",
        facts + ".", "", f"Measured ceilings: {ceilings or 'none, no clock'}.",
        _clocks(results), "",
        *[f"- {note}" for note in notes], "",
        "## Goals", "",
        "A ratio is the geometric mean over the cases that both sides ran, the best of several "
        "rivals taken in each.",
        "", goals_table(results), "",
        "## Figures", "",
        "Microseconds per launch: a graph's time over its launches, each on buffers of its own; an "
        "`evict` launch is all layers. `wall` is without a graph, `drift` the second half of the "
        "replays against the first. Errors are those of the first launch, or a part of it, against "
        "float64.",
        "", _table(rows) if rows else "None.", "",
        "## Decode steps", "",
        "Milliseconds of a whole step, evictions spread over all. The floor reads every weight and "
        "each attended pair once, at the copy bandwidth. Memory: weights, cache, and what a round "
        "takes beyond.",
        "", steps_table(steps) if steps else "None.", "",
    ])  # fmt: skip


def _clocks(results: Results) -> str:
    """What the GPU's clock did while cases were measured."""
    states = [record.clocks for record in results.records if record.clocks]
    if not states:
        return "Clocks: not read."
    speeds = sorted({int(float(state["sm_mhz"])) for state in states})
    held = ", ".join(sorted({state["throttle"] for state in states}))
    return f"SM clock {speeds[0]} to {speeds[-1]} MHz; reasons to hold it back: {held}."


def goals_table(results: Results, goals: Sequence[Goal] = (*GOALS, *STEP_GOALS)) -> str:
    """Every goal beside what was measured."""
    rows = [goal.row(results) for goal in goals]
    return _table([row | {"measured": _number(row["measured"])} for row in rows])


def plot(results: Results, folder: Path) -> list[str]:
    """At most five pictures; none where matplotlib is missing or nothing was timed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    timed = [record for record in results.records if record.median_us is not None]
    names = []
    for name, ops in PICTURES.items():
        shown = [record for record in timed if record.op in ops]
        if shown:
            figure = (_plot_lines if name == "decode" else _plot_bars)(pyplot, shown)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            names.append(f"{name}.png")
    return names


def _plot_lines(pyplot: Any, records: list[Record]) -> Any:
    """Share of the copy bandwidth against batch: a panel per number of slots, one of steps."""
    panels = sorted({_slots(record) for record in records})
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False)
    figure.set_size_inches(3.2 * len(panels) + 2, 4)
    colors = pyplot.get_cmap("tab20").colors
    contestants = list(dict.fromkeys(record.contestant for record in records))
    for axis, slots in zip(axes[0], panels, strict=True):
        for name, color in zip(contestants, colors, strict=False):
            here = [x for x in records if x.contestant == name and _slots(x) == slots]
            here.sort(key=lambda record: record.shape["batch"])
            batches = [record.shape["batch"] for record in here]
            shares = [100 * (record.copy_share or 0) for record in here]
            width = 2.5 if name in OURS else 1
            axis.plot(batches, shares, "o-", color=color, markersize=3, linewidth=width, label=name)
        title = f"{slots:g} slots" if slots < math.inf else "whole step"
        axis.set(title=title, xlabel="batch", ylim=(0, 110))
        axis.set_xscale("log", base=2)
    axes[0][0].set_ylabel("% of the copy bandwidth")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _slots(record: Record) -> float:
    """By what panels are told apart; infinite for a whole step, whose panel comes last."""
    return math.inf if record.op == STEP else record.shape["slots"]


def _plot_bars(pyplot: Any, records: list[Record]) -> Any:
    """Time of everybody in every case."""
    labels = [f"{record.op} {record.shape_text}: {record.contestant}" for record in records]
    times = [record.median_us for record in records]
    colors = ["tab:blue" if record.contestant in OURS else "tab:gray" for record in records]
    figure, axis = pyplot.subplots(figsize=(8, 0.32 * len(records) + 1))
    bars = axis.barh(labels, times, color=colors)
    axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axis.set(xscale="log", xlabel="us per launch")
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    return figure


def _figures(record: Record) -> dict[str, str]:
    spread = ""
    if record.median_us is not None:
        spread = f"{_number(record.p20_us)} - {_number(record.p80_us)}"
    return {
        "op": record.op,
        "shape": record.shape_text,
        "contestant": record.contestant,
        "us": _number(record.median_us),
        "p20 - p80": spread,
        "drift %": _number(_percent(record.drift)),
        "wall us": _number(record.wall_us),
        "GB/s": _number(record.gb_per_s),
        "% of copy": _number(_percent(record.copy_share)),
        "TFLOP/s": _number(record.tflop_per_s),
        "max error": _number(record.max_error),
        "status": record.status if record.note is None else f"{record.status}: {record.note}",
    }


def steps_table(records: Iterable[Record]) -> str:
    """Whole decode steps, as a table."""
    return _table([_step_figures(record) for record in records])


def _step_figures(record: Record) -> dict[str, str]:
    def scaled(value: float | None, scale: float) -> str:
        return "" if value is None else _number(value / scale)

    spread = f"{scaled(record.p20_us, 1e3)} - {scaled(record.p80_us, 1e3)}"
    return {
        "step": record.shape_text,
        "contestant": record.contestant,
        "ms": scaled(record.median_us, 1e3),
        "p20 - p80": "" if record.p20_us is None else spread,
        "tokens/s": _number(record.tokens_per_s),
        "GB": scaled(record.peak_bytes, 1e9),
        "% of floor": _number(_percent(record.copy_share)),
        "compile": " ".join(f"{name}={count}" for name, count in record.compile.items()),
        "error": _number(record.relative_error),
        "status": record.status if record.note is None else f"{record.status}: {record.note}",
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [
        [str(cell).replace("|", "/").replace("\n", " ") for cell in row.values()] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
