"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.policies.base import RetentionPolicy, TokenView
from trimkv_kernels.policies.registry import register_policy


@register_policy("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(RetentionPolicy):
    """Keep the first tokens and the most recent ones (Xiao et al., arXiv 2309.17453).

    The score is ``-(t - position)``, and 4 sinks are protected. Keys keep their original RoPE
    positions; the authors' code rotates at cache positions instead.
    """

    sinks = 4
    recent = 0

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        zero = tokens.position.new_zeros(1, dtype=torch.float32)
        return zero - 1, zero
