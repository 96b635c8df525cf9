"""The base tensors of one storage, as the ops take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Slots of several layers: room for ``num_slots`` pairs per head, packed at the front.

    Attributes:
        key: ``[layers, batch, num_kv_heads, num_slots, head_dim]``. What lies in slots that are not
            valid must be finite.
        value: As ``key``.
        position: ``[layers, batch, num_kv_heads, num_slots]`` int32, of each pair's token.
        num_valid: ``[layers, batch, num_kv_heads]`` int32; slots ``[0, num_valid)`` hold a pair.
        slope: Like ``position`` but fp32. With ``offset`` the affine score of a pair is
            ``slope * (t - position) + offset``; both None where scores are not affine.
        offset: As ``slope``.
        fields: More tensors ``[layers, batch, num_kv_heads, num_slots, ...]`` that belong to the
            pairs and move with them.
        nan_seen: ``[layers]`` int32, set to 1 where a score was NaN.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    num_valid: Tensor
    slope: Tensor | None = None
    offset: Tensor | None = None
    fields: tuple[Tensor, ...] = ()
    nan_seen: Tensor | None = None
