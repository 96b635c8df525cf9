"""LagKV: keep what varies most, on the scale of the tokens that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.policies._options import check_integer
from trimkv_kernels.policies.base import Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy

_MIN_RANGE = 1e-12


@register_policy("lag_kv")
@dataclass(frozen=True)
class LagKV(RetentionPolicy):
    """Score each partition of slots relative to the next one (Liang et al., arXiv 2504.04704).

    In chronological order, the slots after the sinks form partitions; see :func:`partition_scores`.
    The score is the mean of the keys' and the values' scores. The sinks, the last full partition
    and the slots after it have no full partition behind them. They score 1, above all others.

    A bounded cache scores what it holds at each eviction. So tokens that were kept are partitioned
    anew, together with later ones. The authors' code scores a token once and keeps this score. A
    prompt is scored as in kvpress.

    Args:
        partition: Slots of a partition. kvpress has 128 and the authors 1024, for budgets of many
            thousands. Up to two partitions are always kept, so this should be well below the
            budget.
        cross_scoring: If True, slots of all partitions compete by score. If False, they compete by
            their rank in their partition, so each partition loses the same share.

    Raises:
        TypeError: ``partition`` is not an integer.
        ValueError: ``partition`` is below 2.
    """

    partition: int = 16
    cross_scoring: bool = False

    needs = Needs(score=("key", "value"), chronological=True)

    def __post_init__(self) -> None:
        check_integer("partition", self.partition, minimum=2)

    def score(self, slots: SlotView) -> Tensor:
        num_slots = slots.position.shape[-1]
        size = self.partition
        num_partitions = num_slots // size
        if num_partitions < 2:
            return torch.ones_like(slots.position, dtype=torch.float32)

        num_sinks = (slots.valid & (slots.position < self.sinks)).sum(-1, keepdim=True)
        index = torch.arange(num_slots, device=num_sinks.device)
        # [batch, num_kv_heads, num_partitions * size]: partitions begin after each head's own sinks
        partitioned = (num_sinks + index[: num_partitions * size]).clamp(max=num_slots - 1)

        def scores_of(states: Tensor) -> Tensor:
            states = torch.take_along_dim(states.float(), partitioned[..., None], dim=2)
            return partition_scores(states.unflatten(2, (num_partitions, size)))

        scores = (scores_of(slots.key) + scores_of(slots.value)) / 2
        if not self.cross_scoring:
            scores = scores.argsort(dim=-1, stable=True).argsort(dim=-1) / size

        last = (num_partitions - 1) * size - 1
        offset = index - num_sinks
        own = torch.take_along_dim(scores.flatten(2), offset.clamp(0, last), -1)
        num_full = (slots.valid.sum(-1, keepdim=True) - num_sinks) // size
        is_scored = (offset >= 0) & (offset < (num_full - 1) * size)
        return torch.where(is_scored, own, 1.0)


def partition_scores(states: Tensor) -> Tensor:
    """Score the slots of each partition on the scale of the next partition.

    Each channel is mapped to ``(x - min) / (max - min)`` with the next partition's extremes, or to
    0 if the channel is constant there. The score is the standard deviation over channels, after a
    softmax over the partition.

    Args:
        states: ``[..., num_partitions, size, head_dim]`` fp32, keys or values in token order.

    Returns:
        ``[..., num_partitions - 1, size]``; the last partition has none.
    """
    reference = states[..., 1:, :, :]
    low = reference.amin(dim=-2, keepdim=True)
    extent = reference.amax(dim=-2, keepdim=True) - low
    scaled = (states[..., :-1, :, :] - low) / extent
    scaled = torch.where(extent > _MIN_RANGE, scaled, 0.0)
    return scaled.std(dim=-1).softmax(dim=-1)
