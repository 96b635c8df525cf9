"""A fixed number of slots for every head: the only caller of the ops on slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimkv_kernels import kernels
from trimkv_kernels.cache.call import Call, NewTokens, Pool
from trimkv_kernels.cache.contract import Contract, field_shape
from trimkv_kernels.cache.counts import Extent
from trimkv_kernels.cache.queries import Queries
from trimkv_kernels.cache.saved import check_slots
from trimkv_kernels.cache.static import mark_static
from trimkv_kernels.cache.storage import Storage
from trimkv_kernels.kernels.checks import required
from trimkv_kernels.kernels.slots import Slots
from trimkv_kernels.policies.shares import Shares
from trimkv_kernels.policies.trigger import WhenFull


@dataclass(frozen=True)
class CacheShape:
    """Sizes and protection that all storages of a cache share.

    Attributes:
        batch_size, num_heads, num_kv_heads, head_dim: Sizes of a layer.
        trigger: When a head is cut; this also says how many slots it has.
        sinks, recent: First and last positions that are never evicted.
        dtype: Of keys and values.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.
        budget: Pairs that a head keeps, on average.
        shares: How heads share a budget; None if each has its own.
        rows_apart: A row's bits do not depend on what the other rows hold.
    """

    batch_size: int
    num_heads: int | None
    num_kv_heads: int
    head_dim: int
    trigger: WhenFull
    sinks: int
    recent: int
    dtype: torch.dtype
    impl: str
    budget: int
    shares: Shares | None = None
    rows_apart: bool = False

    def entries(self, contract: Contract) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one slot's entry and dtype, for each field of the policy."""
        group = (self.num_heads or 0) // self.num_kv_heads
        return [(field_shape(spec, group), spec.dtype) for spec in contract.fields.values()]

    def queries(self, contract: Contract, num_layers: int, device: torch.device) -> Queries:
        """What a storage of ``num_layers`` layers keeps of the queries."""
        preference = None if self.shares is None else self.shares.preference
        return Queries(
            contract.needs,
            num_layers=num_layers,
            batch_size=self.batch_size,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            sinks=self.sinks,
            dtype=self.dtype,
            device=device,
            window=0 if preference is None else preference.window,
        )


def allocate(
    contract: Contract,
    shape: CacheShape,
    budgets: Sequence[int],
    devices: Sequence[torch.device],
) -> list[Storage]:
    """A storage for the layers of each budget on each device, given budget and device by layer."""
    layers_of: dict[tuple[int, torch.device], list[int]] = {}
    for layer, kind in enumerate(zip(budgets, devices, strict=True)):
        layers_of.setdefault(kind, []).append(layer)
    return [
        DenseSlots(contract, shape, layers=layers, budget=budget, device=device)
        for (budget, device), layers in layers_of.items()
    ]


class DenseSlots:
    """Slots of the layers of one budget on one device, in base tensors at fixed addresses.

    A head's valid slots are packed at the front, ``[0, num_valid)``.

    Attributes:
        slots: The tensors.
        fields: The policy's, by name; they are those of ``slots``.
    """

    is_exact = True
    is_compileable = True

    def __init__(
        self,
        contract: Contract,
        shape: CacheShape,
        *,
        layers: Sequence[int],
        budget: int,
        device: torch.device,
    ) -> None:
        self.layers, self.device = tuple(layers), device
        self.budget = self.least = budget
        self.num_slots = num_slots = shape.trigger.num_slots(budget)
        self._shape = shape
        self._impl = kernels.resolve_impl(shape.impl, device)
        self.fuses = self._impl == "triton"
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        self._observation = contract.observation
        sizes = (len(self.layers), shape.batch_size, shape.num_kv_heads, num_slots, shape.head_dim)
        self._use(
            Slots.zeros(
                *sizes,
                dtype=shape.dtype,
                device=device,
                affine=contract.is_affine,
                fields=shape.entries(contract),
            ),
            tuple(contract.fields),
        )
        self._mass: Tensor | None = None  # attention writes what `observe` reads
        stat = contract.needs.attention
        if stat is not None and stat.into is None:
            rows = (shape.num_heads or 0) if stat.group == "none" else shape.num_kv_heads
            self._mass = torch.zeros(
                *sizes[:2], rows, num_slots, dtype=torch.float32, device=device
            )
        self._queries = shape.queries(contract, len(self.layers), device)
        mark_static(self.tensors())

    def _use(self, slots: Slots, names: Sequence[str]) -> None:
        self.slots = slots
        self.fields = dict(zip(names, slots.fields, strict=True))

    def remember(
        self, layer: int, call: Call, query: Tensor, query_nope: Tensor | None, t: Tensor
    ) -> None:
        """See :meth:`Storage.remember`."""
        self._queries.remember(self._index[layer], call, query, query_nope, t)

    def remembered(self, layer: int, t: Tensor) -> Pool:
        """See :meth:`Storage.remembered`."""
        return self._queries.given(self._index[layer], t)

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
        """See :meth:`Storage.append`."""
        slots, index, observation = self.slots, self._index[layer], self._observation
        if tokens.fields:
            # the new token's slot; padding writes into the next free slot, which stays free
            slot = slots.num_valid[index].clamp(max=self.num_slots - 1).long()
            for name, new in tokens.fields.items():
                _scatter_slots(self.fields[name][index], slot, new)
        mass = self._mass
        if observation is not None and observation.stat.into is not None:
            mass = self.fields[observation.stat.into]
        output = kernels.append_attention.unchecked(
            query[:, :, 0],
            tokens.key[:, :, 0],
            tokens.value[:, :, 0],
            slots,
            t,
            layer=index,
            valid=None if call.valid is None else call.valid[:, 0],
            new_slope=None if tokens.slope is None else tokens.slope[:, :, 0],
            new_offset=None if tokens.offset is None else tokens.offset[:, :, 0],
            decay=tokens.decay,
            rope=None if tokens.rope is None else tokens.rope.of_step(),
            scale=call.scale,
            mass=mass,
            mass_reduce="mean" if observation is None else observation.reduce,
            mass_accumulate=observation is not None and observation.accumulates,
            packed=packed,
            rows_apart=self._shape.rows_apart,
            impl=self._impl,
        )
        return output[:, :, None]

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
        """See :meth:`Storage.extend`."""
        index = self._index[layer]
        return kernels.extend_attention(
            query,
            key,
            value,
            self.slots.key[index, :, :, : extent.max_valid],
            self.slots.value[index, :, :, : extent.max_valid],
            self._ragged(index, extent, call),
            valid=call.valid,
            scale=call.scale,
            lse=lse,
            impl=self._impl,
        )

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
        """See :meth:`Storage.column_mass`."""
        index = self._index[layer]
        return kernels.column_mass(
            query,
            key,
            self.slots.key[index, :, :, : extent.max_valid],
            lse,
            self._ragged(index, extent, call),
            valid=call.valid,
            scale=call.scale,
            queries=queries,
            reduce=reduce,
            count_below=count_below,
            impl=self._impl,
        )

    def _ragged(self, index: int, extent: Extent, call: Call) -> Tensor | None:
        """The valid slots of each head if they may differ, else None."""
        return None if extent.is_even and call.valid is None else self.slots.num_valid[index]

    def mass(self, layer: int) -> Tensor | None:
        """See :meth:`Storage.mass`."""
        return None if self._mass is None else self._mass[self._index[layer]]

    def candidates(
        self,
        layer: int,
        call: Call,
        new: Pool,
        names: Sequence[str],
        t: Tensor,
        extent: Extent,
    ) -> tuple[Pool, Tensor]:
        """See :meth:`Storage.candidates`."""
        stored, held = self.stored(layer, names, t)
        heads = self._shape.num_kv_heads
        new = {"position": call.position[:, None].expand(-1, heads, -1), **new}
        cut = extent.max_valid
        pool = {
            name: torch.cat((stored[name][:, :, :cut], tensor), dim=2) if cut else tensor
            for name, tensor in new.items()
            if name in stored
        }
        real = call.real[:, None].expand(-1, heads, -1)
        return pool, torch.cat((held[:, :, :cut], real), dim=2)

    def stored(self, layer: int, names: Sequence[str], t: Tensor) -> tuple[Pool, Tensor]:
        """See :meth:`Storage.stored`."""
        index = self._index[layer]
        pool = {"position": self.slots.position[index]}
        pool |= {name: getattr(self.slots, name)[index] for name in names}
        pool |= {name: field[index] for name, field in self.fields.items()}
        return pool, self._valid(index)

    def write_fields(self, layer: int, pool: Pool, extent: Extent) -> Pool:
        """See :meth:`Storage.write_fields`."""
        index, cut = self._index[layer], extent.max_valid
        for name, field in self.fields.items():
            field[index][:, :, :cut] = pool[name][:, :, :cut]
        return {name: pool[name][:, :, cut:] for name in self.fields}

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
        """See :meth:`Storage.fill`."""
        kernels.fill_slots(
            tokens.key,
            tokens.value,
            call.position,
            self.slots,
            t,
            layer=self._index[layer],
            buffer=self._shape.trigger.buffer,
            new_slope=tokens.slope,
            new_offset=tokens.offset,
            scores=scores,
            valid=call.valid,
            sinks=self._shape.sinks,
            recent=self._shape.recent,
            new_fields=tuple(tokens.fields[name] for name in self.fields),
            max_valid=extent.max_valid,
            impl=self._impl,
        )

    def evict(self, t: Tensor, *, scores: Sequence[Tensor] | None) -> None:
        """See :meth:`Storage.evict`."""
        kernels.evict(
            self.slots,
            t,
            buffer=self._shape.trigger.buffer,
            scores=None if scores is None else torch.stack(tuple(scores)),
            sinks=self._shape.sinks,
            recent=self._shape.recent,
            impl=self._impl,
        )

    def counts(self, t: Tensor) -> Tensor:
        """See :meth:`Storage.counts`; all heads of a row have the same number."""
        return self.slots.num_valid[0, :, 0]

    def take_back(self, count: int) -> None:
        """See :meth:`Storage.take_back`."""
        self.slots.num_valid.sub_(count)

    def positions(self, layer: int, t: Tensor) -> Tensor:
        """See :meth:`Storage.positions`."""
        index = self._index[layer]
        return self.slots.position[index].masked_fill(~self._valid(index), -1)

    def num_valid(self, layer: int, t: Tensor) -> Tensor:
        """See :meth:`Storage.num_valid`."""
        return self.slots.num_valid[self._index[layer]]

    def nan_seen(self, layer: int) -> Tensor:
        """See :meth:`Storage.nan_seen`."""
        return self._nan_seen[self._index[layer]]

    def set_nan_seen(self, layer: int, flag: Tensor) -> None:
        """See :meth:`Storage.set_nan_seen`."""
        self.nan_seen(layer).copy_(flag)

    @property
    def _nan_seen(self) -> Tensor:
        return required("nan_seen", self.slots.nan_seen)

    def _valid(self, index: int) -> Tensor:
        """``[batch, num_kv_heads, num_slots]`` bool: the valid slots."""
        slot = torch.arange(self.num_slots, device=self.device)
        return slot < self.slots.num_valid[index][..., None]

    def reset(self, rows: Tensor | None) -> None:
        """See :meth:`Storage.reset`. The slots keep their old contents."""
        chosen = slice(None) if rows is None else rows
        self.slots.num_valid[:, chosen] = 0
        self._queries.reset(chosen)
        if rows is None:
            self._nan_seen.zero_()

    def reorder(self, index: Tensor) -> None:
        """See :meth:`Storage.reorder`."""
        for _, tensor in self.named_state():
            for layer in tensor:  # one layer at a time bounds the temporary copy
                layer.copy_(layer.index_select(0, index))

    def select(self, index: Tensor) -> DenseSlots:
        """See :meth:`Storage.select`."""
        twin = DenseSlots.__new__(DenseSlots)
        twin.__dict__.update(self.__dict__)
        rows = replace(self.slots, nan_seen=None).map(lambda x: x.index_select(1, index))
        twin._use(replace(rows, nan_seen=self._nan_seen.clone()), tuple(self.fields))
        twin._mass = None if self._mass is None else self._mass.index_select(1, index)
        twin._queries = self._queries.select(index)
        twin._shape = replace(self._shape, batch_size=len(index))
        mark_static(twin.tensors())
        return twin

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """See :meth:`Storage.named_state`; layers and batch are the first dimensions of each."""
        for name in ("key", "value", "position", "slope", "offset", "num_valid"):
            tensor = getattr(self.slots, name)
            if tensor is not None:
                yield name, tensor
        yield from self._queries.named_state()
        for name, tensor in self.fields.items():
            yield f"fields.{name}", tensor

    def check_saved(self, saved: Mapping[str, Tensor], t: Tensor) -> None:
        """See :meth:`Storage.check_saved`."""
        check_slots(saved, t)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Storage.tensors`."""
        extra = [self.slots.capacity, self._nan_seen, self._mass]
        state = [tensor for _, tensor in self.named_state()]
        return state + [x for x in extra if x is not None]


def _scatter_slots(slots: Tensor, slot: Tensor, new: Tensor) -> None:
    """Write ``new`` ``[batch, heads, 1, ...]`` into one slot of each head."""
    slots.scatter_(2, slot.reshape(*slot.shape, *(1,) * (new.dim() - 2)).expand_as(new), new)
