"""Slots of heads that share a budget, in pages: the only caller of the ops on pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimkv_kernels import kernels
from trimkv_kernels.cache.call import Call, NewTokens, Pool
from trimkv_kernels.cache.contract import Contract
from trimkv_kernels.cache.counts import Extent
from trimkv_kernels.cache.dense import CacheShape
from trimkv_kernels.cache.preferences import PreferredSlots
from trimkv_kernels.cache.saved import check_pages
from trimkv_kernels.cache.static import mark_static
from trimkv_kernels.kernels.checks import required
from trimkv_kernels.kernels.pages import Pages, ShareRule, gather_slots
from trimkv_kernels.policies.shares import Shares


@dataclass
class _Filling:
    """A call of several tokens while it passes through the layers of a scope.

    Attributes:
        stored: ``[batch]`` int32, tokens that were stored before.
        full: ``[1, batch]`` bool, the rows that will be cut.
        is_due: Whether any row will be cut.
        is_first: Nothing was stored before, so tokens are dropped after each layer.
        scores: ``[1, batch, num_slots]`` fp32, of the slots; None if scores are affine.
        first_head: The scope's head that is the first of those that wait.
        waiting: The new tokens of the layers so far.
        new_scores: Theirs, if scores are not affine.
    """

    stored: Tensor
    full: Tensor
    is_due: bool
    is_first: bool
    scores: Tensor | None
    first_head: int = 0
    waiting: list[NewTokens] = field(default_factory=list)
    new_scores: list[Tensor] = field(default_factory=list)


class PagedSlots:
    """Slots of all layers, whose heads share a budget within a layer or within the model.

    If the new tokens of a call do not fit, they wait beside the slots until the last layer of
    their scope was called, because only then is it known what stays. If the slots are empty,
    nothing waits: after each layer, the best of all tokens so far are kept.

    Attributes:
        pages: The tensors.
        fields: The policy's, by name; they are those of ``pages``.
    """

    def __init__(
        self,
        contract: Contract,
        shape: CacheShape,
        shares: Shares,
        *,
        num_layers: int,
        device: torch.device,
    ) -> None:
        self.layers, self.device = tuple(range(num_layers)), device
        self.budget = budget = shape.budget
        self.least = min(shares.least(budget, num_layers))
        self.num_slots = shape.trigger.num_slots(budget)
        self.is_exact = shares.fills_budget
        self._shape = shape
        self._impl = kernels.resolve_impl(shape.impl, device)
        self.is_compileable = self._impl == "triton"
        scopes = num_layers if shares.scope == "layer" else 1
        heads, batch, buffer = shape.num_kv_heads, shape.batch_size, shape.trigger.buffer
        self._use(
            Pages.zeros(
                scopes, batch, num_layers * heads // scopes, budget, buffer, shape.head_dim,
                dtype=shape.dtype, device=device, affine=contract.is_affine,
                fields=shape.entries(contract),
            ),
            tuple(contract.fields),
        )  # fmt: skip
        table, self._preferred = None, None
        if shares.table is not None:
            flat = torch.tensor(shares.table, dtype=torch.int32, device=device).flatten()
            table = flat.expand(batch, -1).contiguous()
        elif shares.preference is not None:
            self._preferred = PreferredSlots(
                shares.preference, budget, num_layers=num_layers, num_kv_heads=heads,
                batch_size=batch, device=device,
            )  # fmt: skip
            table = self._preferred.table[0]
        self._rule = ShareRule(
            budget, buffer, shares.min_per_head, shares.equal, shares.threshold, table
        )
        self._queries = shape.queries(contract, num_layers, device)
        # a preference reads the queries of a window
        self.fuses = self._impl == "triton" and self._preferred is None
        self._filling: _Filling | None = None
        mark_static(self.tensors())

    def _use(self, pages: Pages, names: Sequence[str]) -> None:
        self.pages = pages
        self.fields = dict(zip(names, pages.fields, strict=True))

    def remember(
        self, layer: int, call: Call, query: Tensor, query_nope: Tensor | None, t: Tensor
    ) -> None:
        """See :meth:`Storage.remember`."""
        self._queries.remember(layer, call, query, query_nope, t)

    def remembered(self, layer: int, t: Tensor) -> Pool:
        """See :meth:`Storage.remembered`."""
        return self._queries.given(layer, t)

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
        valid = None if call.valid is None else call.valid[:, 0]
        if tokens.fields:
            # `t` does not count padding, which writes into the next free slot; that stays free
            slot = self.num_valid(layer, t) - (1 if valid is None else valid[:, None].int())
            rows = self.pages.slot_rows(layer, slot[..., None])
            for name, new in tokens.fields.items():
                self.fields[name].flatten(0, 2).index_copy_(0, rows.flatten(), new.flatten(0, 2))
        output = kernels.ragged_append_attention.unchecked(
            query[:, :, 0],
            tokens.key[:, :, 0],
            tokens.value[:, :, 0],
            self.pages,
            t,
            layer=layer,
            valid=valid,
            new_slope=None if tokens.slope is None else tokens.slope[:, :, 0],
            new_offset=None if tokens.offset is None else tokens.offset[:, :, 0],
            decay=tokens.decay,
            rope=None if tokens.rope is None else tokens.rope.of_step(),
            scale=call.scale,
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
        """See :meth:`Storage.extend`. If heads differ much, each is attended to on its own."""
        count = self.num_valid(layer, t if self._drops_by_layer else t - call.num_real)
        lengths = count.amax(dim=0).tolist()
        is_even = call.valid is None and int(count.min()) == max(lengths)
        is_skewed = len(lengths) * max(lengths) > 2 * sum(lengths)
        heads = [slice(h, h + 1) for h in range(len(lengths))] if is_skewed else [slice(None)]
        group = query.shape[1] // key.shape[1]
        outputs = []
        for own in heads:
            members = (
                slice(None) if own.start is None else slice(own.start * group, own.stop * group)
            )
            rows = self._rows(layer, max(lengths[own]))[:, own]
            outputs.append(
                kernels.extend_attention(
                    query[:, members],
                    key[:, own],
                    value[:, own],
                    gather_slots(self.pages.key, rows),
                    gather_slots(self.pages.value, rows),
                    None if is_even else count[:, own].contiguous(),
                    valid=call.valid,
                    scale=call.scale,
                    impl=self._impl,
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

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
        """Not supported. Policies that need it are refused before."""
        raise NotImplementedError("slots in pages do not report attention mass")

    def mass(self, layer: int) -> Tensor | None:
        """See :meth:`Storage.mass`."""
        return None

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
        before = t if self._drops_by_layer else self._stored(call, t)
        stored, held = self.stored(layer, names, before)
        heads = self._shape.num_kv_heads
        new = {"position": call.position[:, None].expand(-1, heads, -1), **new}
        pool = {
            name: torch.cat((stored[name], tensor), dim=2)
            for name, tensor in new.items()
            if name in stored
        }
        return pool, torch.cat((held, call.real[:, None].expand(-1, heads, -1)), dim=2)

    def stored(self, layer: int, names: Sequence[str], t: Tensor) -> tuple[Pool, Tensor]:
        """See :meth:`Storage.stored`; as wide as the longest head of the layer."""
        count = self.num_valid(layer, t)
        rows = self._rows(layer, int(count.max()))
        wanted = {name: getattr(self.pages, name) for name in ("position", *names)} | self.fields
        pool = {name: gather_slots(tensor, rows) for name, tensor in wanted.items()}
        slot = torch.arange(rows.shape[2], device=self.device)
        return pool, slot < count[..., None]

    def write_fields(self, layer: int, pool: Pool, extent: Extent) -> Pool:
        """Not supported. Policies that observe are refused before."""
        raise NotImplementedError("slots in pages do not report attention mass")

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
        scope, own = self.pages.place(layer, self._shape.num_kv_heads)
        pages = self.pages.scope(scope)
        filling = self._filling
        if own.start == 0 or filling is None:
            filling = self._filling = self._begin(pages, call, t, has_scores=scores is not None)
        if not filling.is_due:
            self._store(call, pages, own.start, [tokens], [], filling.stored, t, None, None)
        else:
            if scores is not None and filling.scores is not None:
                held = scores.shape[2] - call.num_tokens
                filling.new_scores.append(scores[:, :, held:])
                before = t if filling.is_first else filling.stored
                self._place_scores(filling.scores, layer, scores[:, :, :held], before)
            if not filling.waiting:
                filling.first_head = own.start
            filling.waiting.append(tokens)
            self._prefer(layer, call, tokens.key, t, extent, filling.full[0])
            if filling.is_first or own.stop == pages.num_heads:
                self._choose(call, pages, filling, t)
        if own.stop == pages.num_heads:
            self._filling = None

    def _begin(self, pages: Pages, call: Call, t: Tensor, *, has_scores: bool) -> _Filling:
        full = pages.full_rows(t, self.budget, self._shape.trigger.buffer)
        is_due = bool(full.any())
        is_first = is_due and call.is_first and pages.num_heads > self._shape.num_kv_heads
        scores = None
        if is_due and has_scores:
            scores = torch.zeros(pages.position.shape, dtype=torch.float32, device=self.device)
        if is_first:  # from here on, `kept` is what a head holds
            pages.cut.copy_(t.expand_as(pages.cut))
        return _Filling(self._stored(call, t), full, is_due, is_first, scores)

    def _prefer(
        self,
        layer: int,
        call: Call,
        key: Tensor,
        t: Tensor,
        extent: Extent,
        full: Tensor,
    ) -> None:
        """Let the last queries of a layer say how much of the budget it deserves."""
        if self._preferred is None:
            return
        rule = self._preferred.rule
        pool, valid = self.candidates(layer, call, {"key": key}, ("key",), t, extent)
        queries = self._queries.last(layer, rule.window, t)
        found = rule.of_layer(*queries, pool["key"], pool["position"], valid, t, scale=call.scale)
        # a row that only takes a step decides nothing, as it would not on its own
        self._preferred.note(layer, found, full & (call.num_real > 1))

    @property
    def _drops_by_layer(self) -> bool:
        """Whether a first call is under way, in which tokens are dropped after each layer."""
        return self._filling is not None and self._filling.is_first

    def _stored(self, call: Call, t: Tensor) -> Tensor:
        """``[batch]`` int32: tokens that were stored before a call of several."""
        return t - call.num_real

    def _choose(self, call: Call, pages: Pages, filling: _Filling, t: Tensor) -> None:
        """Share the budget out over the slots of a scope and the waiting tokens."""
        stored = t if filling.is_first else filling.stored
        self._store(
            call, pages, filling.first_head, filling.waiting, filling.new_scores, stored, t,
            filling.full, filling.scores,
        )  # fmt: skip
        filling.waiting.clear()
        filling.new_scores.clear()

    def _store(
        self,
        call: Call,
        pages: Pages,
        first_head: int,
        layers: Sequence[NewTokens],
        new_scores: Sequence[Tensor],
        stored: Tensor,
        t: Tensor,
        full: Tensor | None,
        scores: Tensor | None,
    ) -> None:
        """Store the new tokens of some layers, of which the rows of ``full`` keep the best."""
        kernels.fill_pages(
            [tokens.key for tokens in layers],
            [tokens.value for tokens in layers],
            call.position,
            pages,
            t,
            stored,
            first_head=first_head,
            full=full,
            **self._rule.options(),
            new_slope=[x.slope for x in layers if x.slope is not None],
            new_offset=[x.offset for x in layers if x.offset is not None],
            scores=scores,
            new_scores=new_scores,
            new_fields=[x.fields[name] for x in layers for name in self.fields],
            valid=call.valid,
            sinks=self._shape.sinks,
            recent=self._shape.recent,
            impl=self._impl,
        )

    def _place_scores(self, onto: Tensor, layer: int, scores: Tensor, t: Tensor) -> None:
        """Write the scores ``[batch, num_kv_heads, slots]`` of a layer to its slots.

        Args:
            onto: ``[scopes, batch, num_slots]``, of all scopes or only the layer's.
            layer: The layer.
            scores: Of its slots.
            t: ``[batch]`` int32, tokens that are stored.
        """
        slot = torch.arange(scores.shape[2], device=self.device)
        valid = slot < self.num_valid(layer, t)[..., None]
        rows = self._rows(layer, scores.shape[2]) % onto.numel()
        onto.flatten()[rows[valid]] = scores[valid]

    def evict(self, t: Tensor, *, scores: Sequence[Tensor] | None) -> None:
        """See :meth:`Storage.evict`."""
        placed = None
        if scores is not None:
            shape = self.pages.position.shape
            placed = torch.zeros(shape, dtype=torch.float32, device=self.device)
            for layer, of_layer in zip(self.layers, scores, strict=True):
                self._place_scores(placed, layer, of_layer, t)
        kernels.shared_evict(
            self.pages,
            t,
            **self._rule.options(),
            scores=placed,
            sinks=self._shape.sinks,
            recent=self._shape.recent,
            impl=self._impl,
        )

    def counts(self, t: Tensor) -> Tensor:
        """See :meth:`Storage.counts`: the number of the fullest scope, rounded down."""
        held = self.pages.num_valid(t).sum(dim=-1)
        return (held // self.pages.num_heads).amax(dim=0).to(torch.int32)

    def take_back(self, count: int) -> None:
        """See :meth:`Storage.take_back`. Turning back the clock is enough."""

    def positions(self, layer: int, t: Tensor) -> Tensor:
        """See :meth:`Storage.positions`."""
        pool, valid = self.stored(layer, (), t)
        return pool["position"].masked_fill(~valid, -1)

    def num_valid(self, layer: int, t: Tensor) -> Tensor:
        """See :meth:`Storage.num_valid`."""
        scope, own = self.pages.place(layer, self._shape.num_kv_heads)
        return self.pages.scope(scope).num_valid(t)[0, :, own]

    def nan_seen(self, layer: int) -> Tensor:
        """See :meth:`Storage.nan_seen`."""
        scope, own = self.pages.place(layer, self._shape.num_kv_heads)
        return self._nan_seen[scope, own].amax()

    def set_nan_seen(self, layer: int, flag: Tensor) -> None:
        """See :meth:`Storage.set_nan_seen`."""
        scope, own = self.pages.place(layer, self._shape.num_kv_heads)
        self._nan_seen[scope, own] = flag

    @property
    def _nan_seen(self) -> Tensor:
        return required("nan_seen", self.pages.nan_seen)

    def _rows(self, layer: int, length: int) -> Tensor:
        """Rows of the flat tensors of a layer's first slots, ``[batch, num_kv_heads, length]``."""
        slot = torch.arange(length, device=self.device)
        heads = (self._shape.batch_size, self._shape.num_kv_heads)
        return self.pages.slot_rows(layer, slot.expand(*heads, length))

    def reset(self, rows: Tensor | None) -> None:
        """See :meth:`Storage.reset`. The slots keep their old contents."""
        chosen = slice(None) if rows is None else rows
        self.pages.clear(chosen, self.budget, self._shape.trigger.buffer)
        self._queries.reset(chosen)
        if self._preferred is not None:
            self._preferred.reset(chosen)
        if rows is None:
            self._nan_seen.zero_()
            self._filling = None

    def reorder(self, index: Tensor) -> None:
        """See :meth:`Storage.reorder`."""
        for _, tensor in self.named_state():
            # some slots at a time bound the temporary copy
            for part in tensor.split(_REORDERED, dim=2) if tensor.dim() > 2 else (tensor,):
                part.copy_(part.index_select(1, index))

    def select(self, index: Tensor) -> PagedSlots:
        """See :meth:`Storage.select`."""
        twin = PagedSlots.__new__(PagedSlots)
        twin.__dict__.update(self.__dict__)
        flags = self._nan_seen.clone()
        rows = replace(self.pages, nan_seen=None).map(lambda x: x.index_select(1, index))
        twin._use(replace(rows, nan_seen=flags), tuple(self.fields))
        if self._preferred is not None:
            twin._preferred = self._preferred.select(index)
            twin._rule = replace(self._rule, table=twin._preferred.table[0])
        elif self._rule.table is not None:
            twin._rule = replace(self._rule, table=self._rule.table.index_select(0, index))
        twin._queries = self._queries.select(index)
        twin._shape = replace(self._shape, batch_size=len(index))
        mark_static(twin.tensors())
        return twin

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """See :meth:`Storage.named_state`; batch is the second dimension of each."""
        for name in _STATE:
            tensor = getattr(self.pages, name)
            if tensor is not None:
                yield name, tensor
        yield from self._queries.named_state()
        if self._preferred is not None:
            yield "table", self._preferred.table
        for name, tensor in self.fields.items():
            yield f"fields.{name}", tensor

    def check_saved(self, saved: Mapping[str, Tensor], t: Tensor) -> None:
        """See :meth:`Storage.check_saved`."""
        check_pages(saved, t, self)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Storage.tensors`."""
        state = [tensor for _, tensor in self.named_state()]
        table = None if self._preferred is not None else self._rule.table
        return [*state, self._nan_seen, *(() if table is None else (table,))]


_REORDERED = 4096
_STATE = ("key", "value", "position", "slope", "offset", "page", "first_page", "kept", "cut")
