"""The contestants of decode.py: each is stepped, or loops, in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import trimkv_kernels
from bounded_cat import BoundedCatCache
from contest import (
    Contestant,
)
from decode_cases import CAT, COMPILED, FLOOR, LOOP, STATIC, Case, Entry, Models


def do_nothing() -> None:
    """Before a round of a cache that is as long at its end as at its start."""


@dataclass
class Stepped:
    """Greedy steps of a model on a cache.

    Attributes:
        token: ``[batch, 1]``, the next input.
        restore: Makes the cache as long as it was. Not timed.
    """

    contestant: Contestant
    token: Tensor
    restore: Callable[[], None] = do_nothing

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.token = self.contestant.step(self.token, time.perf_counter)

    @property
    def logits(self) -> Tensor | None:
        """``[batch, vocabulary]`` of the latest step."""
        return self.contestant.logits


class Looped:
    """Steps of ``decode_loop``, which shows tokens and no logits."""

    logits = None

    def __init__(self, model: nn.Module, prompt: Tensor, limit: int) -> None:
        self._tokens = trimkv_kernels.decode_loop(model, prompt, max_new_tokens=limit)
        self.token = next(self._tokens)[:, None]
        self.restore = do_nothing

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.token = next(self._tokens)[:, None]


Stepper = Stepped | Looped


def build(models: Models, entry: Entry) -> Stepper:
    """A contestant with a filled cache."""
    if entry.contestant == FLOOR:
        contestant = Contestant(models.without_attention, None)
        return Stepped(contestant, models.token)
    if entry.context is not None:
        return build_full(models, entry)
    return build_bounded(models, entry)


def build_full(models: Models, entry: Entry) -> Stepped:
    """``context`` random pairs in every layer, the same for both kinds of cache."""
    case, model = models.case, models.stock
    context = entry.context or 0
    length = context + case.steps(entry)
    if entry.contestant == STATIC:
        cache: Cache = StaticCache(config=model.config, max_cache_len=length)
    else:
        cache = DynamicCache(config=model.config)
    setting = case.setting
    shape = (case.batch, setting.num_kv_heads, context, setting.head_dim)
    generator = torch.Generator(case.device).manual_seed(1)
    options: dict[str, Any] = {
        "generator": generator, "dtype": case.dtype, "device": case.device
    }  # fmt: skip
    for layer in range(setting.num_layers):
        cache.update(torch.randn(shape, **options), torch.randn(shape, **options), layer)

    def restore() -> None:
        if entry.contestant == STATIC:
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)
        elif cache.get_seq_length() > context:
            cache.crop(context - cache.get_seq_length())

    if entry.contestant == STATIC:
        # a break in the rival's graph is no reason to leave it out
        model = compiled(model, case, fullgraph=False)
    return Stepped(Contestant(model, cache), models.token, restore)


def build_bounded(models: Models, entry: Entry) -> Stepper:
    """A cache that has read the prompt."""
    case, buffer = models.case, entry.buffer or 1
    if entry.contestant == CAT:
        model, cache = (
            models.cat,
            BoundedCatCache(case.setting.num_layers, case.setting.budget, buffer),
        )
    else:
        model, handle = models.patched(buffer)
        if entry.contestant == LOOP:
            # the first period, all rounds, and the prompt's token
            return Looped(model, models.prompt, (case.rounds + 1) * case.steps(entry) + 1)
        cache = handle.new_cache()
    read = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    token = model(models.prompt, **read).logits[:, -1].argmax(dim=-1, keepdim=True)
    if entry.contestant == COMPILED:
        model = compiled(model, case, fullgraph=True)
    return Stepped(Contestant(model, cache, buffer), token)


def compiled(model: nn.Module, case: Case, *, fullgraph: bool) -> Callable[..., Any]:
    """As ``generate`` compiles on a GPU, for one shape."""
    mode = "reduce-overhead" if case.device.type == "cuda" else None
    call = torch.compile(
        model, backend=case.backend, mode=mode, fullgraph=fullgraph, dynamic=False
    )  # fmt: skip

    def step(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's output is done with
        return call(*args, **kwargs)

    return step
