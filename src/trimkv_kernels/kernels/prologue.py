"""What the launch of a decode step can do to its token before it attends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels.checks import FLOAT_DTYPES, Shape
from trimkv_kernels.kernels.launch import dense

LOWEST_SLOPE = -1e28  # in place of -inf: multiplied by any age it is still finite in fp32


@dataclass(frozen=True)
class Rope:
    """A norm of each query and key head, if there are weights, then their rotary embedding.

    As Llama, Mistral, Qwen2 and Qwen3 do it: ``weight * x / rms(x)``; then the two halves of a
    vector are rotated, over all of its dimensions. It is computed in fp32 and rounded once.

    Attributes:
        cos: ``[batch, head_dim]``, dtype of the query, at each row's position, as the model
            computes it; in a call of several tokens ``[batch, q_len, head_dim]``.
        sin: As ``cos``, with the same strides.
        query_weight: ``[head_dim]``, dtype of the query, of the queries' norm; None: no norm.
        key_weight: Likewise of the keys' norm. Both or neither.
        eps: Added to the mean square in the norms.
    """

    cos: Annotated[Tensor, Shape("batch, head_dim", rows=True)]
    sin: Annotated[Tensor, Shape("batch, head_dim", rows=True)]
    query_weight: Annotated[Tensor | None, Shape("head_dim", dense=True)] = None
    key_weight: Annotated[Tensor | None, Shape("head_dim", dense=True)] = None
    eps: float = 0.0

    def check(self) -> None:
        """Check what shapes do not say.

        Raises:
            ValueError: one norm without the other, an odd ``head_dim``, or other strides in ``sin``
                than in ``cos``.
        """
        if (self.query_weight is None) != (self.key_weight is None):
            raise ValueError("query_weight and key_weight of rope must both be given, or neither")
        if self.cos.shape[-1] % 2:
            raise ValueError(f"head_dim must be even with rope=, got {self.cos.shape[-1]}")
        if self.cos.stride() != self.sin.stride():
            raise ValueError(
                f"cos and sin must have the same strides, got {self.cos.stride()} and "
                f"{self.sin.stride()}"
            )

    def of_step(self) -> Rope:
        """The only token's, from ``[batch, 1, head_dim]``."""
        return replace(self, cos=self.cos[:, 0], sin=self.sin[:, 0])

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[batch, heads, ..., head_dim]`` after the norms."""
        return self._normed(query, self.query_weight), self._normed(key, self.key_weight)

    def applied(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[batch, heads, ..., head_dim]`` after the norms and the rotation."""
        return self._rotated(query, self.query_weight), self._rotated(key, self.key_weight)

    def _normed(self, states: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return states
        return self._norm(states.float(), weight).to(states.dtype)

    def _rotated(self, states: Tensor, weight: Tensor | None) -> Tensor:
        normed = states.float() if weight is None else self._norm(states.float(), weight)
        first, second = normed.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        cos, sin = self.cos[:, None].float(), self.sin[:, None].float()
        return (normed * cos + turned * sin).to(states.dtype)

    def _norm(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, states.shape[-1:], weight.float(), self.eps)


@dataclass(frozen=True)
class Decay:
    """What a retention gate says of a token, before its last steps.

    The token's slope is ``logsigmoid(logit + bias)`` and its offset ``slope * age_offset``
    (Bui et al., arXiv 2512.03324), both fp32.

    Attributes:
        logit: ``[batch, num_kv_heads]``, fp32, fp16 or bf16.
        bias: ``[num_kv_heads]``, fp32, fp16 or bf16; added in fp32.
        age_offset: Steps added to the age of a pair.
    """

    logit: Annotated[Tensor, Shape("batch, num_kv_heads", FLOAT_DTYPES)]
    bias: Annotated[Tensor, Shape("num_kv_heads", FLOAT_DTYPES)]
    age_offset: int = 1

    def terms(self) -> tuple[Tensor, Tensor]:
        """``(slope, offset)``, each ``[batch, num_kv_heads]`` fp32."""
        slope = F.logsigmoid(self.logit.float() + self.bias.float()).clamp(min=LOWEST_SLOPE)
        return slope, slope * self.age_offset


def check_prologue(
    rope: Rope | None, decay: Decay | None, terms: Mapping[str, Tensor | None]
) -> None:
    """Check what shapes do not say.

    Args:
        rope: The op's.
        decay: The op's.
        terms: ``slope`` and ``offset`` of the slots, ``new_slope`` and ``new_offset``.

    Raises:
        ValueError: only some of them were given, ``decay`` beside the last two, one norm without
            the other, an odd ``head_dim``, or other strides in ``sin`` than in ``cos``.
    """
    if rope is not None:
        rope.check()
    wanted = dict(terms)
    if decay is not None:
        new = [wanted.pop(name) for name in ("new_slope", "new_offset")]
        if new != [None, None]:
            raise ValueError("new_slope and new_offset must be None with decay=, which gives both")
    missing = [name for name, tensor in wanted.items() if tensor is None]
    if missing and (decay is not None or len(missing) < len(wanted)):
        together = ", ".join([*wanted, *(() if decay is None else ("decay",))])
        raise ValueError(f"{together} must be given together, got None for {', '.join(missing)}")


def launch_arguments(
    new_slope: Tensor | None, new_offset: Tensor | None, rope: Rope | None, decay: Decay | None
) -> tuple[Any, ...]:
    """What the kernels take of them, in their order.

    Slope and offset are often one number for all heads, and are not copied into a tensor of all.
    """
    terms = (
        *(new_slope, new_offset),
        *((None, None) if new_slope is None else new_slope.stride()),
        *((None, None) if new_offset is None else new_offset.stride()),
    )
    gate = bias = age_offset = None
    if decay is not None:
        gate, bias = dense(decay.logit, decay.bias)
        age_offset = decay.age_offset
    if rope is None:
        return *terms, gate, bias, None, None, None, None, None, age_offset, None
    weights = rope.query_weight, rope.key_weight
    turn = rope.cos, rope.sin, *weights, rope.eps
    return *terms, gate, bias, *turn, age_offset, rope.cos.stride(0)
