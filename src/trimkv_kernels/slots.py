"""The tensors behind a bounded cache: the slots of layers that share one shape and one device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trimkv_kernels.kernels.slots import Slots
from trimkv_kernels.policies.base import FieldSpec, RetentionPolicy


class SlotGroup:
    """State of the layers of one budget and device, in base tensors at fixed addresses.

    A layer's slots are ``key[index]``, ``index`` being the layer's place in ``layers``.

    Attributes:
        layers: Layer indices of the model, ascending.
        device: Where they are.
        t: ``[batch]`` int32, real tokens seen; the cache's own, or its copy on this device.
        budget, num_slots: Slots that survive an eviction, and all of them.
        key, value: ``[layers, batch, num_kv_heads, num_slots, head_dim]``.
        position: ``[layers, batch, num_kv_heads, num_slots]`` int32.
        slope, offset: As ``position`` but fp32; None where the policy is not affine.
        fields: The policy's, ``[layers, batch, num_kv_heads, num_slots, ...]``.
        num_valid: ``[layers, batch, num_kv_heads]`` int32; slots ``[0, num_valid)`` are filled.
        nan_seen: ``[layers]`` int32, 1 where a score was NaN.
        mass: ``[layers, batch, num_kv_heads or num_heads, num_slots]`` fp32, where attention leaves
            what ``observe`` reads; None where nothing does.
        queries: ``[layers, batch, num_heads, query_window, head_dim]``, the query of position ``p``
            at ``p % query_window``; None without a window.
        query_mean, query_scatter: ``[layers, batch, num_heads, head_dim]`` and ``[..., head_dim,
            head_dim]`` fp32, mean and summed outer products of deviations; None without moments.
        capacity: As ``num_valid``: all slots of every head.
        slots: The tensors that the ops take.
        lengths: Filled slots of each row's heads, where the host knows; else None.
        has_evicted: Whether the host has seen an eviction since the cache was empty.
    """

    def __init__(
        self,
        policy: RetentionPolicy,
        *,
        layers: Sequence[int],
        batch_size: int,
        num_heads: int | None,
        num_kv_heads: int,
        head_dim: int,
        budget: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers, self.device = tuple(layers), device
        self.budget, self.num_slots = budget, num_slots
        heads = (len(self.layers), batch_size, num_kv_heads)
        slots = (*heads, num_slots)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.key = zeros(*slots, head_dim, dtype=dtype)
        self.value = zeros(*slots, head_dim, dtype=dtype)
        self.position = zeros(*slots, dtype=torch.int32)
        self.slope = zeros(*slots) if policy.is_affine else None
        self.offset = zeros(*slots) if policy.is_affine else None
        group = num_heads // num_kv_heads if num_heads else 0
        self.fields = {
            name: zeros(*slots, *field_shape(spec, group), dtype=spec.dtype)
            for name, spec in policy.fields.items()
        }
        self.num_valid = zeros(*heads, dtype=torch.int32)
        self.nan_seen = zeros(len(self.layers), dtype=torch.int32)
        needs = policy.needs
        self.mass = self.queries = self.query_mean = self.query_scatter = None
        stat = needs.attention
        if stat is not None and stat.into is None:
            rows = (num_heads or 0) if stat.group == "none" else num_kv_heads
            self.mass = zeros(*heads[:2], rows, num_slots)
        per_query_head = (*heads[:2], num_heads or 0)
        if needs.query_window:
            self.queries = zeros(*per_query_head, needs.query_window, head_dim, dtype=dtype)
        if needs.query_moments:
            self.query_mean = zeros(*per_query_head, head_dim)
            self.query_scatter = zeros(*per_query_head, head_dim, head_dim)
        self.lengths: list[int] | None = [0] * batch_size
        self.has_evicted = False
        self.t = zeros(0, dtype=torch.int32)  # until the cache shares its own
        self.capacity = torch.full_like(self.num_valid, num_slots)
        self.slots = self._as_slots()
        mark_static([*self._tensors(), self.capacity])

    def _as_slots(self) -> Slots:
        """What the ops take."""
        return Slots(
            key=self.key,
            value=self.value,
            position=self.position,
            num_valid=self.num_valid,
            capacity=self.capacity,
            slope=self.slope,
            offset=self.offset,
            fields=tuple(self.fields.values()),
            nan_seen=self.nan_seen,
        )

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that outlives a call; each has layers and batch as its first dimensions."""
        for name in (
            "key",
            "value",
            "position",
            "slope",
            "offset",
            "num_valid",
            "queries",
            "query_mean",
            "query_scatter",
        ):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor
        for name, tensor in self.fields.items():
            yield f"fields.{name}", tensor

    def _tensors(self) -> list[Tensor]:
        """All tensors, scratch included."""
        extra = [x for x in (self.nan_seen, self.mass) if x is not None]
        return [*(tensor for _, tensor in self.named_state()), *extra]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scratch included."""
        return sum(x.nbytes for x in self._tensors())

    def reset(self, rows: Tensor | slice) -> None:
        """Free the slots of ``rows``; what a slot held is left in it."""
        self.num_valid[:, rows] = 0
        for moment in (self.query_mean, self.query_scatter):
            if moment is not None:
                moment[:, rows] = 0

    def reorder(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was."""
        for _, tensor in self.named_state():
            for layer in tensor:  # one layer at a time bounds the temporary copy
                layer.copy_(layer.index_select(0, index))
        if self.lengths is not None and len(set(self.lengths)) > 1:
            self.lengths = None

    def select(self, index: Tensor) -> SlotGroup:
        """A group of new tensors whose row ``i`` is row ``index[i]`` of this one."""
        twin = copy.copy(self)
        twin.fields = {name: x.index_select(1, index) for name, x in self.fields.items()}
        for name, tensor in self.named_state():
            if not name.startswith("fields."):
                setattr(twin, name, tensor.index_select(1, index))
        twin.nan_seen = self.nan_seen.clone()
        if self.mass is not None:
            twin.mass = self.mass.index_select(1, index)
        same = self.lengths is not None and len(set(self.lengths)) == 1
        twin.capacity = self.capacity.index_select(1, index)
        twin.slots = twin._as_slots()
        twin.lengths = self.lengths[:1] * len(index) if self.lengths and same else None
        mark_static([*twin._tensors(), twin.capacity])
        return twin

    def filled(self) -> int:
        """Slots that any row may have filled."""
        return self.num_slots if self.lengths is None else max(self.lengths)

    def is_even(self) -> bool:
        """Whether every head is known to have filled the same number of slots."""
        return self.lengths is not None and len(set(self.lengths)) == 1

    # ---- queries ---------------------------------------------------------------------------

    def remember_queries(self, index: int, query: Tensor, valid: Tensor | None, t: Tensor) -> None:
        """Put a call's last queries ``[batch, num_heads, new, head_dim]`` into the window.

        A row's real tokens stand at the call's right end, the last at position ``t - 1``.
        """
        if self.queries is None:
            return
        ring, new = self.queries[index], query.shape[2]
        if new == 1:
            place = ((t - 1) % ring.shape[2]).long()[:, None, None, None].expand_as(query)
            if valid is not None:
                query = torch.where(valid[:, None, :, None], query, ring.gather(2, place))
            ring.scatter_(2, place, query)
            return
        position = window_positions(t, ring.shape[2])
        column = new - (t[:, None] - position)  # where the call has the query of each place
        count = torch.full_like(t, new) if valid is None else valid.sum(dim=1, dtype=torch.int32)
        taken = (position >= 0) & (column >= new - count[:, None])
        place = column.clamp(min=0).long()[:, None, :, None].expand_as(ring)
        ring.copy_(torch.where(taken[:, None, :, None], query.gather(2, place), ring))

    def add_moments(self, index: int, query: Tensor, counted: Tensor, total: Tensor) -> None:
        """Take a call's queries before RoPE into their running mean and scatter (Chan et al.).

        Args:
            query: ``[batch, num_heads, new, head_dim]``.
            counted: ``[batch, new]`` bool, the tokens that count.
            total: ``[batch]``, tokens that count so far, those of the call included.
        """
        if self.query_mean is None or self.query_scatter is None:
            return
        mean, scatter = self.query_mean[index], self.query_scatter[index]
        weight = counted[:, None, :, None].float()
        added = weight.sum(dim=2)  # [batch, 1, 1]
        query = query.float()
        new_mean = (query * weight).sum(dim=2) / added.clamp(min=1)
        centred = (query - new_mean[:, :, None]) * weight
        step = new_mean - mean
        share = added / total[:, None, None].clamp(min=1)
        before = total[:, None, None] - added
        scatter += centred.mT @ centred
        scatter += (step[..., :, None] * step[..., None, :]) * (before * share)[..., None]
        mean += step * share


def mark_static(tensors: Sequence[Tensor]) -> None:
    """Promise compiled code that state stays at its address while a cache lives.

    Without it Inductor makes no CUDA graph of a step, which writes to its inputs. Another cache has
    other addresses: then the graph is recorded again, and nothing recompiled.
    """
    if torch.compiler.is_compiling():  # the promise cannot be made from within
        return
    for tensor in tensors:
        if tensor.device.type != "cpu":  # there are no graphs there, and dynamo is slow to import
            torch._dynamo.mark_static_address(tensor, guard=False)


def field_shape(spec: FieldSpec, group: int) -> tuple[int, ...]:
    """Shape of one slot's entry, ``group`` query heads to a KV head."""
    return (group, *spec.shape) if spec.per == "query_head" else spec.shape


def window_positions(t: Tensor, window: int) -> Tensor:
    """``[batch, window]`` int32: the position whose query stands at each place, -1 for none."""
    place = torch.arange(window, dtype=torch.int32, device=t.device)
    last = t[:, None] - 1
    position = last - (last - place) % window
    return position.clamp(min=-1)
