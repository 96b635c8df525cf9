"""The full cache, as a policy: what every other one is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.policies.base import RetentionPolicy, TokenView
from trimkv_kernels.policies.registry import register_policy


@register_policy("full")
@dataclass(frozen=True)
class Full(RetentionPolicy):
    """Keep everything: the budget is a capacity, and a call that would exceed it raises.

    Score 0. Give ``budget`` at least the number of tokens the sequence will ever have.
    """

    sinks = 0
    recent = 0
    capacity_only = True

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        zero = tokens.position.new_zeros(1, dtype=torch.float32)
        return zero, zero
