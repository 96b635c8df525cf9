"""The state of a cache: its slots, its clock, its counts and its pins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Call, Rows, is_recorded, real_counts
from trimkv_kernels.cache.clock import Clock
from trimkv_kernels.cache.contract import Contract
from trimkv_kernels.cache.counts import Counts, Extent
from trimkv_kernels.cache.dense import CacheShape, allocate
from trimkv_kernels.cache.files import PINS
from trimkv_kernels.cache.paged import PagedSlots
from trimkv_kernels.cache.pins import Pins
from trimkv_kernels.cache.storage import Storage
from trimkv_kernels.checks import Span


class State:
    """The state of a cache. Every operation on rows changes all of its parts.

    Attributes:
        storages: The slots, one storage for the layers of each budget on each device.
        clock: Tokens seen.
        counts: What the host knows about the valid slots.
        pins: Spans that are never evicted.
        rows_apart: A row's bits do not depend on what the other rows hold.
    """

    def __init__(
        self,
        storages: list[Storage],
        clock: Clock,
        counts: Counts,
        pins: Pins,
        *,
        rows_apart: bool,
    ) -> None:
        self.storages, self.clock, self.counts, self.pins = storages, clock, counts, pins
        self.rows_apart = rows_apart
        number_of = {layer: i for i, x in enumerate(storages) for layer in x.layers}
        self._number_of = [number_of[layer] for layer in sorted(number_of)]

    @classmethod
    def allocate(
        cls,
        contract: Contract,
        shape: CacheShape,
        budgets: Sequence[int],
        devices: Sequence[torch.device],
        protected: Sequence[Span],
    ) -> State:
        """The state of an empty cache, given budget and device of each layer."""
        # Normal tensors even under inference_mode: a later call outside it must be able to write
        # to them.
        with torch.inference_mode(False):
            storages = _allocate(contract, shape, budgets, devices)
            exact = [x.is_exact for x in storages]
            return cls(
                storages,
                Clock.zero(shape.batch_size, devices),
                Counts([x.budget for x in storages], shape.trigger, shape.batch_size, exact),
                Pins(protected, shape.batch_size, devices[0]),
                rows_apart=shape.rows_apart,
            )

    @property
    def is_recorded(self) -> bool:
        """Whether a call is being compiled or captured. Then the host may decide nothing."""
        return is_recorded(self.clock.t.device)

    def storage(self, layer: int) -> Storage:
        """Where a layer's slots are.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= layer < len(self._number_of):
            raise ValueError(f"layer must be in [0, {len(self._number_of)}), got {layer}")
        return self.storages[self._number_of[layer]]

    def t(self, layer: int) -> Tensor:
        """``[batch]`` int32, tokens seen, on a layer's device."""
        return self.clock.t_of[layer]

    def extent(self, layer: int) -> Extent:
        """What the host knows about a layer's valid slots, and may use."""
        num_slots = self.storage(layer).num_slots
        if self.rows_apart:
            return Extent(num_slots, False)
        return self.counts.extent(self._number_of[layer], num_slots)

    def is_due(self, layer: int, added: list[int] | None) -> bool:
        """Whether a layer may have to drop pairs for ``added`` more; True if unknown."""
        return added is None or self.counts.is_due(self._number_of[layer], added)

    def begin(
        self,
        new: int,
        valid: Tensor | None,
        is_first: bool,
        never_evicts: str | None,
        is_waiting: bool,
        scale: float | None,
    ) -> Call:
        """Count a call's tokens on the device, and on the host if it knows them.

        Args:
            new: Tokens of each row, padding included.
            valid: ``[batch, new]`` bool on any device, False for padding; None when all are real.
            is_first: The cache is empty.
            never_evicts: Name of a policy that never evicts, so that there must be room; else None.
            is_waiting: Other tokens wait outside the slots already.
            scale: Softmax scale of layer 0.

        Raises:
            ValueError: there is no room.
        """
        added = None
        if self.is_recorded:
            self.counts.forget()
        elif new > 1 or self.counts.are_known:
            if not is_waiting:
                self.learn_counts()
            batch = self.clock.t.shape[0]
            added = [new] * batch if valid is None else real_counts(valid)
            if never_evicts is not None:
                self.check_capacity(added or [new] * batch, never_evicts)
        if valid is not None:
            valid = valid.to(self.clock.t.device)
        position, real = self.clock.advance(new, valid)
        return Call(valid, real, position, added, is_first and not self.rows_apart, scale)

    def learn_counts(self) -> None:
        """Read ``num_valid`` back if the host does not know it."""
        if not self.counts.are_known:
            device = self.clock.t.device
            found = [x.counts(self.t(x.layers[0])).to(device) for x in self.storages]
            self.counts.learn(torch.stack(found).tolist())

    def refresh_counts(self) -> None:
        """Read ``num_valid`` back after an eviction that left an unknown number, if that is free.

        No token may wait to be confirmed.
        """
        on_host = self.clock.t.device.type == "cpu" and not self.is_recorded
        if on_host and not all(x.is_exact for x in self.storages):
            self.learn_counts()

    def check_room(self) -> None:
        """Check that every head has a slot for a step's token, as far as the host knows for free.

        Raises:
            ValueError: the eviction after the last step was left out.
        """
        if self.is_recorded:
            return
        if self.clock.t.device.type == "cpu":
            self.learn_counts()
        if self.counts.may_be_full:
            raise ValueError(
                "a head is full, so the token would be lost: call evict() after every step, "
                "behind the last layer"
            )

    def check_capacity(self, added: list[int], policy: str) -> None:
        """Check that every row can take ``added`` more tokens without an eviction.

        Raises:
            ValueError: it cannot; the message names the budget, and what is needed.
        """
        for number, storage in enumerate(self.storages):
            needed = self.counts.most_needed(number, added)
            if needed is not None and needed > storage.budget:
                raise ValueError(
                    f"policy {policy!r} never evicts: the cache holds "
                    f"budget={storage.budget} tokens and this call needs {needed}; "
                    "give a larger budget or another policy"
                )

    def check_take_back(self, count: int, contract: Contract) -> None:
        """Check that the last ``count`` tokens can be dropped without a trace.

        Raises:
            ValueError: something was evicted or padded since, or the policy observed the tokens.
        """
        undoable, needs = self.counts.undoable, contract.needs
        if not 0 < count <= undoable:
            raise ValueError(
                f"count must lie in [0, {undoable}], the tokens since the last eviction, "
                f"got {count}: call hold() before tokens that may be taken back"
            )
        if needs.attention is not None or needs.query_window or needs.query_moments:
            raise ValueError(
                f"policy {contract.name!r} has observed the last {count} tokens, which "
                "cannot be undone: call hold() before tokens that may be taken back"
            )

    def take_back(self, count: int) -> None:
        """Drop the last ``count`` tokens of every row, which are in the slots."""
        for storage in self.storages:
            storage.take_back(count)
        self.clock.take_back(count, count)
        self.counts.take_back(count)

    def reset(self, rows: Rows | None = None) -> None:
        """Free some rows, or all, in place."""
        for storage in self.storages:
            storage.reset(None if rows is None else rows.index.to(storage.device))
        self.clock.reset(None if rows is None else rows.index)
        self.counts.reset(rows)
        self.pins.reset(rows)

    def reorder(self, rows: Rows) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was, in place."""
        for storage in self.storages:
            storage.reorder(rows.index.to(storage.device))
        self.clock.reorder(rows.index)
        self.counts, self.pins = self.counts.select(rows), self.pins.select(rows)

    def select(self, rows: Rows) -> State:
        """A state in new tensors, whose row ``i`` is row ``rows[i]`` of this one."""
        with torch.inference_mode(False):
            return State(
                [x.select(rows.index.to(x.device)) for x in self.storages],
                self.clock.select(rows.index),
                self.counts.select(rows),
                self.pins.select(rows),
                rows_apart=self.rows_apart,
            )

    def put(self, row: int, source: State) -> None:
        """A row becomes what the only row of another state of the same sizes is, in place."""
        for storage, other in zip(self.storages, source.storages, strict=True):
            named = zip(storage.named_state(), other.named_state(), strict=True)
            for (_, tensor), (_, new) in named:
                tensor[:, row].copy_(new[:, 0])
            for layer in storage.layers:
                flags = storage.nan_seen(layer), other.nan_seen(layer)
                storage.set_nan_seen(layer, torch.maximum(*flags))
        self.clock.put(row, source.clock)
        self.counts.put(row, source.counts)
        self.pins.put(row, source.pins)

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors of a file by name, without the pins, whose shape changes."""
        named = dict(self.clock.named_state())
        for number, storage in enumerate(self.storages):
            named |= {f"{number}.{name}": tensor for name, tensor in storage.named_state()}
            flags = [storage.nan_seen(layer) for layer in storage.layers]
            named[f"{number}.nan_seen"] = torch.stack(flags)
        return named

    def saved(self) -> dict[str, Tensor]:
        """Everything that a file holds."""
        pins = self.pins.table
        return self.named_tensors() | ({} if pins is None else {PINS: pins})

    def load(self, saved: dict[str, Tensor]) -> None:
        """Take what :meth:`saved` gave; the caller has checked it."""
        for number, storage in enumerate(self.storages):
            for name, tensor in storage.named_state():
                tensor.copy_(saved[f"{number}.{name}"])
            for index, layer in enumerate(storage.layers):
                storage.set_nan_seen(layer, saved[f"{number}.nan_seen"][index])
        self.clock.load(saved["t"], saved["seen"])
        self.pins.load(saved.get(PINS))
        self.counts.reset()
        self.counts.forget()
        self.counts.is_empty = not bool(self.clock.seen > 0)

    def tensors(self) -> list[Tensor]:
        """All tensors, scratch included, without the spans of the pins."""
        own = (x for storage in self.storages for x in storage.tensors())
        return [*own, *self.clock.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes of :meth:`tensors`."""
        return sum(x.nbytes for x in self.tensors())


def _allocate(
    contract: Contract,
    shape: CacheShape,
    budgets: Sequence[int],
    devices: Sequence[torch.device],
) -> list[Storage]:
    """The storages of a cache: if heads share a budget, a single one in pages."""
    if shape.shares is None:
        return allocate(contract, shape, budgets, devices)
    layers = len(budgets)
    return [PagedSlots(contract, shape, shape.shares, num_layers=layers, device=devices[0])]
