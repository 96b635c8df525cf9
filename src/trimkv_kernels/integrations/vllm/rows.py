"""Bounded rows in blocks of memory that an engine owns, one block for a row and layer.

An engine such as vLLM keeps a state of fixed size for each request and layer, hands out which block
is whose, and calls the layers one after the other with the tokens of whatever requests it runs.
`BoundedRows` says what is in a block and does a layer's call. It keeps nothing of a row itself, so
that a row depends on its block and its tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels import kernels
from trimkv_kernels.cache.call import Call, Inputs, Pool, states
from trimkv_kernels.cache.contract import Contract, field_shape
from trimkv_kernels.cache.pins import Pins
from trimkv_kernels.cache.queries import Queries
from trimkv_kernels.cache.ties import Ties
from trimkv_kernels.checks import check_heads, check_policy, check_protection
from trimkv_kernels.integrations.sharding import check_sharded
from trimkv_kernels.integrations.vllm.grid import Grid
from trimkv_kernels.kernels import Slots
from trimkv_kernels.policies.allocation import Allocation, Uniform
from trimkv_kernels.policies.base import ModelShape, RetentionPolicy, policy_name

_ALIGNMENT = 16  # bytes of a block are a multiple of this


@dataclass(frozen=True)
class StateEntry:
    """One tensor of a block: its name, its shape without the rows, and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Blocks:
    """The blocks of all rows of one layer.

    Attributes:
        slots: Of the one layer; its rows are the blocks.
        queries: What the policy keeps of the queries, by name: ``[blocks, num_heads, ...]``.
    """

    slots: Slots
    queries: dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The rows that take one token each in a call.

    Attributes:
        rows: ``[batch]`` int32, the block of each row.
        t: ``[batch]`` int32, tokens that each row has seen, this one included.
        due: Indices into ``rows`` of those that are cut after this token; None where the device is
            to find out, which only an affine policy can do.
        valid: ``[batch]`` bool, False for rows that only fill up a batch; None if there are none.
    """

    rows: Tensor
    t: Tensor
    due: Sequence[int] | None
    valid: Tensor | None = None


class BoundedRows:
    """Does the calls of attention layers on blocks.

    Args:
        policy: Scores the slots. It is bound to the model here.
        shape: The model, or this process's part of it.
        grid: When rows are cut.
        sinks, recent: First and last positions that are never evicted; None is the policy's own.
        allocation: How the budget is shared out, which must be `Uniform`; None is the policy's way.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Attributes:
        entries: What a block holds, in this order and without gaps.

    Raises:
        ValueError: the policy does not fit the model, or needs what rows in blocks cannot give.
    """

    def __init__(
        self,
        policy: RetentionPolicy,
        shape: ModelShape,
        grid: Grid,
        *,
        sinks: int | None = None,
        recent: int | None = None,
        allocation: Allocation | None = None,
        impl: str = "auto",
    ) -> None:
        check_servable(policy, allocation)
        check_heads(policy, shape.num_heads, shape.num_kv_heads)
        check_sharded(policy, shape)
        self.shape, self.grid = shape, grid
        self.sinks, self.recent, _ = check_protection(
            policy, [grid.budget], sinks=sinks, recent=recent, protect=()
        )
        self.policy = policy.bind(shape)
        self._contract = Contract(self.policy, shape.num_kv_heads, shape.num_heads)
        self._ties = Ties(self.sinks, self.recent, shape.dtype)
        self._pins = Pins((), 1, shape.device)
        self._impl = kernels.resolve_impl(impl, shape.device)
        self.entries = self._entries()

    @property
    def is_affine(self) -> bool:
        """Whether no Python runs at an eviction."""
        return self._contract.is_affine

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(entry.nbytes for entry in self.entries)

    def _entries(self) -> tuple[StateEntry, ...]:
        shape, capacity = self.shape, self.grid.capacity
        heads = (shape.num_kv_heads,)
        slots = (*heads, capacity)
        pair = (*slots, shape.head_dim)
        entries = [StateEntry(name, pair, shape.dtype) for name in ("key", "value")]
        line = ("slope", "offset") if self._contract.is_affine else ()
        small = [StateEntry("position", slots, torch.int32)]
        small += [StateEntry(name, slots, torch.float32) for name in line]
        small += [StateEntry(name, heads, torch.int32) for name in ("num_valid", "capacity")]
        group = (shape.num_heads or 0) // shape.num_kv_heads
        for name, spec in self._contract.fields.items():
            inner = field_shape(spec, group)
            small.append(StateEntry(f"fields.{name}", (*slots, *inner), spec.dtype))
        for name, tensor in self._queries(torch.device("meta")).named_state():
            small.append(StateEntry(name, tuple(tensor.shape[2:]), tensor.dtype))
        # what has larger elements first, so that each entry begins at a multiple of its element
        entries += sorted(small, key=lambda entry: -entry.dtype.itemsize)
        rest = -sum(entry.nbytes for entry in entries) % _ALIGNMENT
        if rest:
            entries.append(StateEntry("unused", (rest,), torch.uint8))
        return tuple(entries)

    def _queries(self, device: torch.device) -> Queries:
        """What is kept of the queries of one row."""
        return Queries(
            self._contract.needs,
            num_layers=1,
            batch_size=1,
            num_heads=self.shape.num_heads,
            head_dim=self.shape.head_dim,
            sinks=self.sinks,
            dtype=self.shape.dtype,
            device=device,
        )

    def blocks(self, tensors: Sequence[Tensor]) -> Blocks:
        """One layer's blocks from its tensors ``[blocks, ...]``, in the order of `entries`."""
        named = {entry.name: x for entry, x in zip(self.entries, tensors, strict=True)}
        fields = [named[f"fields.{name}"][None] for name in self._contract.fields]
        names = ("key", "value", "position", "slope", "offset", "num_valid", "capacity")
        slots = {name: named[name][None] for name in names if name in named}
        kept = dict(self._queries(torch.device("meta")).named_state())
        return Blocks(Slots(**slots, fields=tuple(fields)), {name: named[name] for name in kept})

    def read(
        self, layer: int, blocks: Blocks, row: int, start: int, inputs: Inputs, scale: float | None
    ) -> Tensor:
        """One layer's call on a piece of a row's text: any number of tokens.

        Args:
            layer: The layer.
            blocks: Its blocks.
            row: The row's block. What it holds counts only if ``start`` is above 0.
            start: Tokens that the row has seen before.
            inputs: ``query`` ``[1, num_heads, new, head_dim]`` and so on.
            scale: Softmax scale; None is ``head_dim ** -0.5``.

        Returns:
            ``[1, num_heads, new, head_dim]``.
        """
        query, _, _ = states(inputs)
        slots = blocks.slots.row(row)
        own = {name: tensor[row : row + 1] for name, tensor in blocks.queries.items()}
        if start == 0:
            slots.num_valid.zero_()
            slots.capacity.fill_(self.grid.capacity)
            for tensor in own.values():
                tensor.zero_()
        outputs = []
        for begin, end in self.grid.pieces(start, start + query.shape[2]):
            piece = {
                name: None if x is None else x[..., begin - start : end - start, :]
                for name, x in inputs.items()
            }
            outputs.append(self._read_piece(layer, slots, own, begin, end, piece, scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _read_piece(
        self,
        layer: int,
        slots: Slots,
        kept: dict[str, Tensor],
        begin: int,
        end: int,
        inputs: Inputs,
        scale: float | None,
    ) -> Tensor:
        """Read tokens ``[begin, end)``, at the end of which the row may be cut."""
        query, key, value = states(inputs)
        held, new, device = self.grid.held(begin), end - begin, query.device
        t = torch.full((1,), end, dtype=torch.int32, device=device)
        position = torch.arange(begin, end, dtype=torch.int32, device=device)[None]
        real = torch.ones_like(position, dtype=torch.bool)
        call = Call(None, real, position, [new], begin == 0)
        output = kernels.extend_attention(
            query, key, value, slots.key[0, :, :, :held], slots.value[0, :, :, :held],
            scale=scale, impl=self._impl,
        )  # fmt: skip
        queries = self._remember(kept, call, inputs, t)
        tokens = self._contract.tokens(layer, t, call, inputs)
        fields = self._contract.new_fields(tokens)
        slope, offset = self._contract.affine(tokens, self._pins)
        scores = None
        if not self.is_affine:
            # while nothing is dropped the scores do not matter
            shape = (1, self.shape.num_kv_heads, held + new)
            scores = torch.zeros(shape, dtype=torch.float32, device=device)
            if self.grid.is_cut(end):
                added = {"key": key, "value": value, "position": position[:, None], **fields}
                pool = {
                    name: torch.cat((x[:, :, :held], _every_head(added[name], x)), dim=2)
                    for name, x in self._stored(slots).items()
                }
                scores = self._score(layer, t, pool, queries)
        kernels.fill_slots(
            key, value, position, slots, t,
            layer=0, buffer=self.grid.buffer, new_slope=slope, new_offset=offset, scores=scores,
            sinks=self.sinks, recent=self.recent, new_fields=tuple(fields.values()),
            max_valid=held, impl=self._impl,
        )  # fmt: skip
        return output

    def step(
        self, layer: int, blocks: Blocks, step: Step, inputs: Inputs, scale: float | None
    ) -> Tensor:
        """One layer's call on one token of each of some rows.

        Args:
            layer: The layer.
            blocks: Its blocks.
            step: Which rows.
            inputs: ``query`` ``[batch, num_heads, 1, head_dim]`` and so on.
            scale: Softmax scale; None is ``head_dim ** -0.5``.

        Returns:
            ``[batch, num_heads, 1, head_dim]``.
        """
        query, key, value = states(inputs)
        slots, rows, t = blocks.slots, step.rows, step.t
        real = torch.ones_like(t, dtype=torch.bool) if step.valid is None else step.valid
        valid = None if step.valid is None else real[:, None]
        call = Call(valid, real[:, None], (t - 1)[:, None], None, False)
        index = rows.long() if blocks.queries or slots.fields else rows
        queries = {}
        if blocks.queries:
            # they change as a whole with every token
            kept = {name: tensor[index] for name, tensor in blocks.queries.items()}
            queries = self._remember(kept, call, inputs, t)
            for name, tensor in blocks.queries.items():
                tensor[index] = kept[name]
        tokens = self._contract.tokens(layer, t, call, inputs)
        fields = self._contract.new_fields(tokens)
        slope, offset = self._contract.affine(tokens, self._pins)
        if fields:
            # the token's slot; that of a row that only fills up the batch stays free
            slot = slots.num_valid[0, index].clamp(max=slots.num_slots - 1).long()
            head = torch.arange(slot.shape[1], device=slot.device)
            for field, new in zip(slots.fields, fields.values(), strict=True):
                field[0][index[:, None], head, slot] = new[:, :, 0]
        output = kernels.append_attention.unchecked(
            query[:, :, 0], key[:, :, 0], value[:, :, 0], slots, t,
            layer=0, rows=rows, valid=step.valid,
            new_slope=None if slope is None else slope[:, :, 0],
            new_offset=None if offset is None else offset[:, :, 0],
            scale=scale, packed=True, impl=self._impl,
        )  # fmt: skip
        self._cut(layer, slots, step, queries)
        return output[:, :, None]

    def _cut(self, layer: int, slots: Slots, step: Step, queries: Pool) -> None:
        """Evict in the rows of a step that are due."""
        rows, t, scores = step.rows, step.t, None
        if step.due is not None:
            if not step.due:
                return
            if len(step.due) < len(rows):
                due = torch.tensor(step.due, device=rows.device)
                rows, t = rows[due], t[due]
                queries = {name: x[due] for name, x in queries.items()}
        if not self.is_affine:
            index = rows.long()
            pool = {name: x[index] for name, x in self._stored(slots).items()}
            scores = self._score(layer, t, pool, queries)[None]
        kernels.evict(
            slots, t, buffer=self.grid.buffer, rows=rows, scores=scores,
            sinks=self.sinks, recent=self.recent, impl=self._impl,
        )  # fmt: skip

    def _remember(self, kept: Pool, call: Call, inputs: Inputs, t: Tensor) -> Pool:
        """Take a call's queries into ``kept``, in place; what a score gets of them."""
        if not kept:
            return {}
        queries = self._queries(torch.device("meta"))
        named = {name: tensor[None] for name, tensor in kept.items()}
        queries.window = named.get("queries")
        queries.mean, queries.scatter = named.get("query_mean"), named.get("query_scatter")
        query, _, _ = states(inputs)
        queries.remember(0, call, query, inputs["query_nope"], t)
        return queries.given(0, t)

    def _stored(self, slots: Slots) -> Pool:
        """What a score gets of the slots, each ``[rows, num_kv_heads, num_slots, ...]``."""
        pool = {"position": slots.position[0]}
        pool |= {name: getattr(slots, name)[0] for name in self._contract.needs.score}
        fields = zip(self._contract.fields, slots.fields, strict=True)
        return pool | {name: tensor[0] for name, tensor in fields}

    def _score(self, layer: int, t: Tensor, pool: Pool, queries: Pool) -> Tensor:
        """The policy's scores of full rows: every candidate is valid."""
        return self._contract.score(
            layer,
            t,
            pool,
            torch.ones_like(pool["position"], dtype=torch.bool),
            budget=self.grid.budget,
            queries=queries,
            pins=self._pins,
            ties=self._ties,
        )


def check_servable(policy: RetentionPolicy, allocation: Allocation | None = None) -> None:
    """Raise unless rows in blocks can give a policy what it needs.

    Args:
        policy: Scores the slots.
        allocation: How the budget is shared out; None is the policy's own way.

    Raises:
        TypeError: it is no policy.
        ValueError: names what it needs, and what to use instead.
    """
    check_policy(policy)
    name, reason = policy_name(policy), None
    if policy.needs.attention is not None:
        reason = "needs the attention that each pair receives, which is not reported here"
    elif policy.capacity_only:
        reason = "never evicts, and a row has a fixed number of slots"
    elif not isinstance(allocation or policy.allocation, Uniform):
        raise ValueError(
            f"policy {name!r} shares a budget out by {allocation or policy.allocation}, and here "
            'every head has the same: say so with "allocation": "uniform", or use generate() on a '
            "patched model"
        )
    if reason is not None:
        raise ValueError(
            f"policy {name!r} {reason}: choose another policy, or use it with generate() on a "
            "patched model"
        )


def _every_head(new: Tensor, like: Tensor) -> Tensor:
    """New tokens' numbers, for each head of ``like`` where they are the same for all."""
    return new.expand(*like.shape[:2], *new.shape[2:])
