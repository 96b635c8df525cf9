"""TOVA: keep the slots that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from trimkv_kernels.policies.base import AttentionStat, FieldSpec, Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy


@register_policy("tova")
@dataclass(frozen=True)
class TOVA(RetentionPolicy):
    """Token Omission Via Attention (Oren et al., arXiv 2401.06104).

    The score is the last query's attention probability, averaged over all heads of the layer, so
    that all of them keep the same positions. As in the authors' code, nothing is protected, not
    even the newest token.
    """

    # In ascending position, slot i holds the same position in every head.
    needs = Needs(attention=AttentionStat(queries=1, into="mass"), chronological=True)
    fields = MappingProxyType({"mass": FieldSpec()})
    sinks = 0
    recent = 0
    shardable = False

    def score(self, slots: SlotView) -> Tensor:
        mass = slots.fields["mass"]
        return mass.mean(dim=1, keepdim=True).expand_as(mass)
