"""`BoundedKVCache`: key/value pairs in a fixed number of slots, for any engine.

A layer's call inserts its new pairs and attends to all valid slots. When a head has filled its
slots, :meth:`BoundedKVCache.evict` keeps the ``budget`` highest scores of the policy. Keys are
stored after RoPE at their original positions, so slot order does not matter to attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trimkv_kernels.cache import files
from trimkv_kernels.cache.call import Inputs, Progress
from trimkv_kernels.cache.checks import CallChecks, bind_policy, check_devices, check_sizes
from trimkv_kernels.cache.contract import Contract
from trimkv_kernels.cache.dense import CacheShape
from trimkv_kernels.cache.drafts import Drafts
from trimkv_kernels.cache.replay import replay
from trimkv_kernels.cache.routes import Routes
from trimkv_kernels.cache.rows import RowOperations
from trimkv_kernels.cache.state import State
from trimkv_kernels.cache.stats import CacheStats, read_stats
from trimkv_kernels.cache.storage import Storage
from trimkv_kernels.cache.ties import Ties
from trimkv_kernels.checks import (
    Span,
    check_budget,
    check_heads,
    check_policy,
    check_protection,
    check_shared,
)
from trimkv_kernels.kernels.prologue import Rope
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.base import RetentionPolicy, policy_fingerprint
from trimkv_kernels.policies.trigger import WhenFull

Impl = Literal["auto", "triton", "torch"]


class BoundedKVCache(RowOperations):
    """A key/value cache of fixed size that keeps what its policy scores highest.

    A step is one :meth:`attend` per layer, in order, then :meth:`evict`. State lives in tensors at
    fixed addresses: a :class:`~trimkv_kernels.cache.storage.Storage` for the layers of one budget
    on one device, and a :class:`~trimkv_kernels.cache.clock.Clock`.

    Args:
        policy: Scores the slots.
        num_layers, num_kv_heads, head_dim, batch_size: Shape of the cache.
        budget: Pairs that each head keeps when it evicts; with an allocation, their mean.
        buffer: New tokens a full head takes before the next eviction.
        num_heads: Query heads; needed by policies that keep something for each of them.
        sinks: First positions that are never evicted; None is the policy's own number.
        recent: Last positions that are never evicted; None is the policy's own number.
        protect: Spans ``(start, stop)`` of positions that are never evicted, in every row; see
            :meth:`pin` for spans of single rows.
        allocation: How layers and heads share the budget; None is the policy's own rule.
        dtype: fp32, fp16 or bf16.
        device: Device of the state, or one device per layer. The clock is on layer 0's device,
            and other devices have copies of it.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.
        strict: :meth:`stats` raises if the budget was never reached or a score was NaN.
        rows_apart: What a row computes has the same bits whatever the other rows hold, as serving
            needs. On torch, attention then covers all slots, empty ones included.

    Raises:
        ValueError: a size is out of range, a layer's budget does not exceed the protected slots, or
            the policy needs something that this cache cannot give.
    """

    def __init__(
        self,
        policy: RetentionPolicy,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        batch_size: int,
        budget: int,
        buffer: int,
        num_heads: int | None = None,
        sinks: int | None = None,
        recent: int | None = None,
        protect: Sequence[Span] = (),
        allocation: Allocation | None = None,
        dtype: torch.dtype,
        device: torch.device | str | Sequence[torch.device | str],
        impl: Impl = "auto",
        strict: bool = False,
        rows_apart: bool = False,
    ) -> None:
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        check_sizes(dtype, **sizes, batch_size=batch_size)
        check_policy(policy)
        self.allocation = allocation = policy.allocation if allocation is None else allocation
        check_heads(policy, num_heads, num_kv_heads, allocation)
        self.budgets = check_budget(policy, budget, buffer, num_layers, num_kv_heads, allocation)
        self.sinks, self.recent, protected = check_protection(
            policy, self.budgets, sinks=sinks, recent=recent, protect=protect
        )
        self.devices = check_devices(device, num_layers)
        self.device = self.devices[0]
        check_shared(policy, self.allocation, self.devices)
        self.policy = bind_policy(policy, self.devices, dtype, num_heads, **sizes)
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.num_heads, self.batch_size = num_heads, batch_size
        self.budget, self.trigger = budget, WhenFull(buffer)
        self.dtype, self.impl, self.strict = dtype, impl, strict
        self._contract = Contract(self.policy, num_kv_heads, num_heads)
        self.needs = self._contract.needs
        name, needs = self._contract.name, self._contract.needs
        self._checks = CallChecks(name, needs, num_kv_heads, head_dim, num_heads, dtype)
        shape = CacheShape(
            batch_size, num_heads, num_kv_heads, head_dim,
            self.trigger, self.sinks, self.recent, dtype, impl, budget, self.allocation.shares,
            rows_apart,
        )  # fmt: skip
        self._use(State.allocate(self._contract, shape, self.budgets, self.devices, protected))
        self._draft = Drafts(num_layers)
        self._progress = Progress(num_layers)

    def _use(self, state: State) -> None:
        ties = Ties(self.sinks, self.recent, self.dtype)
        self._state, self._routes = state, Routes(self._contract, state, ties)
        storages = state.storages
        self._fuses = not self._contract.reads_states and all(x.fuses for x in storages)

    def __repr__(self) -> str:
        return (
            f"BoundedKVCache(policy={self._contract.name!r}, layers={self.num_layers}, "
            f"rows={self.batch_size}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"budget={self.budget}, buffer={self.buffer}, dtype={self.dtype}, "
            f"device='{self.device}')"
        )

    @property
    def buffer(self) -> int:
        """New tokens a full head takes before the next eviction."""
        return self.trigger.buffer

    @property
    def num_slots(self) -> int:
        """Slots of each head in the layer that has the most."""
        return max(storage.num_slots for storage in self._state.storages)

    @property
    def storages(self) -> list[Storage]:
        """Where the pairs are: one storage per budget and device."""
        return self._state.storages

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step reads nothing back and can be captured or compiled."""
        on_device = len(set(self.devices)) == 1 and all(x.is_compileable for x in self.storages)
        return self.policy.is_compileable and on_device

    @property
    def t(self) -> Tensor:
        """``[batch]`` int32, real tokens that each row has seen."""
        return self._state.clock.t

    @property
    def seen(self) -> Tensor:
        """int64 scalar, tokens of a row that were seen, padding included."""
        return self._state.clock.seen

    @property
    def is_empty(self) -> bool:
        """Whether the cache got no token since it was made or reset."""
        return self._state.counts.is_empty and not self._draft.is_waiting

    @property
    def is_holding(self) -> bool:
        """Whether tokens wait outside the slots until they are confirmed, see :meth:`hold`."""
        return self._draft.is_holding

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor | None = None,
        query_nope: Tensor | None = None,
        key_nope: Tensor | None = None,
        valid: Tensor | None = None,
        scale: float | None = None,
        self_attention: Callable[[], Tensor] | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """Insert one layer's new tokens and attend to all valid slots, the new ones included.

        Args:
            layer: Layer index; layers are called in order, 0 starts a new call.
            query: ``[batch, num_heads, q_len, head_dim]`` after RoPE.
            key, value: ``[batch, num_kv_heads, q_len, head_dim]``, key after RoPE.
            hidden_states: ``[batch, q_len, hidden_size]``, for policies that need it.
            query_nope, key_nope: As ``query`` and ``key``, before RoPE, for policies that need it.
            valid: ``[batch, q_len]`` bool, False for padding, which is never stored; None: all
                real. A call's padding comes before its real tokens.
            scale: Softmax scale; None is ``head_dim ** -0.5``.
            self_attention: The call's causal attention to itself, ``[batch, num_heads, q_len,
                head_dim]``; used instead of ours while nothing is stored, unless the policy needs
                to see attention.
            rope: ``query`` and ``key`` come before their norm and RoPE, and this is what remains to
                be done; its ``cos`` is ``[batch, q_len, head_dim]``. A decode step may leave it to
                the launch that attends, see :meth:`fuses_rope`. ``query_nope`` and ``key_nope``
                follow from it.

        Returns:
            ``[batch, num_heads, q_len, head_dim]``, dtype of ``query``. The output of padding is
            unspecified.

        Raises:
            ValueError: a shape, dtype or device disagrees, layers come out of order, gradients
                would flow into the slots, something that the policy needs is missing, the policy's
                capacity would be exceeded, or a head is full because :meth:`evict` was left out.
        """
        inputs: Inputs = {"query": query, "key": key, "value": value}
        inputs |= {"hidden_states": hidden_states, "query_nope": query_nope, "key_nope": key_nope}
        self._progress.check_order(layer)
        self._checks.check(inputs, valid, rope, self.batch_size, self.devices[layer])
        if rope is not None and not self.fuses_rope(query.shape[2]):
            inputs |= _finished(query, key, rope)
            rope = None
        self._draft.check_scale(scale)
        if layer == 0:
            self._begin(query.shape[2], valid, scale)
        call = self._progress.at(key.device, scale)
        if self._draft.is_waiting:
            waiting = self._draft.extend(layer, inputs, key.device)
            output = self._routes.draft(layer, waiting, query.shape[2])
        elif query.shape[2] == 1:
            output = self._routes.decode(layer, call, inputs, rope)
        else:
            output = self._routes.read(layer, call, inputs, self_attention)
        self._progress.advance()
        if not (self._progress.is_under_way or self._draft.is_waiting):
            self._state.counts.add(call.added, call.undoable, chosen=call.num_tokens > 1)
        return output

    def fuses_rope(self, new: int) -> bool:
        """Whether a call of ``new`` tokens leaves ``rope`` to the launch that attends.

        A decode step does on Triton, where neither the policy nor the allocation reads queries or
        keys. Otherwise :meth:`attend` applies it first, and nothing is gained.
        """
        return new == 1 and self._fuses and not self._draft.is_holding

    def _begin(self, new: int, valid: Tensor | None, scale: float | None) -> None:
        """Count a call's tokens on the device, and on the host if it knows them."""
        if new == 1 and not self._draft.is_holding:
            self._state.check_room()
        never_evicts = self._contract.name if self.policy.capacity_only else None
        call = self._state.begin(
            new, valid, self.is_empty, never_evicts, self._draft.is_waiting, scale
        )
        self._progress.begin(call)
        if self._draft.is_holding:
            self._draft.begin(call)
        else:
            self._state.counts.is_empty = False

    def evict(self) -> None:
        """Cut every full head back to its budget. To be called after the last layer.

        One launch serves all layers of one budget. Unless the host knows that no head is full, the
        device decides, so the call can be captured or compiled.

        Raises:
            ValueError: a call is under way.
        """
        self._progress.check_between_calls("evict")
        if not self._draft.is_waiting:  # waiting tokens fill no slots
            self._routes.evict()

    def hold(self) -> None:
        """Let new tokens wait outside the slots until :meth:`settle` confirms them.

        Attention sees them. They cause no eviction, observation or score until they are confirmed,
        so a rejected draft leaves no trace.
        """
        self._draft.hold()

    def settle(self, drop: int = 0, *, one_by_one: bool = False) -> None:
        """Confirm the waiting tokens except the last ``drop``, and continue to hold new ones.

        They are stored as one call, or with ``one_by_one`` as if each were a call of its own.

        Raises:
            ValueError: fewer tokens wait, or a call is under way.
        """
        self._progress.check_between_calls("settle")
        waiting, taken = self._draft.num_columns, self._draft.take(drop)
        if taken is None:
            return
        keep = waiting - drop
        if one_by_one and (self._contract.observation is not None or keep > self.room):
            self._state.clock.take_back(taken.call.num_real.to(self.device), waiting)
            self._draft.end()
            replay(self, taken.first_tokens(keep))
            self._draft.hold()
            return
        dropped = taken.call.real[:, keep:].sum(dim=1, dtype=torch.int32)
        self._state.clock.take_back(dropped.to(self.device), drop)
        if keep > 0:
            self._routes.confirm(taken.first_tokens(keep))

    def release(self) -> None:
        """Confirm the waiting tokens and stop holding."""
        self.settle()
        self._draft.end()

    def crop(self, count: int) -> None:
        """Take back the last ``count`` tokens of every row.

        Waiting tokens (see :meth:`hold`) can always be taken back; the rest of them is confirmed.
        Stored tokens can be taken back as long as nothing was evicted since. Positions, keys,
        values and fields of insertion are then restored exactly.

        Raises:
            ValueError: something was evicted or padded since, or the policy has observed the
                tokens, which cannot be undone; nothing is changed.
        """
        if self.is_holding:
            return self.settle(drop=count)
        self._progress.check_between_calls("crop")
        if count != 0:
            self._state.check_take_back(count, self._contract)
            self._state.take_back(count)

    @property
    def room(self) -> int:
        """Tokens that every row can take, beside waiting ones, before a head is full."""
        self._state.learn_counts()
        return self._state.counts.room(never_evicts=self.policy.capacity_only)

    def forget_counts(self) -> None:
        """Let only the device count, until the next call of more than one token.

        Every :meth:`evict` is then launched, and checks on the device whether a head is full.
        """
        self._state.counts.forget()

    def abandon_call(self) -> None:
        """Forget a call that was cut short before the device ran any of it."""
        self._progress.end()

    @contextmanager
    def counting_a_step(self, added: Sequence[int] | None = None) -> Iterator[None]:
        """Count a decode step on the host, around a replay, which runs no host code.

        Args:
            added: Tokens of each row, 0 or 1. None counts every row, so the next :meth:`evict` is
                never too late. If some rows have finished it may be too early, which the device
                notices. Call :meth:`forget_counts` when those rows continue.
        """
        self._state.learn_counts()
        counts = self._state.counts.after_step([1] * self.batch_size if added is None else added)
        yield
        self._state.counts = counts

    def uncount_padding(self, columns: int) -> None:
        """Take back the last ``columns`` calls of one token, in which every row was padding."""
        self._state.clock.take_back(0, columns)

    def keys(self, layer: int) -> Tensor:
        """A layer's keys, ``[batch, num_kv_heads, num_slots, head_dim]``; not a copy."""
        return self._stored(layer, "key")

    def values(self, layer: int) -> Tensor:
        """A layer's values, as :meth:`keys`."""
        return self._stored(layer, "value")

    def positions(self, layer: int) -> Tensor:
        """``[batch, num_kv_heads, num_slots]`` int32: each slot's position, -1 if it is empty."""
        return self._state.storage(layer).positions(layer, self._stored_t(layer))

    def _stored(self, layer: int, name: str) -> Tensor:
        t = self._stored_t(layer)
        return self._state.storage(layer).stored(layer, (name,), t)[0][name]

    def _stored_t(self, layer: int) -> Tensor:
        """``[batch]`` int32, each row's confirmed tokens, on a layer's device."""
        device = self._state.storage(layer).device
        waiting = self._draft.num_waiting(self.batch_size).to(device)
        return self._state.t(layer) - waiting

    @property
    def pinned(self) -> Tensor | None:
        """``[batch, spans, 2]`` int32, the protected spans; None if there are none.

        A captured step reads this tensor: another one after a change means to capture it again.
        """
        return self._state.pins.table

    def pin(self, spans: Sequence[Sequence[Span]]) -> None:
        """Protect more positions of each row, before their tokens are inserted.

        Args:
            spans: For each row its spans ``(start, stop)``, added to those it has.

        Raises:
            ValueError: not one list for each row, a span is not a span, or a layer's budget would
                not exceed the protected slots. The spans stay as they were.
        """
        self._state.pins.add(spans, self.budgets, self.sinks, self.recent)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads and writes, scratch included."""
        pinned = self._state.pins.table
        return [*self._state.tensors(), *(() if pinned is None else (pinned,))]

    def fingerprint(self) -> dict[str, str]:
        """What a file's cache and this one must have in common, as texts by name."""
        own = {"batch_size": str(self.batch_size), "policy": policy_fingerprint(self.policy)}
        return self._kind() | own

    def _kind(self) -> dict[str, str]:
        """The part of the fingerprint that is neither the number of rows nor the policy."""
        names = ("num_layers", "num_kv_heads", "head_dim", "budgets", "buffer")
        parts = {name: getattr(self, name) for name in (*names, "sinks", "recent", "dtype")}
        parts["storages"] = [storage.layers for storage in self.storages]
        if not self.allocation.is_fixed:
            parts["storages"] = f"{self.allocation} of budget {self.budget}"
        return {name: str(part) for name, part in parts.items()}

    def save(self, path: str | Path, **extra: str) -> None:
        """Write the slots and their fingerprint as safetensors; a failed write changes nothing.

        Args:
            path: The file; an existing one is replaced.
            **extra: More entries of the fingerprint, such as the model's.

        Raises:
            ValueError: a call is under way, or tokens wait to be confirmed.
            OSError: the file cannot be written.
        """
        self._progress.check_between_calls("save")
        self._draft.check_settled("save")
        files.write(path, self._state.saved(), self.fingerprint() | extra)

    def load(self, path: str | Path, **extra: str) -> None:
        """Replace the slots by those of a file that :meth:`save` wrote.

        Args:
            path: The file.
            **extra: What :meth:`save` was given.

        Raises:
            ValueError: :meth:`save` did not write the file, its fingerprint differs, or a number in
                it cannot be; the first difference is named. The cache stays as it was.
        """
        saved = files.read(path, self._state, self.fingerprint() | extra, self.device)
        self.reset()
        self._state.load(saved)

    def stats(self) -> CacheStats:
        """What the cache did so far. Reads the device.

        Raises:
            RuntimeError: with ``strict=True``, no head ever evicted or a score was NaN.
        """
        pair = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        waiting = self._draft.num_waiting(self.batch_size)
        stats = read_stats(self._state, self.num_layers, waiting, pair)
        return stats.checked(self._contract.name, self.num_slots) if self.strict else stats


def _finished(query: Tensor, key: Tensor, rope: Rope) -> Inputs:
    """Queries and keys before and after RoPE, by name."""
    query_nope, key_nope = rope.normed(query, key)
    query, key = rope.applied(query, key)
    return {"query": query, "key": key, "query_nope": query_nope, "key_nope": key_nope}
