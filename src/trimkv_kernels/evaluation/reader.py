"""Read cases of a task with a model, on a full or a bounded cache, and measure time and bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimkv_kernels.evaluation.perplexity import (
    Head,
    Setting,
    compare,
    full_hidden_states,
    read_losses,
)
from trimkv_kernels.integrations.compat import end_tokens
from trimkv_kernels.patching import PatchHandle
from trimkv_kernels.progress import count_off

if TYPE_CHECKING:
    from trimkv_kernels.evaluation.tasks.base import Case

_BLOCK = 64  # predictions that are averaged before the interval is taken


@dataclass
class FullCache:
    """Results of the full cache for the cases of a task, to compare bounded caches with.

    Attributes:
        answers: Token ids of its answers, by case.
        hidden: Its last hidden states, by text.
    """

    answers: list[list[int]] = field(default_factory=list)
    hidden: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


class Reader:
    """Reads the cases of one cell.

    Args:
        model: A supported model in eval mode.
        head: The model's, made before it was patched.
        tokenizer: The model's.
        handle: The handle of the patched model; None reads with the stock model on a full cache.
        full: The full cache's results. A reader without a handle fills them in.
        chunk: Tokens of a prompt or text read at a time on a bounded cache.
        batch: Prompts answered at once, at most.
        progress: Show bars.

    Attributes:
        spoken: Token ids of the answers, by case.
        tokens: Tokens read and written so far.
        seconds: The time this took.
        kv_bytes: Largest size of the cache of one row: keys, values and what a policy keeps.
    """

    def __init__(
        self,
        model: Any,
        head: Head,
        tokenizer: Any,
        handle: PatchHandle | None,
        full: FullCache,
        *,
        chunk: int,
        batch: int,
        progress: bool = False,
    ) -> None:
        self.spoken: list[list[int]] = []
        self.tokens, self.seconds, self.kv_bytes = 0, 0.0, 0
        self._model, self._head, self._tokenizer = model, head, tokenizer
        self._handle, self._full = handle, full
        self._chunk, self._batch, self._progress = chunk, batch, progress

    def answers(self, cases: Sequence[Case]) -> list[str]:
        """Greedy answers, as text. Prompts of similar lengths are read together."""
        order = sorted(range(len(cases)), key=lambda i: (cases[i].new, len(cases[i].prompt)))
        batches: list[list[int]] = []
        for i in order:
            last = batches[-1] if batches else []
            if last and len(last) < self._batch and cases[last[0]].new == cases[i].new:
                last.append(i)
            else:
                batches.append([i])
        self.spoken = [[] for _ in cases]
        bar = count_off(batches, "answering", total=len(batches), shown=self._progress)
        for numbers in bar:
            for i, spoken in zip(numbers, self._speak([cases[i] for i in numbers]), strict=True):
                self.spoken[i] = spoken
        if self._handle is None:
            self._full.answers = self.spoken
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in self.spoken]

    def agreements(self) -> list[float]:
        """The share of each answer before it first differs from the full cache's."""
        return [
            agreement(one, other)
            for one, other in zip(self.spoken, self._full.answers, strict=True)
        ]

    def divergences(self, tokens: Sequence[int]) -> list[float]:
        """KL(full || bounded) of a text, in nats, means of blocks of predictions.

        Raises:
            ValueError: the text never exceeds the budget.
        """
        text = self._head.prompt(torch.tensor([tokens]))
        if self._handle is None:
            with self._timed(len(tokens)):
                self._full.hidden[tuple(tokens)] = full_hidden_states(self._head, text)
            self._note_full(len(tokens))
            return [0.0]
        if tuple(tokens) not in self._full.hidden:  # its cell existed already
            self._full.hidden[tuple(tokens)] = full_hidden_states(self._head, text)
        full = self._full.hidden[tuple(tokens)]
        begin = Setting.of(self._handle, self._chunk, len(tokens)).first_bounded
        cache = self._handle.new_cache()
        with self._timed(len(tokens)):
            found = compare(self._head, text, cache, full, begin=begin, chunk=self._chunk)
        self.kv_bytes = max(self.kv_bytes, cache.stats().bytes_held)
        return _blocks(found.divergence)

    def losses(self, tokens: Sequence[int]) -> list[float]:
        """Next-token loss of a text, in nats, means of blocks of predictions."""
        text = self._head.prompt(torch.tensor([tokens]))
        cache = None if self._handle is None else self._handle.new_cache()
        with self._timed(len(tokens)):
            loss = read_losses(self._head, text, cache, chunk=self._chunk)
        if cache is None:
            self._note_full(len(tokens))
        else:
            self.kv_bytes = max(self.kv_bytes, cache.stats().bytes_held)
        return _blocks(loss)

    def _speak(self, cases: Sequence[Case]) -> list[list[int]]:
        length = max(len(case.prompt) for case in cases)
        fill = self._tokenizer.pad_token_id or 0
        ids = torch.full((len(cases), length), fill)
        mask = torch.zeros_like(ids)
        for row, case in enumerate(cases):
            ids[row, length - len(case.prompt) :] = torch.tensor(case.prompt)
            mask[row, length - len(case.prompt) :] = 1
        device = self._model.device
        options: dict[str, Any] = {"max_new_tokens": cases[0].new, "do_sample": False}
        if self._handle is not None:
            options["past_key_values"] = cache = self._handle.new_cache()
        with self._timed(0), torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pad_token_id=fill,
                **options,
            )
        ends = set(end_tokens(self._model.generation_config.eos_token_id))
        spoken = [until(row, ends) for row in output[:, length:].tolist()]
        longest = max(len(c.prompt) + len(s) for c, s in zip(cases, spoken, strict=True))
        self.tokens += sum(len(c.prompt) + len(s) for c, s in zip(cases, spoken, strict=True))
        if self._handle is None:
            self._note_full(longest)
        else:
            self.kv_bytes = max(self.kv_bytes, cache.stats().bytes_held // len(cases))
        return spoken

    @contextmanager
    def _timed(self, tokens: int) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
        self.tokens += tokens

    def _note_full(self, tokens: int) -> None:
        self.kv_bytes = max(self.kv_bytes, tokens * pair_bytes(self._model))


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """The share of two answers before they first differ; 1 if they are equal."""
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    return same / longest


def until(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """Tokens before the first that ends an answer."""
    for index, token in enumerate(tokens):
        if token in ends:
            return list(tokens[:index])
    return list(tokens)


def pair_bytes(model: Any) -> int:
    """Bytes of one token's keys and values in all layers of a full cache."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size: int = torch.empty((), dtype=model.dtype).element_size()
    return 2 * int(config.num_hidden_layers) * int(kv_heads) * int(head_dim) * size


def _blocks(values: Tensor) -> list[float]:
    """Means of blocks. A last block of less than half the length is joined to the one before."""
    parts = list(values.split(_BLOCK))
    if len(parts) > 1 and 2 * len(parts[-1]) < _BLOCK:
        parts[-2:] = [torch.cat(parts[-2:])]
    return [part.mean().item() for part in parts]
