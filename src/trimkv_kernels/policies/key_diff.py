"""KeyDiff: keep keys that point away from the mean key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from trimkv_kernels.policies.base import Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy


@register_policy("key_diff")
@dataclass(frozen=True)
class KeyDiff(RetentionPolicy):
    """Keep dissimilar keys (Park et al., arXiv 2504.15364): score = ``-cos(key, anchor)``.

    The anchor of a KV head is the mean of its unit keys, after RoPE, over all its slots. The cosine
    is 0 if there is no angle (a zero key, or unit keys that cancel). The anchor depends on what is
    kept, so every eviction computes it anew.
    """

    needs = Needs(score=("key",))
    sinks = 0
    recent = 0

    def score(self, slots: SlotView) -> Tensor:
        unit_key = normalize(slots.key.float(), dim=-1)
        anchor = unit_key.masked_fill(~slots.valid[..., None], 0).sum(dim=-2)
        return -(unit_key * normalize(anchor, dim=-1)[..., None, :]).sum(dim=-1)
