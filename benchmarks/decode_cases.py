"""The cases of decode.py: models, caches, and who takes part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

import trimkv_kernels
from bounded_cat import attach_gates
from contest import (
    TOY,
    Setting,
    leave_attention_out,
    make_gates,
    make_model,
)
from gpu import outcome
from trimkv_kernels.loading import share_weights
from trimkv_kernels.policies.trimkv import TrimKV

MODELS = {
    "qwen3-0.6b": Setting(num_layers=28, vocab_size=151936, budget=1024),
    "qwen3-4b": Setting(
        num_layers=36,
        hidden_size=2560,
        intermediate_size=9728,
        num_heads=32,
        vocab_size=151936,
        budget=1024,
    ),
    "8x1024": Setting(),
    "toy": TOY,
}
FULL, STATIC, CAT, FLOOR = "full_eager", "static_compiled", "cat", "no_attention"
EAGER, COMPILED, LOOP = outcome.OUR_STEPS


@dataclass(frozen=True)
class Entry:
    """A contestant with what it differs in from others of its name.

    Attributes:
        context: Tokens in a full cache.
        buffer: Steps from one eviction to the next in a bounded one.
    """

    contestant: str
    context: int | None = None
    buffer: int | None = None

    @property
    def is_compiled(self) -> bool:
        return self.contestant in (STATIC, COMPILED)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a batch, on which all entries decode in turns.

    Attributes:
        model: Of `MODELS`.
        setting: Its sizes, and budget; ``prompt`` tokens are what a bounded cache reads.
        rounds: Timed rounds; 0 only checks that all of it runs.
        plain_steps: Steps of a round where nothing is evicted; otherwise it is the buffer.
        backend: What ``torch.compile`` is given.
    """

    model: str
    setting: Setting
    batch: int
    entries: tuple[Entry, ...]
    device: torch.device
    dtype: torch.dtype
    rounds: int = 5
    plain_steps: int = 32
    backend: str = "inductor"

    def steps(self, entry: Entry) -> int:
        """Steps of a round: whole periods, one eviction in each."""
        period = entry.buffer or 1
        return period * -(-self.plain_steps // period)

    def compiles(self, entry: Entry) -> bool:
        """Whether Inductor compiles for an entry; on a GPU ``decode_loop`` does so by itself."""
        is_loop = entry.contestant == LOOP and self.device.type == "cuda"
        return self.backend == "inductor" and (entry.is_compiled or is_loop)

    def shape(self, entry: Entry) -> dict[str, Any]:
        """What tells this step from others, in the results."""
        shape: dict[str, Any] = {"model": self.model, "batch": self.batch}
        if entry.context is not None:
            shape["context"] = entry.context
        if entry.buffer is not None:
            shape |= {"budget": self.setting.budget, "buffer": entry.buffer}
        return shape

    @property
    def pair_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        setting = self.setting
        return (
            2 * setting.num_layers * setting.num_kv_heads * setting.head_dim * self.dtype.itemsize
        )

    def floor_bytes(self, entry: Entry, weight_bytes: int) -> int:
        """What a mean step must read: every weight, and each pair that it attends to, once."""
        length = 0.0
        if entry.context is not None:
            length = entry.context + (self.steps(entry) + 1) / 2
        elif entry.buffer is not None:
            length = self.setting.budget + (entry.buffer + 1) / 2
        return weight_bytes + int(self.batch * self.pair_bytes * length)

    def cache_bytes(self, entry: Entry) -> int:
        """Keys and values at the end of a round, and the copy of a layer that a cat makes."""
        length = self.setting.budget + (entry.buffer or 0)
        if entry.context is not None:
            length = entry.context + self.steps(entry)
        copies = 1 + (entry.contestant in (FULL, CAT)) / self.setting.num_layers
        return int(self.batch * self.pair_bytes * length * copies)


class Models:
    """One set of weights and of gates, and the models that share them, made when first needed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        longest = max((entry.context or 0 for entry in case.entries), default=0)
        sizes = replace(case.setting, prompt=max(longest, case.setting.prompt))
        with torch.device(case.device), _default_dtype(case.dtype):
            self.stock = make_model(sizes)
            self.gates = make_gates(case.setting)
        self.prompt = torch.randint(
            case.setting.vocab_size, (case.batch, case.setting.prompt), device=case.device
        )
        # a tensor of its own: compiled code would meet other strides in the second step
        self.token = self.prompt[:, -1:].clone(memory_format=torch.contiguous_format)
        self._patched: dict[int, tuple[nn.Module, Any]] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters; the embedding is the output matrix, and read as a whole."""
        return sum(parameter.nbytes for parameter in self.stock.parameters())

    @cached_property
    def cat(self) -> nn.Module:
        model = share_weights(self.stock)
        attach_gates(model, self.gates)
        return model

    @cached_property
    def without_attention(self) -> nn.Module:
        return leave_attention_out(self.stock)

    def patched(self, buffer: int) -> tuple[nn.Module, Any]:
        """A patched model and its handle."""
        if buffer not in self._patched:
            model = share_weights(self.stock)
            policy = TrimKV(self.gates, age_offset=0)
            budget = self.case.setting.budget
            # on a CPU it would lay out the weights of the stock model otherwise, too
            pack = self.case.device.type == "cuda"
            handle = trimkv_kernels.patch(
                model, policy, budget=budget, buffer=buffer, pack_weights=pack
            )
            self._patched[buffer] = model, handle
        return self._patched[buffer]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def gpu_entries(contexts: Sequence[int], buffer: int) -> tuple[Entry, ...]:
    """Everybody; what takes long to compile comes last."""
    bounded = tuple(Entry(name, buffer=buffer) for name in (EAGER, LOOP, CAT, COMPILED))
    full = tuple(Entry(FULL, context=context) for context in contexts)
    static = tuple(Entry(STATIC, context=context) for context in contexts)
    return (*full, *bounded, *static)


def cpu_entries(contexts: Sequence[int], buffer: int, compiled: bool) -> tuple[Entry, ...]:
    """What can be told apart without a GPU: each bounded cache also evicting at every step."""
    full = tuple(Entry(FULL, context=context) for context in contexts)
    bounded = tuple(
        Entry(name, buffer=period) for period in (buffer, 1) for name in (EAGER, CAT)
    )  # fmt: skip
    extra = (Entry(COMPILED, buffer=buffer),) if compiled else ()
    return (*full, *bounded, *extra, Entry(FLOOR))


def sized(model: str, budget: int | None = None) -> Setting:
    """A model's sizes; the prompt is read, cut to the budget, and decoding starts a period."""
    setting = MODELS[model]
    budget = budget or setting.budget
    return replace(setting, budget=budget, prompt=budget + 2 * setting.buffer)


def subset_cases(device: torch.device, toy: bool) -> list[Case]:
    """What `make gpu` runs: G1 to G5 of the goals; a toy on the CPU for its dry run.

    ``decode_loop`` is compiled for each batch, about a minute each. What matters most comes first,
    so that time runs out for the rest.
    """
    model, context = ("toy", 64) if toy else ("qwen3-4b", 32768)
    setting = sized(model)
    everybody = gpu_entries([context], setting.buffer)
    options: dict[str, Any] = {"model": model, "setting": setting, "device": device}
    if toy:
        options |= {"dtype": torch.float32, "rounds": 0, "plain_steps": 4, "backend": "eager"}
        return [Case(batch=2, entries=everybody, **options)]
    options |= {"dtype": torch.bfloat16}
    headline = tuple(x for x in everybody if x.contestant in (FULL, EAGER, LOOP))
    ours = tuple(x for x in everybody if x.contestant in (EAGER, LOOP))
    batches = ((1, headline), (8, headline), (4, everybody), (64, ours))
    return [Case(batch=batch, entries=entries, **options) for batch, entries in batches]
