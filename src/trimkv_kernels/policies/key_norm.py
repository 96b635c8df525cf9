"""Key norm: keep small keys, because they tend to receive attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimkv_kernels.policies._options import check_choice
from trimkv_kernels.policies.base import Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy


@register_policy("key_norm")
@dataclass(frozen=True)
class KeyNorm(RetentionPolicy):
    """Keep small keys (Devoto et al., arXiv 2406.11430): score = ``-||key||_2``, after RoPE.

    Args:
        keep: ``"small"`` or ``"large"`` keys. TRIM-KV's key-norm variant prefers large ones.

    Raises:
        ValueError: ``keep`` is neither.
    """

    keep: Literal["small", "large"] = "small"

    needs = Needs(score=("key",))

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("small", "large"))

    def score(self, slots: SlotView) -> Tensor:
        norm = slots.key.float().norm(dim=-1)
        return norm if self.keep == "large" else -norm
