"""What a decode step takes where heads share a budget, over a budget per head, on torch.

The embedded model, whose steps are short, so that what is added shows. For every buffer a budget
per head and two shared ones decode the same text side by side, see `contest.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import trimkv_kernels as tk
from contest import CLOCK, Contestant, Setting, fixed_threads, run_rounds
from trimkv_kernels.embedded import embedded_model, make_recall_text
from trimkv_kernels.loading import share_weights
from trimkv_kernels.policies.allocation import Allocation, Uniform

BUFFERS = (1, 4, 16, 32)
ALLOCATIONS: dict[str, Allocation] = {
    "per head": Uniform(),
    "GlobalTopK": tk.GlobalTopK(),
    "AdaptiveHeads": tk.AdaptiveHeads(),
}
SETTING = Setting(prompt=256, budget=32, warmup=8, steps=256, threads=1)
TOY = replace(SETTING, prompt=64, budget=8, warmup=0, steps=32)


@pytest.fixture(scope="session")
def contestants(toy: bool, cpu_time: bool, tables: list[str]) -> dict[str, Contestant]:
    """All have read the prompt, and then decode in turns."""
    setting = replace(TOY if toy else SETTING, cpu_time=cpu_time)
    before = os.getloadavg()[0]
    with fixed_threads(setting.threads), torch.no_grad():
        found = make_contestants(setting)
        run_rounds(setting, found, torch.zeros(1, 1, dtype=torch.int64))
    tables.append(table(setting, found, (before, os.getloadavg()[0])))
    return found


def make_contestants(setting: Setting) -> dict[str, Contestant]:
    """Models that share one set of weights."""
    model, tokenizer = embedded_model()
    text = make_recall_text(setting.prompt, seed=0).text
    prompt: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, : setting.prompt]
    made = {"full": Contestant(share_weights(model), transformers.DynamicCache())}
    for buffer in BUFFERS:
        for name, allocation in ALLOCATIONS.items():
            patched = share_weights(model)
            sizes = {"budget": setting.budget, "buffer": buffer, "impl": "torch"}
            handle = tk.patch(patched, "trimkv", allocation=allocation, **sizes)
            made[key(name, buffer)] = Contestant(patched, handle.new_cache(), buffer)
    for contestant in made.values():
        contestant.model(prompt, past_key_values=contestant.cache, use_cache=True)
    return made


def key(name: str, buffer: int) -> str:
    """The name of a contestant."""
    return f"{name}, buffer {buffer}"


def ratio(found: dict[str, Contestant], name: str, buffer: int, done: int) -> float:
    """A contestant's step over that of a budget per head and the same buffer."""
    ours, theirs = (
        found[key(x, buffer)].figures(done)["amortised"] for x in (name, next(iter(ALLOCATIONS)))
    )
    return ours / theirs


def table(setting: Setting, found: dict[str, Contestant], load: tuple[float, float]) -> str:
    """The report, as text."""
    lines = [
        f"heads that share a budget of {setting.budget}: ms per step (over a budget per head), "
        f"{setting.steps} interleaved steps, load {load[0]:.1f} -> {load[1]:.1f}",
        f"{'buffer':8}" + "".join(f"{name:>22}" for name in ALLOCATIONS),
    ]
    for buffer in BUFFERS:
        cells = ""
        for name in ALLOCATIONS:
            ms = found[key(name, buffer)].figures(setting.warmup)["amortised"]
            cells += f"{ms:15.3f} ({ratio(found, name, buffer, setting.warmup):.2f})"
        lines.append(f"{buffer:<8}{cells}")
    return "\n".join(lines)


@pytest.mark.benchmark(group="shared-step", timer=CLOCK)
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_shared_step(
    name: str,
    buffer: int,
    toy: bool,
    contestants: dict[str, Contestant],
    benchmark: Callable[..., Any],
) -> None:
    setting, contestant = TOY if toy else SETTING, contestants[key(name, buffer)]
    benchmark.extra_info.update(
        setting=asdict(setting),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        ms=contestant.figures(setting.warmup),
        ratio=ratio(contestants, name, buffer, setting.warmup),
    )
    benchmark.pedantic(
        CLOCK.replay, args=(iter(contestant.seconds),), rounds=len(contestant.seconds)
    )
    used = contestant.cache.stats().slots_used
    since = (setting.warmup + setting.steps) % buffer
    assert used.sum() == (setting.budget + since) * used.numel()
