"""Key norm: small keys draw attention, so they stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimkv_kernels.policies.base import Needs, RetentionPolicy, SlotView, register_policy


@register_policy("key_norm")
@dataclass(frozen=True)
class KeyNorm(RetentionPolicy):
    """Keep small keys (Devoto et al., arXiv 2406.11430): score = ``-||key||_2``, after RoPE."""

    needs = Needs(score=("key",))

    def score(self, slots: SlotView) -> Tensor:
        return -slots.key.float().norm(dim=-1)
