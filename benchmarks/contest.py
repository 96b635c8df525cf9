"""An interleaved contest of decode steps: what the CPU benchmarks of this folder share.

All contestants decode the same text side by side: a round is one step of each, in shuffled order,
so that a slower or busier machine is slower for all of them. Every contestant's series is then
replayed to pytest-benchmark on a clock that shows the measured times, which makes it a row of its
own.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.loading import share_weights


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

    def medians(self, done: int) -> tuple[float, float]:
        """Median seconds of a step without an eviction and of one with it; equal at period 1.

        Args:
            done: Steps done before the first one in ``seconds``.
        """
        period = self.buffer or 1
        kinds: dict[bool, list[float]] = {True: [], False: []}
        for number, seconds in enumerate(self.seconds, start=done + 1):
            kinds[number % period == 0].append(seconds)
        return statistics.median(kinds[period == 1]), statistics.median(kinds[True])

    def figures(self, done: int) -> dict[str, float]:
        """Milliseconds per step: the whole series, and ``amortised``.

        A median over all steps hides an eviction every 128th; the mean shows it together with
        every hiccup of the machine. So ``amortised`` takes the medians of both kinds of step,
        weighted by how often they come.

        Args:
            done: Steps done before the first one in ``seconds``.
        """
        period = self.buffer or 1
        plain, evicting = self.medians(done)
        deciles = statistics.quantiles(self.seconds, n=10)
        seconds = {
            "median": statistics.median(self.seconds),
            "p20": deciles[1],
            "p80": deciles[7],
            "mean": statistics.mean(self.seconds),
            "amortised": (plain * (period - 1) + evicting) / period,
        }
        return {key: 1e3 * value for key, value in seconds.items()}


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


def run_rounds(setting: Setting, contestants: Mapping[str, Contestant], token: Tensor) -> None:
    """One step of each per round; all are fed what the contestant ``full`` chose."""
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


def make_model(
    setting: Setting, family: tuple[Any, Any] = (Qwen3Config, Qwen3ForCausalLM)
) -> nn.Module:
    """A model of a family, its classes of config and model, with random weights."""
    make_config, make = family
    config = make_config(
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
    model: nn.Module = make(config).eval()
    return model


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


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


def leave_attention_out(model: nn.Module) -> nn.Module:
    """A copy whose attention returns the query: all projections run, nothing is attended to."""

    def pass_query(module: nn.Module, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return query.transpose(1, 2), None

    AttentionInterface.register("left_out", pass_query)
    copied = share_weights(model)
    copied.set_attn_implementation("left_out")
    return copied
