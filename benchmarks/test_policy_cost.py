"""What each policy adds to a decode step, over a cache that never chooses.

One run holds every registered policy. All decode the same text side by side, see `contest.py`, and
at every step all of them attend to equally many slots: after a prompt each head holds ``budget``
pairs, takes ``buffer`` more, and is cut back. ``full`` cannot be cut, so outside of the clock it is
emptied and reads ``budget`` tokens anew whenever the others evict; its slots are as many as theirs.
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

import trimkv_kernels
from contest import (
    CLOCK,
    TOY,
    Contestant,
    Setting,
    fixed_threads,
    make_model,
    run_rounds,
)
from trimkv_kernels import ModelShape, RetentionPolicy, available_policies
from trimkv_kernels.loading import share_weights
from trimkv_kernels.policies import example_policy, make_policy
from trimkv_kernels.policies.gated import drawn

POLICIES = available_policies()
SETTING = Setting(
    hidden_size=512,
    intermediate_size=1536,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    prompt=1152,  # fills every layer of a pyramid of budgets
)
# what published gates have; the examples of the conformance suite are narrower
GATE_SIZES = {
    "trimkv": {"intermediate_size": 512},
    "kvzap": {"intermediate_size": 512},
    "loc_ret": {"intermediate_size": 1024},
    "fast_kvzip": {"head_dim": 16, "num_base_keys": 16},
}


@dataclass
class Refilled(Contestant):
    """The full cache, held at the others' number of slots.

    Before the first step after their eviction it reads ``text`` ``[1, budget]`` anew, not timed.
    """

    text: Tensor | None = None
    period: int = 1
    done: int = 0

    def step(self, token: Tensor, clock: Callable[[], float]) -> Tensor:
        assert self.text is not None
        if self.done % self.period == 0:
            self.cache.reset()
            self.model(self.text, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.done += 1
        return super().step(token, clock)

    text_period: int = 1


@dataclass
class PolicyContest:
    """The result of the interleaved run."""

    setting: Setting
    contestants: dict[str, Contestant]
    load: tuple[float, float]  # 1-minute load average before the run and at its end

    def figures(self, name: str) -> dict[str, float]:
        """Milliseconds per step, and what of it is the policy's.

        ``ratio`` is ``amortised`` over that of the full cache. ``eviction`` is what a step that
        evicts takes longer than one that does not, in ms, and ``eviction_share`` what that is of
        ``amortised``, spread over all steps.
        """
        done, contestant = self.setting.warmup, self.contestants[name]
        figures = contestant.figures(done)
        plain, evicting = (1e3 * seconds for seconds in contestant.medians(done))
        spread = (evicting - plain) / (contestant.buffer or 1)
        return {
            **figures,
            "ratio": figures["amortised"] / self.contestants["full"].figures(done)["amortised"],
            "eviction": evicting - plain,
            "eviction_share": spread / figures["amortised"],
        }

    def table(self) -> str:
        """The report, as text; the cheapest policy first."""
        setting = self.setting
        columns = ("amortised", "ratio", "eviction", "eviction_share")
        figures = {name: self.figures(name) for name in self.contestants}
        lines = [
            f"policies, ms per step: {setting.num_layers} layers x {setting.hidden_size}, fp32, "
            f"{setting.threads} thread(s){' of CPU time' if setting.cpu_time else ''}, "
            f"{setting.budget} to {setting.budget + setting.buffer} slots, "
            f"{setting.steps} interleaved steps, load {self.load[0]:.1f} -> {self.load[1]:.1f}",
            f"{'':22}" + "".join(f"{column:>16}" for column in columns),
        ]
        for name in sorted(figures, key=lambda name: figures[name]["amortised"]):
            row = "".join(f"{figures[name][column]:16.3f}" for column in columns)
            lines.append(f"{name:22}{row}")
        return "\n".join(lines)


@pytest.fixture(scope="session")
def policies(toy: bool, cpu_time: bool, tables: list[str]) -> PolicyContest:
    """Every policy reads the prompt, then all decode in turns."""
    setting = TOY if toy else SETTING
    if cpu_time:
        setting = replace(setting, threads=1, cpu_time=True)
    before = os.getloadavg()[0]
    with fixed_threads(setting.threads), torch.no_grad():
        torch.manual_seed(0)
        prompt = torch.randint(setting.vocab_size, (1, setting.prompt))
        contestants = make_contestants(setting, prompt)
        run_rounds(setting, contestants, prompt[:, -1:])
    result = PolicyContest(setting, contestants, load=(before, os.getloadavg()[0]))
    tables.append(result.table())
    return result


@pytest.mark.benchmark(group="policy-cost", timer=CLOCK)
@pytest.mark.parametrize("name", POLICIES)
def test_policy_cost(name: str, policies: PolicyContest, benchmark: Callable[..., Any]) -> None:
    contestant = policies.contestants[name]
    benchmark.extra_info.update(
        setting=asdict(policies.setting),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        load=policies.load,
        ms=policies.figures(name),
        series_ms=[round(1e3 * seconds, 3) for seconds in contestant.seconds],
    )
    benchmark.pedantic(
        CLOCK.replay, args=(iter(contestant.seconds),), rounds=len(contestant.seconds)
    )
    check_slots(policies.setting, contestant.cache)


def make_contestants(setting: Setting, prompt: Tensor) -> dict[str, Contestant]:
    """Models that share one set of weights; all but ``full`` have read the prompt."""
    model = make_model(setting)
    made: dict[str, Contestant] = {}
    for name in POLICIES:
        patched = share_weights(model)
        # room for the others' budget and buffer, without an eviction
        sizes = (setting.budget + setting.buffer, 1) if name == "full" else None
        budget, buffer = sizes or (setting.budget, setting.buffer)
        handle = trimkv_kernels.patch(
            patched, make(name, setting), budget=budget, buffer=buffer, impl="torch"
        )
        cache = handle.new_cache()
        if name == "full":
            text = prompt[:, -setting.budget :]
            made[name] = Refilled(patched, cache, text=text, period=setting.buffer)
            continue
        patched(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        made[name] = Contestant(patched, cache, setting.buffer)
    return made


def make(name: str, setting: Setting) -> RetentionPolicy:
    """A policy with its default options; where it has gates, random ones of published width."""
    if name not in GATE_SIZES:
        return make_policy(name)
    shape = ModelShape(
        num_layers=setting.num_layers,
        num_kv_heads=setting.num_kv_heads,
        head_dim=setting.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_heads=setting.num_heads,
        hidden_size=setting.hidden_size,
    )
    policy: Any = example_policy(name, shape)
    config = replace(policy.gates.config, **GATE_SIZES[name])
    return replace(policy, gates=drawn(lambda: type(policy.gates)(config)))


def check_slots(setting: Setting, cache: Any) -> None:
    """Each head holds its budget and what came since the last eviction, in every layer."""
    since = (setting.warmup + setting.steps) % setting.buffer
    used = cache.stats().slots_used
    budgets = torch.tensor(cache.slots.budgets)
    if cache.slots.policy.capacity_only:
        budgets = torch.full_like(budgets, setting.budget)
    assert torch.equal(used, (budgets + since)[:, None, None].int().expand_as(used))
    assert sum(cache.slots.budgets) >= setting.num_layers * setting.budget
