"""SnapKV: keep what the last queries attend to.

The last queries are an observation window. A slot is as important as the attention they give it.
Pooling along the sequence shares the importance with its neighbours, so that a passage stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from trimkv_kernels.policies._attention import softmax_over, window_logits
from trimkv_kernels.policies._options import check_choice, check_integer
from trimkv_kernels.policies.base import ModelShape, Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy


@register_policy("snap_kv")
@dataclass(frozen=True)
class SnapKV(RetentionPolicy):
    """SnapKV (Li et al., arXiv 2404.14469), on prompts and in decoding alike.

    With queries ``q`` and keys ``k`` after RoPE, all in float32, a slot before the last ``window``
    positions scores, in this order:

    - ``variant="prompt"``: softmax of ``scale * q k`` over all slots up to the query's position;
      mean over the window's queries; ``group`` over the query heads; pooling.
    - ``variant="decoding"``: ``group`` over the query heads' logits; softmax over the slots before
      the window; mean over the window's queries; pooling. R-KV's authors use it with ``window=8,
      kernel_size=7, pooling="max", group="max"``.

    Pooling has stride 1 and runs over neighbouring slots before the window. Beyond them it counts
    zeros. In the decoding variant the window's own slots score +inf, as in the authors' code. In
    the prompt variant they score the mean over the queries that see them, without pooling, so that
    a budget below the window still chooses among them; ``recent=window`` keeps them all.

    The authors cut once, after the prompt, and have one cache per query head. They use the sum over
    the window; the mean gives the same order.

    Args:
        window: Last queries that vote.
        kernel_size: Slots pooled over; odd, 1 for none.
        pooling: ``"avg"`` or ``"max"``.
        group: Reduction over the query heads that share a KV head, ``"mean"`` or ``"max"``.
        variant: ``"prompt"`` or ``"decoding"``, see above.
        scale: Softmax scale. A model's own takes precedence; None is ``head_dim ** -0.5``.

    Raises:
        TypeError: ``window`` or ``kernel_size`` is not an integer.
        ValueError: a number is below 1, ``kernel_size`` is even, or a choice is not one of those
            named.
    """

    window: int = 32
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"
    group: Literal["mean", "max"] = "mean"
    variant: Literal["prompt", "decoding"] = "prompt"
    scale: float | None = None

    sinks = 0

    def __post_init__(self) -> None:
        check_integer("window", self.window, minimum=1)
        check_kernel_size(self.kernel_size)
        check_choice("pooling", self.pooling, ("avg", "max"))
        check_choice("group", self.group, ("mean", "max"))
        check_choice("variant", self.variant, ("prompt", "decoding"))

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(score=("key",), query_window=self.window, chronological=True)

    def bind(self, shape: ModelShape) -> Self:
        return self if shape.scale is None else replace(self, scale=shape.scale)

    def score(self, slots: SlotView) -> Tensor:
        past = before_window(slots, self.window)
        if self.variant == "prompt":
            importance = prompt_importance(slots, group=self.group, scale=self.scale)
            pooled = pool_slots(importance, past, self.kernel_size, pooling=self.pooling)
            return torch.where(past, pooled, importance)
        importance = past_importance(slots, past, group=self.group, scale=self.scale)
        pooled = pool_slots(importance, past, self.kernel_size, pooling=self.pooling)
        return pooled.masked_fill(~past, torch.inf)


def check_kernel_size(kernel_size: int) -> None:
    """Raise unless ``kernel_size`` slots can be pooled, half of them on either side.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1 or even.
    """
    check_integer("kernel_size", kernel_size, minimum=1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


def before_window(slots: SlotView, window: int) -> Tensor:
    """``[batch, num_kv_heads, num_slots]`` bool: slots before the last ``window`` positions."""
    return slots.valid & (slots.position < (slots.t - window)[:, None, None])


def prompt_importance(slots: SlotView, *, group: str, scale: float | None = None) -> Tensor:
    """Mean attention of the window's queries over all slots, causal by position.

    Args:
        slots: Candidates, with ``key``, ``queries`` and ``query_position``.
        group: ``"mean"`` or ``"max"`` over the query heads, of their means.
        scale: Softmax scale; None is ``head_dim ** -0.5``.

    Returns:
        fp32 ``[batch, num_kv_heads, num_slots]``: of each slot, the mean over the queries that see
        it; 0 where not valid.
    """
    # a missing query has position -1, before every slot
    visible = slots.position[:, :, None] <= slots.query_position[:, None, :, None]
    visible = visible & slots.valid[:, :, None]  # [batch, num_kv_heads, window, num_slots]
    logits = window_logits(slots.queries, slots.key, scale)
    attention = _mean_attention(logits, visible[:, :, None])
    return _reduce_group(attention, group)


def past_importance(
    slots: SlotView, past: Tensor, *, group: str, scale: float | None = None
) -> Tensor:
    """Mean attention of the window's queries over the slots before the window.

    Args:
        slots: Candidates, with ``key``, ``queries`` and ``query_position``.
        past: Of :func:`before_window`; every query of the window sees these.
        group: ``"mean"`` or ``"max"`` over the query heads, of their logits.
        scale: Softmax scale; None is ``head_dim ** -0.5``.

    Returns:
        fp32 ``[batch, num_kv_heads, num_slots]``, 0 where not ``past``.
    """
    visible = past[:, :, None] & (slots.query_position >= 0)[:, None, :, None]
    logits = window_logits(slots.queries, slots.key, scale)
    return _mean_attention(_reduce_group(logits, group), visible)


def pool_slots(importance: Tensor, counted: Tensor, kernel_size: int, *, pooling: str) -> Tensor:
    """Pool non-negative numbers over neighbouring slots.

    Args:
        importance: fp32 ``[batch, num_kv_heads, num_slots]``, in ascending position.
        counted: bool, like ``importance``. Other slots, and those beyond the ends, are padding.
        kernel_size: Odd.
        pooling: ``"avg"``, padding counted as 0, or ``"max"``.

    Returns:
        Like ``importance``.
    """
    importance = importance.masked_fill(~counted, 0.0)
    pool = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    return pool(importance, kernel_size, stride=1, padding=kernel_size // 2)


def _reduce_group(per_head: Tensor, group: str) -> Tensor:
    """Reduce ``[batch, num_kv_heads, group, ...]`` over the query heads."""
    return per_head.mean(dim=2) if group == "mean" else per_head.amax(dim=2)


def _mean_attention(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible slots, then the mean over the queries that see a slot.

    Args:
        logits: ``[..., window, num_slots]``, overwritten.
        visible: bool, broadcastable to ``logits``.

    Returns:
        ``[..., num_slots]``, 0 for a slot that no query sees.
    """
    attention = softmax_over(logits, visible)
    return attention.sum(dim=-2) / visible.sum(dim=-2).clamp(min=1)
