"""The base tensors of one storage, as the ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from trimkv_kernels.kernels.checks import FLOAT32, INT32, Shape
from trimkv_kernels.kernels.tensors import Tensors

_HEADS = "layers, batch, num_kv_heads"
_SLOTS = f"{_HEADS}, num_slots"


@dataclass(frozen=True)
class Slots(Tensors):
    """Slots of several layers: room for ``num_slots`` pairs per head, front-packed.

    A head may fill ``capacity`` of them and is full when ``num_valid >= capacity``; slots
    ``[0, num_valid)`` hold a pair. An op reads and writes only the tensors it declares.

    Attributes:
        key: ``[layers, batch, num_kv_heads, num_slots, head_dim]``. Slots that are not valid must
            hold finite numbers too.
        value: As ``key``.
        position: ``[layers, batch, num_kv_heads, num_slots]`` int32, of each pair's token.
        num_valid: ``[layers, batch, num_kv_heads]`` int32, never above ``capacity``.
        capacity: As ``num_valid``, at most ``num_slots``. Heads may differ.
        slope: Like ``position`` but fp32. With ``offset`` the affine score of a pair is
            ``slope * (t - position) + offset``; both None if scores are not affine.
        offset: As ``slope``.
        fields: More tensors ``[layers, batch, num_kv_heads, num_slots, ...]`` that belong to the
            pairs and move with them.
        nan_seen: ``[layers]`` int32, set to 1 if a score was NaN; None if this is not recorded.
    """

    key: Annotated[Tensor, Shape(f"{_SLOTS}, head_dim", dense=True)]
    value: Annotated[Tensor, Shape(f"{_SLOTS}, head_dim", dense=True)]
    position: Annotated[Tensor, Shape(_SLOTS, INT32, dense=True)]
    num_valid: Annotated[Tensor, Shape(_HEADS, INT32, dense=True)]
    capacity: Annotated[Tensor, Shape(_HEADS, INT32, dense=True)]
    slope: Annotated[Tensor | None, Shape(_SLOTS, FLOAT32, dense=True)] = None
    offset: Annotated[Tensor | None, Shape(_SLOTS, FLOAT32, dense=True)] = None
    fields: Annotated[tuple[Tensor, ...], Shape(f"{_SLOTS}, ...", dense=True)] = ()
    nan_seen: Annotated[Tensor | None, Shape("layers", INT32)] = None

    @classmethod
    def zeros(
        cls,
        layers: int,
        batch: int,
        num_kv_heads: int,
        num_slots: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        affine: bool = True,
        fields: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
    ) -> Slots:
        """Empty slots that every head may fill.

        Args:
            layers: Number of layers.
            batch: Number of rows.
            num_kv_heads: KV heads of a layer.
            num_slots: Slots of a head, and its capacity.
            head_dim: Elements of a head vector.
            dtype: Of keys and values.
            device: Where the tensors are made.
            affine: Whether there are ``slope`` and ``offset``.
            fields: Shape of one slot's entry and dtype, for each field.
        """

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        heads = (layers, batch, num_kv_heads)
        slots = (*heads, num_slots)
        return cls(
            key=zeros(*slots, head_dim, dtype=dtype),
            value=zeros(*slots, head_dim, dtype=dtype),
            position=zeros(*slots, dtype=torch.int32),
            num_valid=zeros(*heads, dtype=torch.int32),
            capacity=torch.full(heads, num_slots, dtype=torch.int32, device=device),
            slope=zeros(*slots) if affine else None,
            offset=zeros(*slots) if affine else None,
            fields=tuple(zeros(*slots, *inner, dtype=kind) for inner, kind in fields),
            nan_seen=zeros(layers, dtype=torch.int32),
        )

    @property
    def num_slots(self) -> int:
        """Slots of a head; its capacity may be smaller."""
        return self.position.shape[-1]

    def row_strides(self, rows: Tensor | None) -> tuple[int, int, int] | tuple[None, None, None]:
        """Elements from one row to the next: of pairs, of numbers of slots, of numbers of heads.

        Args:
            rows: Which rows a call picks. None: all of them, and no strides are needed.

        Raises:
            ValueError: there are several layers, or tensors that must have the same stride differ.
        """
        if rows is None:
            return None, None, None
        if len(self.num_valid) != 1:
            raise ValueError(f"slots must have one layer with rows=, got {len(self.num_valid)}")
        pair = _row_stride(key=self.key, value=self.value)
        slot = _row_stride(position=self.position, slope=self.slope, offset=self.offset)
        return pair, slot, _row_stride(num_valid=self.num_valid, capacity=self.capacity)

    def row(self, index: int) -> Slots:
        """Views of one row; all dimensions stay."""
        cut = replace(self, nan_seen=None).map(lambda tensor: tensor[:, index : index + 1])
        return replace(cut, nan_seen=self.nan_seen)

    def layer(self, index: int) -> Slots:
        """Views of one layer: every tensor without its first dimension."""
        return self.map(lambda tensor: tensor[index])


def _row_stride(**tensors: Tensor | None) -> int:
    """The one stride from row to row of tensors ``[layers, rows, ...]``."""
    strides = {name: x.stride(1) for name, x in tensors.items() if x is not None}
    if len(set(strides.values())) > 1:
        raise ValueError(
            f"{', '.join(strides)} must have the same stride from row to row, "
            f"got {', '.join(map(str, strides.values()))}"
        )
    return next(iter(strides.values()))
