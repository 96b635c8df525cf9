"""The base tensors of a paged storage, as the ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor

from trimkv_kernels.kernels.checks import FLOAT32, INT32, Shape
from trimkv_kernels.kernels.tensors import Tensors

PAGE = 16  # slots

_ROWS = "scopes, batch"
_SLOTS = f"{_ROWS}, num_slots"


@dataclass(frozen=True)
class Pages(Tensors):
    """Slots of heads that share a budget, in pages of 16.

    A *scope* is a set of heads with one budget: the heads of a layer, or of all layers in order. A
    head's slots are its pages in the order of ``page``, filled from the front. Every token adds one
    pair to every head, so a head holds ``kept + t - cut`` pairs, if its row has stored ``t``
    tokens. Only an eviction changes the tables.

    Attributes:
        key: ``[scopes, batch, num_slots, head_dim]``. Slots that are not valid must hold finite
            numbers too.
        value: As ``key``.
        position: ``[scopes, batch, num_slots]`` int32, of each pair's token.
        page: ``[scopes, batch, pages]`` int32, a permutation of a row's own pages: the pages of the
            first head, of the second and so on, then the free pages.
        first_page: ``[scopes, batch, heads + 1]`` int32, where each head's pages begin in ``page``.
        kept: ``[scopes, batch, heads]`` int32, the pairs of each head at the last eviction.
        cut: ``[scopes, batch]`` int32, ``t`` of that eviction.
        slope: Like ``position`` but fp32. With ``offset`` the affine score of a pair is
            ``slope * (t - position) + offset``; both None if scores are not affine.
        offset: As ``slope``.
        fields: More tensors ``[scopes, batch, num_slots, ...]`` that belong to the pairs.
        nan_seen: ``[scopes, heads]`` int32, 1 if a score was NaN; None if this is not recorded.
    """

    key: Annotated[Tensor, Shape(f"{_SLOTS}, head_dim", dense=True)]
    value: Annotated[Tensor, Shape(f"{_SLOTS}, head_dim", dense=True)]
    position: Annotated[Tensor, Shape(_SLOTS, INT32, dense=True)]
    page: Annotated[Tensor, Shape(f"{_ROWS}, pages", INT32, dense=True)]
    first_page: Annotated[Tensor, Shape(f"{_ROWS}, bounds", INT32, dense=True)]
    kept: Annotated[Tensor, Shape(f"{_ROWS}, heads", INT32, dense=True)]
    cut: Annotated[Tensor, Shape(_ROWS, INT32, dense=True)]
    slope: Annotated[Tensor | None, Shape(_SLOTS, FLOAT32, dense=True)] = None
    offset: Annotated[Tensor | None, Shape(_SLOTS, FLOAT32, dense=True)] = None
    fields: Annotated[tuple[Tensor, ...], Shape(f"{_SLOTS}, ...", dense=True)] = ()
    nan_seen: Annotated[Tensor | None, Shape("scopes, heads", INT32, dense=True)] = None

    @classmethod
    def zeros(
        cls,
        scopes: int,
        batch: int,
        heads: int,
        budget: int,
        buffer: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        affine: bool = True,
        fields: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
    ) -> Pages:
        """Empty pages for ``heads * (budget + buffer)`` pairs in each scope and row.

        Args:
            scopes: Sets of heads that share a budget.
            batch: Number of rows.
            heads: Heads of a scope.
            budget: Pairs that a head keeps, on average.
            buffer: New tokens between evictions.
            head_dim: Elements of a head vector.
            dtype: Of keys and values.
            device: Where the tensors are made.
            affine: Whether there are ``slope`` and ``offset``.
            fields: Shape of one slot's entry and dtype, for each field.
        """
        pages = num_pages(heads, budget, buffer)
        rows = (scopes, batch)
        slots = (*rows, pages * PAGE)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        made = cls(
            key=zeros(*slots, head_dim, dtype=dtype),
            value=zeros(*slots, head_dim, dtype=dtype),
            position=zeros(*slots, dtype=torch.int32),
            page=zeros(*rows, pages, dtype=torch.int32),
            first_page=zeros(*rows, heads + 1, dtype=torch.int32),
            kept=zeros(*rows, heads, dtype=torch.int32),
            cut=zeros(*rows, dtype=torch.int32),
            slope=zeros(*slots) if affine else None,
            offset=zeros(*slots) if affine else None,
            fields=tuple(zeros(*slots, *inner, dtype=kind) for inner, kind in fields),
            nan_seen=zeros(scopes, heads, dtype=torch.int32),
        )
        made.clear(slice(None), budget, buffer)
        return made

    @property
    def num_heads(self) -> int:
        """Heads of a scope."""
        return self.kept.shape[2]

    def clear(self, rows: Tensor | slice, budget: int, buffer: int) -> None:
        """Empty some rows. Their slots keep their old contents."""
        device = self.page.device
        own = -(-(budget + buffer) // PAGE)
        self.page[:, rows] = torch.arange(self.page.shape[2], dtype=torch.int32, device=device)
        bounds = torch.arange(self.first_page.shape[2], dtype=torch.int32, device=device)
        self.first_page[:, rows] = bounds * own
        self.kept[:, rows] = 0
        self.cut[:, rows] = 0

    def place(self, layer: int, num_kv_heads: int) -> tuple[int, slice]:
        """The scope of a layer, and its heads there."""
        scope, first = divmod(layer * num_kv_heads, self.num_heads)
        return scope, slice(first, first + num_kv_heads)

    def num_valid(self, t: Tensor) -> Tensor:
        """``[scopes, batch, heads]`` int32, the pairs of each head after ``t`` stored tokens."""
        return self.kept + (t - self.cut)[..., None]

    def full_rows(self, t: Tensor, budget: int, buffer: int) -> Tensor:
        """``[scopes, batch]`` bool: whether a scope has filled its budget and buffer."""
        return self.num_valid(t).sum(dim=-1) >= self.num_heads * (budget + buffer)

    def addresses(self, index: Tensor) -> Tensor:
        """The slots' indices in their row, from their indices in the order of the page table.

        Args:
            index: ``[scopes, batch, n]`` int64, 16 to a page.
        """
        return self.page.gather(2, index // PAGE).long() * PAGE + index % PAGE

    def slot_rows(self, layer: int, slot: Tensor) -> Tensor:
        """Row indices of slots, after scope, row and slot are flattened into one dimension.

        Args:
            layer: The layer.
            slot: ``[batch, num_kv_heads, n]``, slots of each head. If a head does not have a slot,
                the index of some other slot is returned.

        Returns:
            Like ``slot``, int64.
        """
        scope, heads = self.place(layer, slot.shape[1])
        one, num_slots = self.scope(scope), self.position.shape[2]
        index = one.first_page[0, :, heads, None].long() * PAGE + slot
        index = index.clamp(min=0, max=num_slots - 1)
        row = torch.arange(slot.shape[0], device=slot.device)[:, None, None]
        address = one.addresses(index.flatten(1)[None]).view(index.shape)
        return (scope * slot.shape[0] + row) * num_slots + address

    def scope(self, index: int) -> Pages:
        """Views of one scope, which stays the first dimension."""
        return self.map(lambda tensor: tensor[index : index + 1])


def num_pages(heads: int, budget: int, buffer: int) -> int:
    """Pages of a scope in each row: enough for any way to share the budget."""
    return heads * (budget + buffer + PAGE) // PAGE


@dataclass(frozen=True)
class ShareRule:
    """How the heads of a scope share its budget.

    A scope of ``n`` heads is full when it holds ``n * (budget + buffer)`` pairs, and keeps at most
    ``n * budget``. A head gets as many as it has among the ``n * (budget - min_per_head)`` best
    pairs of the scope, mixed with an ``equal`` share, and ``min_per_head`` more. With a
    ``threshold`` it keeps its best ``min_per_head`` and all pairs that score at least the
    threshold, within the budget of the scope. With a ``table`` it keeps as many as the table says.

    Attributes:
        budget: Pairs that a head keeps, on average.
        buffer: New tokens between evictions, if the whole budget is used.
        min_per_head: Pairs that each head gets in addition to its share.
        equal: Fraction of the budget that is shared out equally.
        threshold: Lowest score that stays, or None.
        table: ``[batch, heads]`` int32, or None.
    """

    budget: int
    buffer: int
    min_per_head: int = 0
    equal: float = 0.0
    threshold: float | None = None
    table: Tensor | None = None

    def options(self) -> dict[str, Any]:
        """The rule as arguments of the ops."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def gather_slots(tensor: Tensor, rows: Tensor) -> Tensor:
    """The ``rows`` of a tensor of pages, as ``[batch, num_kv_heads, n, ...]``."""
    return tensor.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def deal(kept: Tensor, budget: int, buffer: int) -> Tensor:
    """Where each head's pages begin, if it holds ``kept`` pairs and all heads grow in step.

    Args:
        kept: ``[..., heads]`` int32. The sum is less than ``heads * (budget + buffer)``.
        budget: Pairs that a head keeps, on average.
        buffer: New tokens between evictions, if the whole budget is used.

    Returns:
        ``[..., heads + 1]`` int32: room for the tokens until the scope is full.
    """
    heads = kept.shape[-1]
    room = heads * (budget + buffer) - kept.sum(dim=-1, keepdim=True)
    growth = (room + heads - 1) // heads
    own = (kept + growth + PAGE - 1) // PAGE
    return torch.nn.functional.pad(own.cumsum(dim=-1), (1, 0)).to(torch.int32)
