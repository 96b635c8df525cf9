"""What is measured of a contestant, and how.

Texts of one length are read as a batch, in chunks with an eviction after each. Then, from that
state, the model

- is asked every fact, teacher-forced: recall, and KL and top-1 agreement with the stock model;
- answers the first questions freely: how long its answers are, against the full cache's;
- continues the text freely: how much it repeats itself.

Questions are fed `buffer` tokens at a time. Evictions fall due on the same tokens as when they are
fed one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import trimkv_kernels as tk
from trimkv_kernels.conversation import held_bytes
from trimkv_kernels.embedded import (
    FIRST_HELD_OUT_SEED,
    EncodedText,
    Question,
    embedded_model,
    encode,
    make_recall_text,
    read_in_chunks,
    stack,
)
from trimkv_kernels.evaluation import compare_logits
from trimkv_kernels.policies import RetentionPolicy

FULL = "full"


@dataclass(frozen=True)
class Protocol:
    """How every contestant is run; all numbers are tokens where nothing else is said.

    Attributes:
        budgets: for each length of text the budgets, pairs per head.
        texts: texts of each length, of consecutive held-out seeds.
        spacing: least and greatest distance from one statement of a text to the next.
        context_chunk: read per forward, followed by an eviction.
        buffer: new ones that a full head takes before the next eviction.
        sinks, recent: first and last ones that no policy may evict.
        questions: of each text, so many are answered freely.
        answer, continuation: cap of a free answer; length of a free continuation.
    """

    budgets: dict[int, tuple[int, ...]] = field(
        default_factory=lambda: {
            512: (16, 32, 64, 128, 256, 512),
            1536: (16, 32, 48, 64, 96, 128, 192, 256, 512),
        }
    )
    texts: int = 5
    spacing: tuple[int, int] = (20, 28)
    context_chunk: int = 16
    buffer: int = 4
    sinks: int = 1
    recent: int = 2
    questions: int = 4
    answer: int = 32
    continuation: int = 64

    def bounding(self, num_tokens: int) -> tuple[int, ...]:
        """The budgets that texts of a length exceed before the questions come."""
        return tuple(
            budget
            for budget in self.budgets[num_tokens]
            if _read_until_cut(budget, self) < num_tokens
        )

    def first_bounded(self, num_tokens: int, budget: int) -> int:
        """Index of the first token that is read after an eviction.

        Raises:
            ValueError: nothing would be evicted before the questions come.
        """
        start = _read_until_cut(budget, self)
        if start >= num_tokens:
            raise ValueError(
                f"num_tokens: expected a text longer than budget + buffer = "
                f"{budget + self.buffer}, got {num_tokens}: a text that never exceeds the budget "
                "compares nothing"
            )
        return start


@dataclass(frozen=True)
class Outcome:
    """What came out for a contestant at one budget on texts of one length.

    Attributes:
        budget: None is the stock model on its own cache.
        recall: share of all questions answered right.
        recall_by_text: the same for each text.
        kl: mean of KL(full || bounded), in nats, over the tokens that were read after an eviction
            at the largest budget: the same ones at every budget.
        top1: share of them on which both find the same token likeliest.
        answer_tokens: mean length of the free answers, the end of the turn included.
        repetition: share of the continuations' 4-grams that stood there before.
        kv_bytes, state_bytes: a text's keys and values; all state of its cache.
    """

    contestant: str
    num_tokens: int
    budget: int | None
    recall: float
    recall_by_text: list[float]
    kl: float
    top1: float
    answer_tokens: float
    repetition: float
    kv_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class _Reading:
    """Logits `[texts, tokens, vocab]`, and what was generated, `[texts, tokens]` each."""

    logits: Tensor
    answers: list[Tensor]
    continuation: Tensor


class Bench:
    """The embedded model, the texts, and what the stock model makes of them.

    Args:
        protocol: how contestants are run.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.model, self.tokenizer = embedded_model()
        self._encode = cache(self._encode_texts)
        self._full = cache(self._read_full)

    def run_full(self, num_tokens: int) -> Outcome:
        """The stock model, which all others are held against."""
        reading, held = self._full(num_tokens)
        return self._outcome(FULL, num_tokens, None, reading, kv=held, state=held)

    def run(
        self, contestant: str, policy: RetentionPolicy, num_tokens: int, budget: int
    ) -> Outcome:
        """One contestant at one budget.

        Raises:
            ValueError: the texts would never exceed the budget.
        """
        p = self.protocol
        p.first_bounded(num_tokens, budget)
        self._full(num_tokens)  # of the stock model, so before it is patched
        options = {"buffer": p.buffer, "sinks": p.sinks, "recent": p.recent}
        with tk.patch(self.model, policy, budget=budget, **options) as handle:
            bounded = handle.new_cache()
            reading = self._read(num_tokens, bounded, p.context_chunk, p.buffer)
            stats = bounded.stats()
        if stats.nan_layers:
            raise RuntimeError(f"{contestant} gave NaN scores in layers {stats.nan_layers}")
        layers = range(bounded.slots.num_layers)
        held = sum(bounded.slots.keys(x).nbytes + bounded.slots.values(x).nbytes for x in layers)
        return self._outcome(
            contestant,
            num_tokens,
            budget,
            reading,
            kv=held // p.texts,
            state=stats.bytes_held // p.texts,
        )

    def _encode_texts(self, num_tokens: int) -> list[EncodedText]:
        seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + self.protocol.texts)
        texts = [make_recall_text(num_tokens, seed=s, spacing=self.protocol.spacing) for s in seeds]
        return [encode(text, self.tokenizer) for text in texts]

    def _read_full(self, num_tokens: int) -> tuple[_Reading, int]:
        stock = DynamicCache(config=self.model.config)
        reading = self._read(num_tokens, stock)
        return reading, held_bytes(stock) // self.protocol.texts

    def _read(
        self,
        num_tokens: int,
        cache: Any,
        chunk: int | None = None,
        question_chunk: int | None = None,
    ) -> _Reading:
        """Read the texts, in one forward each where no chunk is given."""
        input_ids = stack(self._encode(num_tokens))
        context, questions = input_ids[:, :num_tokens], input_ids[:, num_tokens:]
        logits, cache = read_in_chunks(self.model, context, chunk or num_tokens, cache)
        p, end = self.protocol, self.tokenizer.eos_token_id
        answers = [
            generate(self.model, cache, prompt, p.answer, end=end)
            for prompt in _open_questions(questions, p.questions)
        ]
        likeliest = logits[:, -1:].argmax(-1)
        continuation = generate(self.model, cache, likeliest, p.continuation)
        question_chunk = question_chunk or questions.shape[1]
        more, _ = read_in_chunks(self.model, questions, question_chunk, cache)
        return _Reading(torch.cat((logits, more), dim=1), answers, continuation)

    def _outcome(
        self,
        contestant: str,
        num_tokens: int,
        budget: int | None,
        reading: _Reading,
        *,
        kv: int,
        state: int,
    ) -> Outcome:
        encoded, full = self._encode(num_tokens), self._full(num_tokens)[0]
        p = self.protocol
        start = p.first_bounded(num_tokens, max(p.bounding(num_tokens)))
        right = [
            (logits[text.answer_positions - 1].argmax(-1) == text.answers)
            for logits, text in zip(reading.logits, encoded, strict=True)
        ]
        length = torch.tensor([[len(text.input_ids)] for text in encoded])
        column = torch.arange(reading.logits.shape[1])
        divergence, agreement = mean_divergence(
            full.logits, reading.logits, (column >= start) & (column < length)
        )
        return Outcome(
            contestant,
            num_tokens,
            budget,
            recall=torch.cat(right).double().mean().item(),
            recall_by_text=[row.double().mean().item() for row in right],
            kl=divergence,
            top1=agreement,
            answer_tokens=mean(
                answer_tokens(rows, self.tokenizer.eos_token_id) for rows in reading.answers
            ),
            repetition=repetition(reading.continuation.tolist()),
            kv_bytes=kv,
            state_bytes=state,
        )


def _read_until_cut(budget: int, protocol: Protocol) -> int:
    """Context tokens read when the first eviction is over: it follows a whole chunk."""
    chunk = protocol.context_chunk
    return -(-(budget + protocol.buffer) // chunk) * chunk


@torch.inference_mode()
def generate(
    model: Any, cache: Any, input_ids: Tensor, count: int, *, end: int | None = None
) -> Tensor:
    """Continue greedily on a copy of a cache.

    Args:
        model: patched or not, as the cache needs it.
        cache: what was read before; left as it is.
        input_ids: int64 `[batch, num_tokens]`, fed first.
        count: tokens to generate.
        end: stop early when every row has had this token.

    Returns:
        int64 `[batch, <= count]`, what comes after `input_ids`.
    """
    cache = copy.deepcopy(cache)
    new: list[Tensor] = []
    while len(new) < count and not (new and _all_have(torch.cat(new, dim=1), end)):
        output = model(input_ids=input_ids, use_cache=True, past_key_values=cache)
        input_ids = output.logits[:, -1:].argmax(-1)
        new.append(input_ids)
    return torch.cat(new, dim=1)


def mean_divergence(full: Tensor, bounded: Tensor, counted: Tensor) -> tuple[float, float]:
    """Mean KL(full || bounded) in nats, and the share of tokens with the same likeliest one.

    Args:
        full, bounded: logits `[batch, tokens, vocab]`.
        counted: bool `[batch, tokens]`, which tokens the means run over.
    """
    divergence, same = compare_logits(full[counted], bounded[counted])
    return divergence.mean().item(), same.double().mean().item()


def answer_tokens(answers: Tensor, end: int) -> float:
    """Mean number of tokens up to `end`, that one included; a row without it counts in full.

    Args:
        answers: int64 `[batch, tokens]`.
        end: id that ends an answer.
    """
    before = (answers == end).int().cumsum(dim=1) == 0
    return (before.sum(dim=1) + 1).clamp(max=answers.shape[1]).double().mean().item()


def repetition(rows: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of the n-grams that stood in the same row before."""
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    return 1 - sum(len(set(row)) for row in grams) / sum(map(len, grams))


def _all_have(tokens: Tensor, end: int | None) -> bool:
    return end is not None and bool((tokens == end).any(dim=1).all())


def _open_questions(questions: Tensor, count: int) -> list[Tensor]:
    """The first questions of each row, up to their answers; all are equally long.

    Args:
        questions: int64 `[batch, tokens]`, questions with their answers, one after the other.
        count: how many.
    """
    one = Question("", "", 0)
    words, prompt = len(one.words), len(one.prompt)
    return [questions[:, i * words : i * words + prompt] for i in range(count)]
