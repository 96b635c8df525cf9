"""Random: the baseline that any policy has to beat."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimkv_kernels.policies.base import ModelShape, RetentionPolicy, TokenView
from trimkv_kernels.policies.registry import register_policy

_BITS = 24  # as many as a float32 holds exactly


@register_policy("random")
@dataclass(frozen=True)
class Random(RetentionPolicy):
    """Keep a uniform sample of everything seen: score ~ U(0, 1), drawn once per token and head.

    Because scores are drawn once, the kept set is a reservoir sample. Scores drawn anew at each
    eviction would favour recent tokens geometrically. A score is a hash of (seed, layer, head,
    position), so it needs no generator state and does not depend on the batch.

    Args:
        seed: Chooses the sample.
    """

    seed: int = 0

    _first_head: ClassVar[int] = 0  # of this process's KV heads, in the layer

    def bind(self, shape: ModelShape) -> Random:
        if not shape.kv_head_offset:
            return self
        bound = copy.copy(self)
        object.__setattr__(bound, "_first_head", shape.kv_head_offset)
        return bound

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        position = tokens.position[:, None].long()  # [batch, 1, new]
        head = torch.arange(tokens.num_kv_heads, device=position.device)[None, :, None]
        head = head + self._first_head
        counter = (position << 12) + head + (tokens.layer << 44) + self.seed * 0x5DEECE66D
        uniform = (_mix(counter) & ((1 << _BITS) - 1)).float() / (1 << _BITS)
        return torch.zeros_like(uniform), uniform


def _mix(x: Tensor) -> Tensor:
    """Bijective 64-bit hash (the splitmix64 finaliser), on wrapping int64."""
    x = x + _INCREMENT
    x = (x ^ _shift(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift(x, 27)) * _MULTIPLIER_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic; the mask makes this one logical
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
