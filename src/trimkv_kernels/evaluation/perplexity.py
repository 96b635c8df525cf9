"""Teacher-forced measures of a text that is read on a bounded cache, with evictions in between.

A prediction can differ from the full cache's only after an eviction. A cache evicts after a call,
if a head holds ``budget + buffer`` pairs. So the first token that does not see all earlier pairs
is::

    first_bounded = ceil((budget + buffer) / chunk) * chunk

A text that ends before this token measures nothing, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.checks import check_positive
from trimkv_kernels.integrations.discovery import ModelParts, find_parts
from trimkv_kernels.integrations.images import Prompt
from trimkv_kernels.patching import PatchHandle, patch
from trimkv_kernels.policies import RetentionPolicy
from trimkv_kernels.policies.base import policy_name
from trimkv_kernels.progress import count_off

# Positions whose logits exist at a time: a few hundred MB in float64 at the largest vocabularies.
_BLOCK = 64


@dataclass(frozen=True)
class Perplexity:
    """Next-token loss of a text on a bounded cache.

    Attributes:
        policy, budget, buffer: Of the cache.
        chunk: Tokens read at a time.
        tokens: Of the text.
        loss: Mean of ``-ln p(next token)`` over all tokens but the first, in nats.
        perplexity: ``exp(loss)``.
        bounded_tokens: How many tokens were predicted after the first eviction.
        bounded_loss, bounded_perplexity: The same over these tokens only.
    """

    policy: str
    budget: int
    buffer: int
    chunk: int
    tokens: int
    loss: float
    perplexity: float
    bounded_tokens: int
    bounded_loss: float
    bounded_perplexity: float

    def __str__(self) -> str:
        return (
            f"{_heading(self)}\n"
            f"loss        {self.loss:.4f} nats, perplexity {self.perplexity:.4f}, "
            f"over {self.tokens - 1:,} predictions\n"
            f"of these    {self.bounded_loss:.4f} nats, perplexity {self.bounded_perplexity:.4f}, "
            f"over the {self.bounded_tokens:,} after the first eviction"
        )


@dataclass(frozen=True)
class Divergence:
    """A bounded cache against the full one, over the predictions after the first eviction.

    Attributes:
        policy, budget, buffer: Of the bounded cache.
        chunk: Tokens read at a time.
        tokens: Of the text.
        bounded_tokens: Number of predictions after the first eviction. The figures below are over
            these.
        kl: Mean of ``KL(full || bounded)``, in nats.
        largest_kl: The largest.
        top1: Share of predictions for which both have the same likeliest token.
        full_loss, bounded_loss: Mean of ``-ln p(next token)`` on either cache, in nats.
    """

    policy: str
    budget: int
    buffer: int
    chunk: int
    tokens: int
    bounded_tokens: int
    kl: float
    largest_kl: float
    top1: float
    full_loss: float
    bounded_loss: float

    def __str__(self) -> str:
        return (
            f"{_heading(self)}\n"
            f"KL(full || bounded)  {self.kl:.4f} nats, at most {self.largest_kl:.4f}\n"
            f"same likeliest token {self.top1:.1%}\n"
            f"next-token loss      {self.bounded_loss:.4f} nats, full cache {self.full_loss:.4f}\n"
            f"over the {self.bounded_tokens:,} predictions after the first eviction"
        )


@torch.inference_mode()
def perplexity(
    model: Any,
    input_ids: Tensor,
    policy: RetentionPolicy | str | None = None,
    *,
    chunk: int = 1,
    images: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> Perplexity:
    """Measure the next-token loss of a text on a bounded cache.

    The model is patched during the call.

    Args:
        model: A supported model in eval mode, not patched.
        input_ids: ``[1, tokens]`` int64.
        policy: As for :func:`trimkv_kernels.patch`.
        chunk: Tokens read at a time, with evictions in between; 1 is how ``generate`` reads its
            own tokens.
        images: For a vision-language model, what its processor returned beside ``input_ids``,
            which contain the tokens of these images. None: no images.
        progress: Show a bar if it takes long.
        options: Of :func:`trimkv_kernels.patch`, such as ``budget`` and ``buffer``.

    Returns:
        The loss and the perplexity.

    Raises:
        TypeError: the model is not supported.
        ValueError: the text ends before a prediction follows an eviction, ``input_ids`` or
            ``chunk`` is not valid, or an option does not fit the model.
    """
    head = Head(model)
    _check_options(options)
    prompt = head.prompt(input_ids, images)
    with patch(model, policy, **options) as handle:
        setting = Setting.of(handle, chunk, input_ids.shape[1])
        cache = handle.new_cache()
        loss = read_losses(head, prompt, cache, chunk=chunk, progress=progress)
    bounded = loss[setting.first_bounded :]
    mean, bounded_mean = loss.mean().item(), bounded.mean().item()
    return Perplexity(
        **setting.described(),
        loss=mean,
        perplexity=math.exp(mean),
        bounded_tokens=len(bounded),
        bounded_loss=bounded_mean,
        bounded_perplexity=math.exp(bounded_mean),
    )


@torch.inference_mode()
def kl(
    model: Any,
    input_ids: Tensor,
    policy: RetentionPolicy | str | None = None,
    *,
    chunk: int = 1,
    images: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> Divergence:
    """Compare a bounded cache with the same model's full attention, prediction by prediction.

    The full model reads the text in one forward, and its last hidden states are kept. Logits exist
    for a few positions at a time. The model is patched during a part of the call.

    Args:
        model: A supported model in eval mode, not patched.
        input_ids: ``[1, tokens]`` int64.
        policy: As for :func:`trimkv_kernels.patch`.
        chunk: Tokens read at a time, with evictions in between; 1 is how ``generate`` reads its
            own tokens.
        images: For a vision-language model, what its processor returned beside ``input_ids``,
            which contain the tokens of these images. None: no images.
        progress: Show a bar if it takes long.
        options: Of :func:`trimkv_kernels.patch`, such as ``budget`` and ``buffer``.

    Returns:
        The divergence, over the predictions after the first eviction.

    Raises:
        TypeError: the model is not supported.
        ValueError: as :func:`perplexity`.
    """
    head = Head(model)
    _check_options(options)
    prompt = head.prompt(input_ids, images)
    with patch(model, policy, **options) as handle:
        setting = Setting.of(handle, chunk, input_ids.shape[1])
        full = full_hidden_states(head, prompt)
        cache = handle.new_cache()
        found = compare(
            head, prompt, cache, full, begin=setting.first_bounded, chunk=chunk, progress=progress
        )
    full_loss, bounded_loss = found.losses.mean(dim=1).tolist()
    return Divergence(
        **setting.described(),
        bounded_tokens=len(found.divergence),
        kl=found.divergence.mean().item(),
        largest_kl=found.divergence.max().item(),
        top1=found.same.double().mean().item(),
        full_loss=full_loss,
        bounded_loss=bounded_loss,
    )


@dataclass(frozen=True)
class Compared:
    """A bounded cache against the full one, prediction by prediction after the first eviction.

    Attributes:
        divergence: ``[predictions]`` float64, KL(full || bounded) in nats.
        same: ``[predictions]`` bool, whether both have the same likeliest token.
        losses: ``[2, predictions]`` float64, ``-ln p(next token)``, full and bounded.
    """

    divergence: Tensor
    same: Tensor
    losses: Tensor


@torch.inference_mode()
def full_hidden_states(head: Head, prompt: Prompt) -> Tensor:
    """Last hidden states of the stock model, ``[1, tokens - 1, hidden_size]``, in one forward."""
    inputs = prompt.input_ids[:, :-1]
    whole = prompt.part(0, inputs.shape[1])
    # without a mask, some versions take the positions of images for packed documents
    whole["attention_mask"] = torch.ones_like(inputs)
    states: Tensor = head.parts.base(**whole, use_cache=False).last_hidden_state
    return states


@torch.inference_mode()
def compare(
    head: Head,
    prompt: Prompt,
    cache: Any,
    full: Tensor,
    *,
    begin: int,
    chunk: int,
    progress: bool = False,
) -> Compared:
    """Read a text on a bounded cache and compare with the hidden states of the full one.

    Args:
        head: Of a patched model.
        prompt: The text, from :meth:`Head.prompt`.
        cache: An empty cache of the model.
        full: From :func:`full_hidden_states`.
        begin: The first prediction to compare. It must be the first of a chunk.
        chunk: Tokens read at a time.
        progress: Show a bar if it takes long.
    """
    targets = prompt.input_ids[0, 1:]
    divergences, agreements, losses = [], [], []
    for start, hidden in _read(head.parts, prompt, cache, chunk, progress):
        if start < begin:
            continue
        span = full[:, start : start + hidden.shape[1]]
        for (position, stock), (_, bounded) in zip(head(span), head(hidden), strict=True):
            divergence, same = compare_logits(stock, bounded)
            divergences.append(divergence)
            agreements.append(same)
            at = start + position
            losses.append(torch.stack((_loss(stock, targets, at), _loss(bounded, targets, at))))
    return Compared(torch.cat(divergences), torch.cat(agreements), torch.cat(losses, dim=1))


@torch.inference_mode()
def read_losses(
    head: Head, prompt: Prompt, cache: Any = None, *, chunk: int = 1, progress: bool = False
) -> Tensor:
    """``-ln p(next token)`` of a text, ``[tokens - 1]`` float64.

    Args:
        head: Of a patched model; without a cache, of a stock one.
        prompt: The text, from :meth:`Head.prompt`.
        cache: An empty cache of the model; None reads the text in one forward.
        chunk: Tokens read at a time.
        progress: Show a bar if it takes long.
    """
    targets = prompt.input_ids[0, 1:]
    if cache is None:
        parts: Any = [(0, full_hidden_states(head, prompt))]
    else:
        parts = _read(head.parts, prompt, cache, chunk, progress)
    losses = [
        _loss(logits, targets, start + position)
        for start, hidden in parts
        for position, logits in head(hidden)
    ]
    return torch.cat(losses)


def compare_logits(full: Tensor, bounded: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(full || bounded) = sum_v p_v (ln p_v - ln q_v)``, and whether the top tokens are equal.

    A token to which the full cache gives probability 0, such as one with a logit of -inf, adds
    nothing. If only the bounded cache gives it probability 0, the divergence is infinite.

    Args:
        full, bounded: Logits ``[..., vocab]``, any float dtype.

    Returns:
        The divergence in nats, ``[...]`` float64; and whether the likeliest token is the same,
        ``[...]`` bool.

    Raises:
        ValueError: the shapes differ.
    """
    if full.shape != bounded.shape:
        raise ValueError(
            f"full and bounded must have one shape, got {list(full.shape)} and "
            f"{list(bounded.shape)}"
        )
    log_p, log_q = full.double().log_softmax(-1), bounded.double().log_softmax(-1)
    p = log_p.exp()
    # p ln p is 0 at p = 0, where 0 * (-inf - -inf) and 0 * inf would be NaN
    term = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return term.sum(-1), full.argmax(-1) == bounded.argmax(-1)


class Head:
    """A model's decoder stack, and its logits a block of positions at a time.

    Args:
        model: A supported model, not patched; it may be patched afterwards.

    Raises:
        TypeError: it is not supported, or has no language-model head.
    """

    def __init__(self, model: Any) -> None:
        parts = find_parts(model)
        if parts.generator is None:
            raise TypeError(
                "model must have a language-model head, as Qwen3ForCausalLM has, got "
                f"{type(model).__name__}"
            )
        self.parts = parts
        self._embeddings = parts.generator.get_output_embeddings()

    def prompt(self, input_ids: Tensor, images: Mapping[str, Any] | None = None) -> Prompt:
        """A text of ``[1, tokens]`` int64, on the model's device, with its images.

        Raises:
            ValueError: it is not one row of at least 2 tokens, or ``images`` do not fit.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
            raise ValueError(
                f"input_ids must have shape [1, at least 2 tokens], got {list(input_ids.shape)}"
            )
        return Prompt.of(self.parts, input_ids.to(self.parts.device), images)

    def __call__(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``(first position, logits [positions, vocab])`` of ``[1, tokens, hidden_size]``."""
        for start in range(0, hidden.shape[1], _BLOCK):
            yield start, self._embeddings(hidden[0, start : start + _BLOCK])


@dataclass(frozen=True)
class Setting:
    """How a text is read. It exists only for texts that are long enough."""

    policy: str
    budget: int
    buffer: int
    chunk: int
    tokens: int
    first_bounded: int

    @classmethod
    def of(cls, handle: PatchHandle, chunk: int, tokens: int) -> Setting:
        check_positive("chunk", chunk)
        budget, buffer = handle.options.budget, handle.options.buffer
        first = -(-(budget + buffer) // chunk) * chunk
        if tokens - 1 <= first:  # the last token predicts nothing
            raise ValueError(
                f"a text that never exceeds the budget measures nothing: it must have at least "
                f"{first + 2:,} tokens at budget={budget}, buffer={buffer}, chunk={chunk}, got "
                f"{tokens:,}; take a longer text, a smaller budget or a smaller chunk"
            )
        return cls(policy_name(handle.policy), budget, buffer, chunk, tokens, first)

    def described(self) -> dict[str, Any]:
        """The attributes that results have in common."""
        return {name: value for name, value in vars(self).items() if name != "first_bounded"}


def _check_options(options: Mapping[str, Any]) -> None:
    if options.get("beside_text"):
        raise ValueError(
            "beside_text=True counts the text of a prompt, and here all text is read in pieces: "
            "add its text tokens to the budget"
        )


def _read(
    parts: ModelParts, prompt: Prompt, cache: Any, chunk: int, progress: bool
) -> Iterator[tuple[int, Tensor]]:
    """``(first position, hidden states [1, chunk, hidden_size])`` of each call."""
    length = prompt.input_ids.shape[1] - 1  # the last token is only predicted
    starts = range(0, length, chunk)
    for start in count_off(starts, "reading", total=len(starts), shown=progress, scale=chunk):
        yield start, prompt.read(parts, cache, start, min(start + chunk, length))


def _loss(logits: Tensor, targets: Tensor, start: int) -> Tensor:
    """``-ln p`` of the tokens that follow ``[positions, vocab]`` logits, in float64."""
    following = targets[start : start + logits.shape[0]].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.double(), following, reduction="none")


def _heading(result: Perplexity | Divergence) -> str:
    return (
        f"{result.policy}, budget {result.budget}, buffer {result.buffer}, "
        f"{result.tokens:,} tokens read {result.chunk} at a time"
    )
