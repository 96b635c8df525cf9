"""H2O: keep the heavy hitters, the slots that have received most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from trimkv_kernels.policies._options import check_choice
from trimkv_kernels.policies.base import AttentionStat, FieldSpec, Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy


@register_policy("h2o")
@dataclass(frozen=True)
class H2O(RetentionPolicy):
    """Heavy-Hitter Oracle (Zhang et al., arXiv 2306.14048): score = ``sum_i A[i, slot]``.

    ``A[i, slot]`` is the attention probability that query ``i`` gave the slot; the sum runs over
    all queries since the slot was filled. In the paper each query head has its own cache. Here
    query heads that share a KV head have one score. Heavy hitters share the budget with the most
    recent tokens. The authors give each half of it: ``recent=budget // 2``.

    Args:
        group: Reduction over the query heads that share a KV head.
        normalize: Divide by the ``t - position`` queries that could see the slot, as kvpress does,
            so that old slots are not kept for their age.

    Raises:
        ValueError: ``group`` is not one of those named.
    """

    group: Literal["mean", "max"] = "mean"
    normalize: bool = False

    fields = MappingProxyType({"mass": FieldSpec()})
    sinks = 0

    def __post_init__(self) -> None:
        check_choice("group", self.group, ("mean", "max"))

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(attention=AttentionStat(group=self.group, into="mass"))

    def score(self, slots: SlotView) -> Tensor:
        mass = slots.fields["mass"]
        if not self.normalize:
            return mass
        return mass / (slots.t[:, None, None] - slots.position).clamp(min=1)
