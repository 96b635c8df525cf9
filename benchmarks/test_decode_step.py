"""What a decode step costs: full cache, bounded ``torch.cat`` cache, ours, and no cache at all.

See `README.md` for what is compared and how to read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import trimkv_kernels
from bounded_cat import BoundedCatCache, attach_gates
from contest import (
    CLOCK,
    TOY,
    Contestant,
    Setting,
    fixed_threads,
    leave_attention_out,
    make_gates,
    make_model,
    run_rounds,
)
from trimkv_kernels.loading import share_weights
from trimkv_kernels.policies.trimkv import TrimKV

CONTESTANTS = (
    "full",
    "cat_buffered",
    "trimkv_buffered",
    "cat_per_step",
    "trimkv_per_step",
    "floor",
)


@dataclass
class Contest:
    """The result of the interleaved run."""

    setting: Setting
    contestants: dict[str, Contestant]
    load: tuple[float, float]  # 1-minute load average before the run and at its end

    def figures(self, name: str) -> dict[str, float]:
        """Milliseconds per step; ``share`` is what is left of ``amortised`` above the floor."""
        done = self.setting.warmup
        figures = self.contestants[name].figures(done)
        floor = self.contestants["floor"].figures(done)["amortised"]
        return {**figures, "share": figures["amortised"] - floor}

    def ratios(self) -> dict[str, float]:
        """Ours over the bounded cat."""
        figures = {name: self.figures(name) for name in CONTESTANTS}

        def ratio(mode: str, figure: str) -> float:
            return figures[f"trimkv_{mode}"][figure] / figures[f"cat_{mode}"][figure]

        return {
            "step_buffered": ratio("buffered", "amortised"),
            "step_buffered_median": ratio("buffered", "median"),
            "share_buffered": ratio("buffered", "share"),
            "step_per_step": ratio("per_step", "amortised"),
            "share_per_step": ratio("per_step", "share"),
        }

    def table(self) -> str:
        """The report, as text."""
        setting = self.setting
        columns = ("median", "p20", "p80", "mean", "amortised", "share")
        lines = [
            f"decode step, ms: {setting.num_layers} layers x {setting.hidden_size}, fp32, "
            f"{setting.threads} thread(s){' of CPU time' if setting.cpu_time else ''}, "
            f"prompt {setting.prompt}, budget {setting.budget}, "
            f"{setting.steps} interleaved steps, load {self.load[0]:.1f} -> {self.load[1]:.1f}",
            f"{'':22}" + "".join(f"{column:>11}" for column in columns),
        ]
        for name, contestant in self.contestants.items():
            figures = self.figures(name)
            buffer = f" ({contestant.buffer})" if contestant.buffer else ""
            row = "".join(f"{figures[column]:11.2f}" for column in columns)
            lines.append(f"{name + buffer:22}{row}")
        ratios = self.ratios()
        lines += [
            f"ours / cat, buffer {setting.buffer}: step {ratios['step_buffered']:.3f} "
            f"(goal <= 1.05; of medians {ratios['step_buffered_median']:.3f}), "
            f"share {ratios['share_buffered']:.2f}",
            f"ours / cat, buffer 1: share {ratios['share_per_step']:.2f} (goal <= 0.70), "
            f"step {ratios['step_per_step']:.3f}",
        ]
        return "\n".join(lines)


@pytest.fixture(scope="session")
def contest(toy: bool, cpu_time: bool, tables: list[str]) -> Contest:
    """Every contestant reads the prompt, then all decode in turns."""
    setting = TOY if toy else Setting()
    if cpu_time:
        setting = replace(setting, threads=1, cpu_time=True)
    before = os.getloadavg()[0]
    with fixed_threads(setting.threads), torch.no_grad():
        contestants = make_contestants(setting)
        token = read_prompt(setting, contestants)
        run_rounds(setting, contestants, token)
    result = Contest(setting, contestants, load=(before, os.getloadavg()[0]))
    tables.append(result.table())
    return result


@pytest.mark.benchmark(group="decode-step", timer=CLOCK)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_decode_step(name: str, contest: Contest, benchmark: Callable[..., Any]) -> None:
    contestant = contest.contestants[name]
    benchmark.extra_info.update(
        setting=asdict(contest.setting),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        load=contest.load,
        buffer=contestant.buffer,
        ms=contest.figures(name),
        ratios=contest.ratios(),
        series_ms=[round(1e3 * seconds, 3) for seconds in contestant.seconds],
    )
    benchmark.pedantic(
        CLOCK.replay, args=(iter(contestant.seconds),), rounds=len(contestant.seconds)
    )
    if name.startswith("trimkv"):
        check_agreement(contest, contestant, contest.contestants[name.replace("trimkv", "cat")])


def make_contestants(setting: Setting) -> dict[str, Contestant]:
    """Models that share one set of weights, each with an empty cache."""
    torch.manual_seed(0)
    model, gates = make_model(setting), make_gates(setting)
    cat_model = share_weights(model)
    attach_gates(cat_model, gates)

    def cat(buffer: int) -> Contestant:
        return Contestant(
            cat_model, BoundedCatCache(setting.num_layers, setting.budget, buffer), buffer
        )

    def ours(buffer: int) -> Contestant:
        patched = share_weights(model)
        policy = TrimKV(gates, age_offset=0)
        handle = trimkv_kernels.patch(
            patched, policy, budget=setting.budget, buffer=buffer, impl="torch"
        )
        return Contestant(patched, handle.new_cache(), buffer)

    made = {
        "full": Contestant(model, DynamicCache(config=model.config)),
        "cat_buffered": cat(setting.buffer),
        "trimkv_buffered": ours(setting.buffer),
        "cat_per_step": cat(1),
        "trimkv_per_step": ours(1),
        "floor": Contestant(leave_attention_out(model), None),
    }
    assert tuple(made) == CONTESTANTS
    return made


def read_prompt(setting: Setting, contestants: dict[str, Contestant]) -> Tensor:
    """Fill the caches; returns the first token to decode, the full cache's choice."""
    prompt = torch.randint(setting.vocab_size, (1, setting.prompt))
    chosen = {}
    for name, contestant in contestants.items():
        if contestant.cache is not None:
            output = contestant.model(
                prompt, past_key_values=contestant.cache, use_cache=True, logits_to_keep=1
            )
            chosen[name] = output.logits[:, -1].argmax(dim=-1, keepdim=True)
    return chosen["full"]


def check_agreement(contest: Contest, ours: Contestant, cat: Contestant) -> None:
    """Both decoded the same text, so they hold the same tokens and say the same.

    Slots are summed in another order, so hidden states differ in the last bits; where two scores
    nearly tie, that may decide.
    """
    seen = contest.setting.prompt + contest.setting.warmup + contest.setting.steps
    common = held = 0
    for layer in range(contest.setting.num_layers):
        a, b = holds(ours.cache.positions(layer), seen), holds(cat.cache.positions(layer), seen)
        common += int((a & b).sum())
        held += int(a.sum())
        assert torch.equal(a.sum(dim=-1), b.sum(dim=-1))
    assert common >= 0.999 * held
    torch.testing.assert_close(ours.logits, cat.logits, atol=1e-3, rtol=1e-3)


def holds(position: Tensor, seen: int) -> Tensor:
    """``[batch, num_kv_heads, seen]`` bool from positions, -1 where a slot is empty."""
    held = torch.zeros(*position.shape[:2], seen + 1, dtype=torch.bool)
    return held.scatter_(2, position.long() + 1, True)[:, :, 1:]
