"""R-KV: keep what is important and not redundant, for long chains of thought."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimkv_kernels.policies._options import check_fraction, check_integer
from trimkv_kernels.policies.base import ModelShape, Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy
from trimkv_kernels.policies.snap_kv import (
    before_window,
    check_kernel_size,
    past_importance,
    pool_slots,
)

_ROWS = 128  # keys compared with all others at a time: memory stays linear in the slots


@register_policy("r_kv")
@dataclass(frozen=True)
class RKV(RetentionPolicy):
    """Importance minus redundancy (Cai et al., arXiv 2505.24133).

    Score ``mix * importance - (1 - mix) * redundancy`` of the slots before the last ``window``
    positions, which are always kept (+inf). Importance is SnapKV's decoding variant, the query
    heads' logits reduced by max, max-pooled; redundancy is :func:`key_redundancy`.

    There are two differences from the authors' code. Slots are in ascending position at every
    eviction; theirs are in the order of scores after the first, which changes what "latest" and
    "neighbour" mean. Each row of a batch has its own redundancy; theirs all use the first row's.

    Args:
        window: Last queries that vote, and last positions that are kept.
        kernel_size: Slots that importance is pooled over; odd, 1 for none.
        mix: Weight of importance, 0 to 1.
        threshold: Cosine above which two keys count as similar, 0 to 1.
        scale: Softmax scale. A model's own takes precedence; None is ``head_dim ** -0.5``.

    Raises:
        TypeError: ``window`` or ``kernel_size`` is not an integer.
        ValueError: a number is out of range.
    """

    window: int = 8
    kernel_size: int = 7
    mix: float = 0.1
    threshold: float = 0.5
    scale: float | None = None

    sinks = 0
    recent = 0

    def __post_init__(self) -> None:
        check_integer("window", self.window, minimum=1)
        check_kernel_size(self.kernel_size)
        check_fraction("mix", self.mix)
        check_fraction("threshold", self.threshold)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(score=("key",), query_window=self.window, chronological=True)

    def bind(self, shape: ModelShape) -> RKV:
        return self if shape.scale is None else replace(self, scale=shape.scale)

    def score(self, slots: SlotView) -> Tensor:
        past = before_window(slots, self.window)
        importance = past_importance(slots, past, group="max", scale=self.scale)
        importance = pool_slots(importance, past, self.kernel_size, pooling="max")
        redundancy = key_redundancy(slots.key, slots.valid, threshold=self.threshold)
        score = self.mix * importance - (1 - self.mix) * redundancy
        return score.masked_fill(~past, torch.inf)


def key_redundancy(key: Tensor, valid: Tensor, *, threshold: float) -> Tensor:
    """How similar each key is to the other keys of its head.

    ``C[i, j]`` are the cosines between the keys of a head. A key's cosine with itself counts as 0.
    So does the cosine of each key ``i`` with the latest ``j`` above ``threshold``, which spares the
    latest of several similar tokens. Redundancy is ``softmax_j(mean_i C[i, j])``.

    Args:
        key: ``[batch, num_kv_heads, num_slots, head_dim]``, any float dtype, in ascending position.
        valid: ``[batch, num_kv_heads, num_slots]`` bool; other slots take no part.
        threshold: At least 0.

    Returns:
        fp32 ``[batch, num_kv_heads, num_slots]``, sums to 1 over the valid slots.
    """
    key = key.float().masked_fill(~valid[..., None], 0.0)
    unit = key / (key.norm(dim=-1, keepdim=True) + 1e-8)
    slot = torch.arange(key.shape[2], device=key.device)
    total = torch.zeros_like(unit[..., 0])
    for row, rows in zip(slot.split(_ROWS), unit.split(_ROWS, dim=2), strict=True):
        cosine = rows @ unit.mT  # [batch, num_kv_heads, rows, num_slots]
        cosine.masked_fill_(row[:, None] == slot, 0.0)
        latest = torch.where(cosine > threshold, slot, -1).amax(dim=-1, keepdim=True)
        total += cosine.masked_fill_(slot == latest, 0.0).sum(dim=-2)
    mean = total / valid.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~valid, torch.finfo(mean.dtype).min).softmax(dim=-1)
