"""VATP: attention weighted by the size of the value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from trimkv_kernels.policies.base import FieldSpec, Needs, RetentionPolicy, SlotView, TokenView
from trimkv_kernels.policies.h2o import H2O
from trimkv_kernels.policies.registry import register_policy
from trimkv_kernels.policies.wrapper import Wrapper


@register_policy("vatp")
@dataclass(frozen=True, eq=False)
class VATP(Wrapper):
    """Weigh scores with values (Guo et al., arXiv 2406.12335): score = ``base * ||value||_1``.

    Args:
        base: Policy whose scores are not negative, such as ``H2O`` or ``Scissorhands``.

    Raises:
        TypeError: ``base`` is not a policy.
        ValueError: ``base`` has a field ``value_norm``.
    """

    base: RetentionPolicy = field(default_factory=H2O)

    own_needs: ClassVar = Needs(insert=("value",))
    own_fields: ClassVar = {"value_norm": FieldSpec()}

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        norm = tokens.value.float().abs().sum(dim=-1)
        # not 0: a base's +inf times 0 would be NaN
        norm = norm.clamp(min=torch.finfo(torch.float32).tiny)
        return super().on_insert(tokens) | {"value_norm": norm}

    def score(self, slots: SlotView) -> Tensor:
        return self.base_score(slots) * slots.fields["value_norm"]
