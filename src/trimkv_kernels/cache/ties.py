"""Scores that would be equal without rounding count as equal.

The same token has the same key norm and the same gate score at every position. Computed in another
batch or at another position, the last bits differ. The rule for ties, that the newer token stays,
would then not apply. So scores whose distance may come from rounding count as equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative distance below which two scores count as equal, by the dtype of keys and values: a few
# dozen times what rounding does to a norm or a dot product of them.
_TOLERANCE = {torch.float32: 2.0**-16, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
_OF_LARGEST = 2.0**-6  # part of it that applies to a head's largest score: sums carry its rounding
_DROPPED_BITS = 14  # of a float32 mantissa's 23, if scores are compared on the device


@dataclass(frozen=True)
class Ties:
    """Makes scores equal to the lowest score that stays if they are as good as equal to it.

    Args:
        sinks, recent: First and last positions that are never evicted.
        dtype: Of keys and values.
    """

    sinks: int
    recent: int
    dtype: torch.dtype

    def settled(
        self, scores: Tensor, valid: Tensor, position: Tensor, t: Tensor, budget: int
    ) -> Tensor:
        """Scores, where those close to the lowest one that stays are set to it.

        Args:
            scores: ``[batch, num_kv_heads, candidates]`` fp32.
            valid: The same shape, bool.
            position: The same shape, int32.
            t: ``[batch]`` int32, tokens seen.
            budget: Candidates of each head that stay.
        """
        if scores.shape[-1] <= budget:
            return scores
        protected = (position < self.sinks) | (position >= (t - self.recent)[:, None, None])
        ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        ranked = ranked.masked_fill(protected, torch.inf).masked_fill(~valid, -torch.inf)
        line = ranked.topk(budget, dim=-1).values[..., -1:]
        largest = ranked.abs().masked_fill(ranked.isinf(), 0.0).amax(dim=-1, keepdim=True)
        near = _TOLERANCE[self.dtype] * torch.maximum(line.abs(), _OF_LARGEST * largest)
        is_near = ((ranked - line).abs() <= near) & line.isfinite()
        return torch.where(is_near, line, scores)


def rounded(offset: Tensor) -> Tensor:
    """fp32 numbers rounded to nine bits after the leading one, to remove earlier rounding."""
    half = 1 << (_DROPPED_BITS - 1)
    bits = offset.contiguous().view(torch.int32) + half
    return (bits & -(1 << _DROPPED_BITS)).view(torch.float32)
