"""What a cache needs of the object that stores its pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Call, NewTokens, Pool
from trimkv_kernels.cache.counts import Extent


class Storage(Protocol):
    """The slots of some layers on one device. It stores pairs; it does not choose among them.

    A layer is given by its number in the model, and a row by its index in the batch. Every tensor
    keeps its address until :meth:`select`. ``t`` ``[batch]`` int32 is the number of tokens that the
    rows have seen. If a method says so, it counts only the tokens that are in the slots.

    Attributes:
        layers: The layers, ascending.
        device: Where they are.
        budget: Pairs of each head that survive an eviction, on average.
        least: Pairs that each head keeps in any case; protected pairs are fewer.
        num_slots: Slots of each head, on average.
        is_exact: Whether a full row holds exactly ``budget`` pairs per head after it was cut.
        is_compileable: Whether a step reads nothing back to the host.
        fuses: Whether :meth:`append` takes tokens with ``rope`` and ``decay``.
    """

    layers: tuple[int, ...]
    device: torch.device
    budget: int
    least: int
    num_slots: int
    is_exact: bool
    is_compileable: bool
    fuses: bool

    def remember(
        self, layer: int, call: Call, query: Tensor, query_nope: Tensor | None, t: Tensor
    ) -> None:
        """Keep what the policy needs of a call's queries, see :class:`Queries`."""
        ...

    def remembered(self, layer: int, t: Tensor) -> Pool:
        """The queries or moments that ``score`` gets, by name."""
        ...

    def append(
        self,
        layer: int,
        call: Call,
        query: Tensor,
        tokens: NewTokens,
        t: Tensor,
        *,
        packed: bool,
    ) -> Tensor:
        """Store one token of each row, then attend to all valid slots of the layer.

        Args:
            layer: The layer.
            call: The call.
            query: ``[batch, num_heads, 1, head_dim]``.
            tokens: One token of each row.
            t: ``[batch]`` int32, tokens seen, this one included.
            packed: Allow a faster attention whose bits differ from a full cache's.

        Returns:
            ``[batch, num_heads, 1, head_dim]``.
        """
        ...

    def extend(
        self,
        layer: int,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        t: Tensor,
        extent: Extent,
        *,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Attend new tokens to the valid slots and causally to themselves; nothing is stored.

        ``t`` counts the new tokens. ``lse`` ``[batch, num_heads, new]`` fp32 is written to, if
        given.
        """
        ...

    def column_mass(
        self,
        layer: int,
        call: Call,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        extent: Extent,
        *,
        queries: int,
        reduce: str,
        count_below: bool,
    ) -> Tensor:
        """Attention mass of each candidate in :meth:`extend`: ``[batch, heads, candidates]``."""
        ...

    def mass(self, layer: int) -> Tensor | None:
        """``[batch, heads, num_slots]`` fp32, each slot's mass in the latest step, or None."""
        ...

    def candidates(
        self,
        layer: int,
        call: Call,
        new: Pool,
        names: Sequence[str],
        t: Tensor,
        extent: Extent,
    ) -> tuple[Pool, Tensor]:
        """The candidates of a layer: its slots, followed by a call's tokens.

        Args:
            layer: The layer.
            call: The call.
            new: Keys, values and fields of the new tokens by name.
            names: Which of ``key`` and ``value`` are wanted beside positions and fields.
            t: Tokens seen, the call's included.
            extent: What the host knows about the valid slots.

        Returns:
            Each ``[batch, num_kv_heads, candidates, ...]`` by name, and which are valid.
        """
        ...

    def stored(self, layer: int, names: Sequence[str], t: Tensor) -> tuple[Pool, Tensor]:
        """As :meth:`candidates`, for all slots and no new tokens. ``t`` counts stored tokens."""
        ...

    def write_fields(self, layer: int, pool: Pool, extent: Extent) -> Pool:
        """Write the fields of a pool's slots back, and return the fields of its new tokens."""
        ...

    def fill(
        self,
        layer: int,
        call: Call,
        tokens: NewTokens,
        t: Tensor,
        extent: Extent,
        *,
        scores: Tensor | None,
    ) -> None:
        """Keep the best of a layer's slots and of a call's tokens.

        ``scores`` has the scores of :meth:`candidates`. If layers share a budget, tokens may wait
        for the last layer.
        """
        ...

    def evict(self, t: Tensor, *, scores: Sequence[Tensor] | None) -> None:
        """Cut full heads to their budget. ``scores`` has a layer's scores of :meth:`stored`."""
        ...

    def counts(self, t: Tensor) -> Tensor:
        """``[batch]`` int32: valid slots of each head, or their mean if heads share a budget."""
        ...

    def take_back(self, count: int) -> None:
        """Drop the last ``count`` pairs of every head."""
        ...

    def positions(self, layer: int, t: Tensor) -> Tensor:
        """``[batch, num_kv_heads, slots]`` int32: each slot's position, -1 if it is empty."""
        ...

    def num_valid(self, layer: int, t: Tensor) -> Tensor:
        """``[batch, num_kv_heads]`` int32, the valid slots of a layer's heads."""
        ...

    def nan_seen(self, layer: int) -> Tensor:
        """int32 scalar, 1 if a score of the layer was NaN."""
        ...

    def set_nan_seen(self, layer: int, flag: Tensor) -> None:
        """Set what :meth:`nan_seen` returns."""
        ...

    def reset(self, rows: Tensor | None) -> None:
        """Free some rows, or all. Freeing all also clears the NaN flags."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, in place."""
        ...

    def select(self, index: Tensor) -> Storage:
        """A storage in new tensors, whose row ``i`` is row ``index[i]`` of this one."""
        ...

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that outlives a call, by name."""
        ...

    def check_saved(self, saved: Mapping[str, Tensor], t: Tensor) -> None:
        """Check the numbers of tensors that have the names and shapes of :meth:`named_state`.

        Raises:
            ValueError: they cannot be the state of such a storage; the message names the tensor.
        """
        ...

    def tensors(self) -> list[Tensor]:
        """All tensors, scratch included."""
        ...
