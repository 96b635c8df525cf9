"""CriticalKV: attention weighted by how far the value moves the layer's output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from trimkv_kernels.policies._options import check_fraction
from trimkv_kernels.policies.base import (
    FieldSpec,
    ModelShape,
    Needs,
    RetentionPolicy,
    SlotView,
    TokenView,
)
from trimkv_kernels.policies.registry import register_policy
from trimkv_kernels.policies.snap_kv import SnapKV
from trimkv_kernels.policies.wrapper import Wrapper

_BLOCK_ELEMENTS = 1 << 24  # of projected values that exist at once


@register_policy("critical_kv")
@dataclass(frozen=True, eq=False)
class CriticalKV(Wrapper):
    """Two stages of choice (Feng et al., arXiv 2502.03805).

    The ``int(budget * ratio)`` highest scores of the base stay, in their order and above all else.
    The rest scores ``(base + eps) * norm``. Here ``norm`` is ``||W_o value||_1``, where ``W_o`` is
    a head's columns of the output projection, averaged over the query heads of the group. A larger
    budget keeps all that a smaller one keeps. Scores of different heads are not comparable.

    The norm is computed once, at insertion: a product with the output projection for each token.

    Args:
        base: Policy whose scores are not negative and contain no value norm, such as ``SnapKV``,
            which the paper uses, or ``H2O``.
        ratio: Share of the budget that the first stage fills.
        eps: Added to the base's scores in the second stage.
        output_weights: Of each layer, ``[hidden_size, num_heads * head_dim]``. Only needed without
            a model; a model's weights take precedence.

    Raises:
        TypeError: ``base`` is not a policy.
        ValueError: ``ratio`` is outside of [0, 1], ``eps`` is negative, or ``base`` has a field
            ``output_norm``.
    """

    base: RetentionPolicy = field(default_factory=SnapKV)
    ratio: float = 0.5
    eps: float = 1e-4
    output_weights: tuple[Tensor, ...] | None = field(default=None, repr=False)

    own_needs: ClassVar = Needs(insert=("value",))
    own_fields: ClassVar = {"output_norm": FieldSpec()}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("ratio", self.ratio)
        if self.eps < 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")

    @classmethod
    def example(cls, shape: ModelShape) -> CriticalKV:
        num_heads = shape.num_heads or shape.num_kv_heads
        columns = num_heads * shape.head_dim
        size = (shape.num_layers, shape.hidden_size or columns, columns)
        weights = torch.randn(size, generator=torch.Generator().manual_seed(0))
        return cls(output_weights=tuple(weights.to(shape.device, shape.dtype)))

    def bind(self, shape: ModelShape) -> CriticalKV:
        given = shape.output_weights
        weights = self.output_weights if given is None else tuple(given)
        if weights is None:
            raise ValueError(
                "policy 'critical_kv' needs the output projections, and no model gives them: "
                "pass CriticalKV(output_weights=...)"
            )
        group_columns = shape.num_kv_heads * shape.head_dim
        columns = None if shape.num_heads is None else shape.num_heads * shape.head_dim
        fit = all(
            weight.dim() == 2
            and weight.shape[1] % group_columns == 0
            and columns in (None, weight.shape[1])
            for weight in weights
        )
        if len(weights) != shape.num_layers or not fit:
            raise ValueError(
                f"output_weights must be {shape.num_layers} tensors "
                f"[hidden_size, {columns or f'a multiple of {group_columns}'}], "
                f"got {[list(weight.shape) for weight in weights]}"
            )
        return replace(super().bind(shape), output_weights=weights)

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        if self.output_weights is None:
            raise ValueError("policy 'critical_kv' is not bound: call bind(shape) first")
        norm = output_norm(tokens.value, self.output_weights[tokens.layer])
        # not 0: a base's +inf times 0 would be NaN
        norm = norm.clamp(min=torch.finfo(torch.float32).tiny)
        return super().on_insert(tokens) | {"output_norm": norm}

    def score(self, slots: SlotView) -> Tensor:
        base = self.base_score(slots)
        second = (base + self.eps) * slots.fields["output_norm"]
        first_stage = int(slots.budget * self.ratio)
        if first_stage == 0:
            return second
        rank = _rank(base.masked_fill(~slots.valid, -math.inf), slots.position)
        finite = slots.valid & second.isfinite()
        ceiling = second.masked_fill(~finite, 0).amax(dim=-1, keepdim=True).clamp(min=1)
        lifted = (ceiling * (2 - rank / first_stage)).maximum(second)
        return torch.where(rank < first_stage, lifted, second)


@torch.no_grad()
def output_norm(value: Tensor, weight: Tensor) -> Tensor:
    """``||W_o value||_1``, mean over the query heads that share a KV head.

    Args:
        value: ``[batch, num_kv_heads, tokens, head_dim]``.
        weight: ``[hidden_size, num_heads * head_dim]``; query head ``q`` uses the columns
            ``q * head_dim`` to ``(q + 1) * head_dim``.

    Returns:
        fp32 ``[batch, num_kv_heads, tokens]``.
    """
    batch, num_kv_heads, _, head_dim = value.shape
    heads = weight.unflatten(1, (num_kv_heads, -1, head_dim))
    block = max(1, _BLOCK_ELEMENTS // (batch * weight.shape[0] * weight.shape[1] // head_dim))
    norms = []
    for part in value.to(weight.dtype).split(block, dim=2):
        projected = torch.einsum("bhsd,ohgd->bhsgo", part, heads)
        norms.append(vector_norm(projected, ord=1, dim=-1, dtype=torch.float32).mean(dim=-1))
    return torch.cat(norms, dim=2)


def _rank(score: Tensor, position: Tensor) -> Tensor:
    """Rank of each slot, 0 for the highest score. Of equal scores the newer token comes first."""
    by_age = position.argsort(dim=-1, descending=True, stable=True)
    order = score.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True)
    return by_age.gather(-1, order).argsort(dim=-1)
