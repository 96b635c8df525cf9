"""What a decode step costs: full cache, bounded ``torch.cat`` cache, ours, and no cache at all.

All contestants decode the same text side by side: a round is one step of each, in shuffled order,
so that a slower or busier machine is slower for all of them. Every contestant's series is then
replayed to pytest-benchmark on a clock that shows the measured times, which makes it a row of its
own.

See `README.md` for what is compared and how to read it.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, Qwen3Config, Qwen3ForCausalLM

import trimkv_kernels
from bounded_cat import BoundedCatCache, attach_gates
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.policies.trimkv import TrimKV

CONTESTANTS = (
    "full",
    "cat_buffered",
    "trimkv_buffered",
    "cat_per_step",
    "trimkv_per_step",
    "floor",
)


@dataclass(frozen=True)
class Setting:
    """Shapes of the model, the cache and the run. ``steps`` are whole buffer periods.

    ``cpu_time`` measures the CPU time of the calling thread, which is all there is with one thread.
    """

    num_layers: int = 8
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 4096
    gate_size: int = 512
    prompt: int = 4096
    budget: int = 512
    buffer: int = 128
    warmup: int = 8
    steps: int = 256
    threads: int = 2
    cpu_time: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        return time.thread_time if self.cpu_time else time.perf_counter


TOY = Setting(
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=128,
    gate_size=16,
    prompt=64,
    budget=16,
    buffer=8,
    warmup=2,
    steps=16,
)


@dataclass
class Contestant:
    """A model with its cache, and the time of each of its steps."""

    model: nn.Module
    cache: Any  # None: the step without a cache
    buffer: int | None = None  # steps between two evictions, where there are any
    seconds: list[float] = field(default_factory=list)
    logits: Tensor | None = None

    def step(self, token: Tensor, clock: Callable[[], float]) -> Tensor:
        """One greedy step, timed; returns the token it chose, ``[1, 1]``."""
        start = clock()
        output = self.model(token, past_key_values=self.cache, use_cache=self.cache is not None)
        chosen = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        self.seconds.append(clock() - start)
        self.logits = output.logits[:, -1]
        return chosen

    def amortised(self, done: int) -> float:
        """Seconds per step with evictions spread over their period.

        A median over all steps hides an eviction every 128th; the mean shows it together with
        every hiccup of the machine. So: the medians of both kinds of step, weighted by how often
        they come.

        Args:
            done: Steps done before the first one in ``seconds``.
        """
        period = self.buffer or 1
        kinds: dict[bool, list[float]] = {True: [], False: []}
        for number, seconds in enumerate(self.seconds, start=done + 1):
            kinds[number % period == 0].append(seconds)
        evicting = statistics.median(kinds[True])
        if period == 1:
            return evicting
        return (statistics.median(kinds[False]) * (period - 1) + evicting) / period


@dataclass
class Contest:
    """The result of the interleaved run."""

    setting: Setting
    contestants: dict[str, Contestant]
    load: tuple[float, float]  # 1-minute load average before the run and at its end

    def figures(self, name: str) -> dict[str, float]:
        """Milliseconds per step; ``share`` is what is left of ``amortised`` above the floor."""
        contestant = self.contestants[name]
        deciles = statistics.quantiles(contestant.seconds, n=10)
        amortised = contestant.amortised(self.setting.warmup)
        floor = self.contestants["floor"].amortised(self.setting.warmup)
        seconds = {
            "median": statistics.median(contestant.seconds),
            "p20": deciles[1],
            "p80": deciles[7],
            "mean": statistics.mean(contestant.seconds),
            "amortised": amortised,
            "share": amortised - floor,
        }
        return {key: 1e3 * value for key, value in seconds.items()}

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


class ReplayClock:
    """A timer that moves only when a measured duration is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return "replayed measurements"

    def replay(self, durations: Iterator[float]) -> None:
        self.now += next(durations)


CLOCK = ReplayClock()


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


def run_rounds(setting: Setting, contestants: dict[str, Contestant], token: Tensor) -> None:
    """One step of each per round; all are fed what the full cache chose."""
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(setting.warmup + setting.steps):
            if number == setting.warmup:
                for contestant in contestants.values():
                    contestant.seconds.clear()
            shuffle(order)
            chosen = {name: contestants[name].step(token, setting.clock) for name in order}
            token = chosen["full"]
    finally:
        gc.enable()


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


def make_model(setting: Setting) -> nn.Module:
    config = Qwen3Config(
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        intermediate_size=setting.intermediate_size,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=setting.num_heads,
        num_key_value_heads=setting.num_kv_heads,
        head_dim=setting.head_dim,
        max_position_embeddings=2 * setting.prompt,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def make_gates(setting: Setting) -> RetentionGates:
    """Gates with rates so far apart that rounding does not decide what stays."""
    config = GateConfig(
        kind="rg",
        hidden_size=setting.hidden_size,
        intermediate_size=setting.gate_size,
        num_layers=setting.num_layers,
        num_kv_heads=setting.num_kv_heads,
        bias_init=4.0,
    )
    gates = RetentionGates(config)
    for name, parameter in gates.named_parameters():
        if name.endswith("linear2.weight"):
            parameter.mul_(20)
    return gates


def share_weights(model: nn.Module) -> nn.Module:
    """A copy to be patched by itself, with the same weights in the same memory."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def leave_attention_out(model: nn.Module) -> nn.Module:
    """A copy whose attention returns the query: all projections run, nothing is attended to."""

    def pass_query(module: nn.Module, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return query.transpose(1, 2), None

    AttentionInterface.register("left_out", pass_query)
    copied = share_weights(model)
    copied.set_attn_implementation("left_out")
    return copied


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
