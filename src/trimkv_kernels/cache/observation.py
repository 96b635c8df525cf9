"""What attention reports about each slot, in the form of a policy's ``AttentionStat``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from trimkv_kernels.policies.base import AttentionStat


@dataclass(frozen=True)
class Observation:
    """How a statistic is computed from what the kernels report.

    Args:
        stat: What the policy asks for.
        num_kv_heads: KV heads of a layer.
    """

    stat: AttentionStat
    num_kv_heads: int

    @property
    def reduce(self) -> str:
        """How a kernel reduces over the query heads of a group."""
        return "mean" if self.stat.group == "all_heads" else self.stat.group

    @property
    def accumulates(self) -> bool:
        """Whether a decode step adds to a field instead of overwriting it."""
        return self.stat.into is not None and self.stat.queries == "all"

    @property
    def counts_below(self) -> bool:
        return self.stat.reduce == "count_below"

    def last_queries(self, new: int) -> int:
        """How many of a call's ``new`` last queries count."""
        return new if self.stat.queries == "all" else min(self.stat.queries, new)

    def over_heads(self, attention: Tensor) -> Tensor:
        """A kernel's ``[batch, heads, slots]`` in the shape that policies are given."""
        if self.stat.group == "none":
            return rearrange(attention, "b (h g) n -> b h n g", h=self.num_kv_heads)
        if self.stat.group == "all_heads":
            return attention.mean(dim=1, keepdim=True).expand_as(attention)
        return attention

    def of_step(self, mass: Tensor, valid: Tensor, num_valid: Tensor, real: Tensor) -> Tensor:
        """The statistic of one query.

        Args:
            mass: ``[batch, heads, num_slots]`` fp32, the query's probabilities.
            valid: ``[batch, num_kv_heads, num_slots]`` bool, the valid slots.
            num_valid: ``[batch, num_kv_heads]`` int32.
            real: ``[batch, 1]`` bool, False where the query is padding.
        """
        attention = self.over_heads(mass)
        if not self.counts_below:
            return attention
        seen = valid & real[:, None]
        share = num_valid.clamp(min=1).float().reciprocal()[:, :, None]
        if self.stat.group == "none":
            seen, share = seen[..., None], share[..., None]
        return ((attention < share) & seen).float()

    def num_queries(self, real: Tensor) -> Tensor:
        """``[batch]`` int32, the real queries that a call's statistic covers."""
        return real[:, -self.last_queries(real.shape[1]) :].sum(dim=1, dtype=torch.int32)
