"""`BoundedKVCache`: key/value pairs in a fixed number of slots, for any engine.

Each (layer, batch row, KV head) owns ``num_slots = budget + buffer`` slots, front-packed. A layer's
call inserts its new pairs and attends to all valid slots; when a head has filled its slots,
:meth:`BoundedKVCache.evict` keeps the ``budget`` highest scores of the policy. Keys are stored
after RoPE at their original positions, so slot order does not matter to attention.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimkv_kernels import kernels
from trimkv_kernels.checks import (
    Span,
    check_budget,
    check_heads,
    check_policy,
    check_positive,
    check_protected,
    check_protection,
    check_spans,
)
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.base import (
    AttentionStat,
    ModelShape,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    policy_fingerprint,
    policy_name,
)
from trimkv_kernels.policies.trigger import WhenFull
from trimkv_kernels.slots import SlotGroup, field_shape, mark_static, window_positions

Impl = Literal["auto", "triton", "torch"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CacheStats:
    """What a cache did, read from the device.

    Attributes:
        tokens_seen: Real tokens of each batch row.
        slots_used: ``[layers, batch, num_kv_heads]`` int32, slots filled now.
        evictions: ``[layers, batch, num_kv_heads]`` int32, pairs dropped so far.
        bytes_held: Bytes of all state, metadata included.
        bytes_full: Bytes of the keys and values a full cache would hold for the same tokens.
        nan_layers: Layers in which a score was NaN.
        budget_reached: Whether any head had to evict.
    """

    tokens_seen: list[int]
    slots_used: Tensor
    evictions: Tensor
    bytes_held: int
    bytes_full: int
    nan_layers: list[int]

    @property
    def budget_reached(self) -> bool:
        return bool((self.evictions > 0).any())

    def __str__(self) -> str:
        return (
            f"{max(self.tokens_seen, default=0)} tokens seen, "
            f"at most {int(self.slots_used.max())} slots used, "
            f"{int(self.evictions.sum())} pairs evicted, "
            f"{self.bytes_held:,} bytes held (full cache: {self.bytes_full:,})"
        )


@dataclass(frozen=True)
class _Call:
    """One forward pass over new tokens, the same for every layer."""

    valid: Tensor | None  # [batch, new] bool, None when every token is real
    real: Tensor  # the same, always a tensor
    position: Tensor  # [batch, new] int32
    added: list[int] | None  # real tokens of each row, where the host knows
    first: bool  # nothing was inserted before


@dataclass(frozen=True)
class _Layer:
    """Where a layer's slots are: one group, and its place there."""

    layer: int
    group: SlotGroup
    index: int

    @property
    def key(self) -> Tensor:
        return self.group.key[self.index]

    @property
    def value(self) -> Tensor:
        return self.group.value[self.index]

    @property
    def num_valid(self) -> Tensor:
        return self.group.num_valid[self.index]


@dataclass(frozen=True)
class _Draft:
    """Tokens that are not confirmed yet: they have been attended to, but are not in the slots."""

    call: _Call
    inputs: list[dict[str, Tensor | None]]  # of each layer, all unconfirmed tokens
    scale: float | None


Pool = dict[str, Tensor]  # slots, and behind them a call's new tokens, by name


class BoundedKVCache:
    """A key/value cache of fixed size that keeps what its policy scores highest.

    A step is one :meth:`attend` per layer, in order, then :meth:`evict`. State lives in base
    tensors at fixed addresses: those of :class:`~trimkv_kernels.slots.SlotGroup`, one group for the
    layers of one budget on one device; ``t`` int32 ``[batch]``, real tokens seen; ``seen`` int64
    scalar, all tokens seen, padding included.

    Args:
        policy: Scores the slots.
        num_layers, num_kv_heads, head_dim, batch_size: Shape of the cache.
        budget: Slots of each head that survive an eviction; with an allocation their mean.
        buffer: New tokens a full head takes before the next eviction.
        num_heads: Query heads; needed by policies that keep something for each of them.
        sinks: First positions that are never evicted; None is the policy's own number.
        recent: Last positions that are never evicted; None is the policy's own number.
        protect: Spans ``(start, stop)`` of positions that are never evicted, in every row; see
            :meth:`pin` for spans of single rows.
        allocation: How the budget is shared out over the layers; None is the policy's own way.
        dtype: fp32, fp16 or bf16.
        device: Where the state lives, or for each layer where its state lives; ``t`` and ``seen``
            are with layer 0, and other devices have copies of ``t``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.
        strict: :meth:`stats` raises where the budget was never reached or a score was NaN.

    Raises:
        ValueError: a size is out of range, a layer's budget does not exceed the protected slots, or
            the policy needs what this cache cannot give.
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
    ) -> None:
        for argument, size in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("batch_size", batch_size),
        ):
            check_positive(argument, size)
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {dtype}")
        check_policy(policy)
        check_heads(policy, num_heads, num_kv_heads)
        self.budgets = check_budget(policy, budget, buffer, num_layers, allocation)
        self.sinks, self.recent, spans = check_protection(
            policy, self.budgets, sinks=sinks, recent=recent, protect=protect
        )
        self.devices = _check_devices(device, num_layers)
        self.device = self.devices[0]
        self.impl = impl
        self._resolved_impls = [kernels.resolve_impl(impl, each) for each in self.devices]
        self.policy = policy.bind(
            ModelShape(
                num_layers=num_layers,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=self.device,
                layer_devices=self.devices,
                num_heads=num_heads,
            )
        )
        # read once: a policy may compute them
        self.needs, self._fields = self.policy.needs, dict(self.policy.fields)
        self._is_affine = self.policy.is_affine
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.num_heads, self.batch_size = num_heads, batch_size
        self.budget, self.trigger = budget, WhenFull(buffer)
        self.dtype, self.strict = dtype, strict
        self._protect = list(spans)
        self._spans: list[list[Span]] | None = [self._protect] * batch_size
        self._allocate()

    @property
    def buffer(self) -> int:
        """New tokens a full head takes before the next eviction."""
        return self.trigger.buffer

    @property
    def num_slots(self) -> int:
        """Slots of each head, of the layer that has the most of them."""
        return max(group.num_slots for group in self.groups)

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step reads nothing back and can be captured or compiled."""
        return self.policy.is_compileable and len(set(self.devices)) == 1

    def _allocate(self) -> None:
        # normal tensors, also when the first call comes under inference_mode: the state must
        # stay writable when a later call does not
        with torch.inference_mode(False):
            layers_of: dict[tuple[int, torch.device], list[int]] = {}
            for layer, kind in enumerate(zip(self.budgets, self.devices, strict=True)):
                layers_of.setdefault(kind, []).append(layer)
            self.groups = [
                SlotGroup(
                    self.policy,
                    layers=layers,
                    batch_size=self.batch_size,
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_kv_heads,
                    head_dim=self.head_dim,
                    budget=budget,
                    num_slots=self.trigger.num_slots(budget),
                    dtype=self.dtype,
                    device=device,
                )
                for (budget, device), layers in layers_of.items()
            ]
            self._share_t(torch.zeros(self.batch_size, dtype=torch.int32, device=self.device))
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
            self._pins = self._pin_table([self._protect] * self.batch_size)
        mark_static([self.t, *self._t_copies, self.seen])
        self._layers = _places(self.groups)
        self.started = False
        self.is_holding = False
        self._next_layer = 0
        self._undoable = 0  # tokens since the last eviction, where the host knows
        self._call: _Call | None = None
        self._draft: _Draft | None = None

    def _share_t(self, t: Tensor) -> None:
        """Make ``t`` the cache's own, and give the groups on other devices copies of it."""
        self.t = t
        t_of = {self.device: t}
        for group in self.groups:
            if group.device not in t_of:
                t_of[group.device] = t.to(group.device, copy=True)
            group.t = t_of[group.device]
        self._t_copies = list(t_of.values())[1:]

    def _update_copies(self) -> None:
        """Bring ``t`` to the other devices, after every change of it."""
        for copied in self._t_copies:
            copied.copy_(self.t)

    # ---- one layer's call ------------------------------------------------------------------

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
    ) -> Tensor:
        """Insert one layer's new tokens and attend to all valid slots, the new ones included.

        Args:
            layer: Layer index; layers are called in order, 0 starts a new call.
            query: ``[batch, num_heads, q_len, head_dim]`` after RoPE.
            key, value: ``[batch, num_kv_heads, q_len, head_dim]``, key after RoPE.
            hidden_states: ``[batch, q_len, hidden_size]``, for policies that need it.
            query_nope, key_nope: As ``query`` and ``key``, before RoPE, for policies that need it.
            valid: ``[batch, q_len]`` bool, False for padding, which is never stored; None: all
                real. Real tokens of a call stand at its right end.
            scale: Softmax scale; None is ``head_dim ** -0.5``.
            self_attention: The call's causal attention to itself, ``[batch, num_heads, q_len,
                head_dim]``; used instead of ours while nothing is stored, unless the policy needs
                to see attention.

        Returns:
            ``[batch, num_heads, q_len, head_dim]``, dtype of ``query``. Padding's rows are
            unspecified.

        Raises:
            ValueError: a shape, dtype or device disagrees, layers come out of order, gradients
                would flow into the slots, something that the policy needs is missing, or the
                policy's capacity would be exceeded.
        """
        inputs = {
            "query": query,
            "key": key,
            "value": value,
            "hidden_states": hidden_states,
            "query_nope": query_nope,
            "key_nope": key_nope,
        }
        self._check_call(layer, inputs, valid)
        if layer == 0:
            self._call = self._begin(query.shape[2], valid)
            if self.is_holding:
                self._draft = self._extended_draft(self._call, scale)
        call = self._call
        if call is None:
            raise ValueError("layer must start at 0 for each call")
        self._next_layer = (layer + 1) % self.num_layers
        place = self._layers[layer]
        call = self._call = _moved(call, key.device)
        if self._draft is not None:
            output = self._attend_draft(self._draft, place, inputs)
        elif query.shape[2] == 1:
            tokens = self._tokens(layer, call, inputs)
            self._remember_queries(place, call, query, query_nope)
            output = self._decode(place, call, tokens, query, key, value, scale)
        else:
            output, attention = self._extend(place, call, query, key, value, scale, self_attention)
            self._insert(place, call, inputs, attention)
        if self._next_layer == 0:
            self._call = None
            if self._draft is None:
                self._count(call, chosen=query.shape[2] > 1)
        return output

    def _begin(self, new: int, valid: Tensor | None) -> _Call:
        known = self._know_lengths(new)
        added = None
        if known:
            added = [new] * self.batch_size if valid is None else _counts(valid)
            if self.policy.capacity_only:
                self._check_capacity(added or [new] * self.batch_size)
        before = self.t[:, None]
        if valid is None:
            steps = torch.arange(new, dtype=torch.int32, device=self.device)
            position = before + steps
            real = torch.ones_like(position, dtype=torch.bool)
            self.t += new
        else:
            count = valid.cumsum(dim=1, dtype=torch.int32)
            position = before + count - 1
            real = valid
            self.t += count[:, -1]
        self.seen += new
        self._update_copies()
        first, self.started = not self.started, True
        return _Call(valid, real, position, added, first)

    def _check_capacity(self, added: list[int]) -> None:
        for group in self.groups:
            needed = max(n + more for n, more in zip(group.lengths or [0], added, strict=False))
            if needed > group.budget:
                raise ValueError(
                    f"policy {policy_name(self.policy)!r} never evicts: the cache holds "
                    f"budget={group.budget} tokens and this call needs {needed}; "
                    "give a larger budget or another policy"
                )

    def _count(self, call: _Call, *, chosen: bool) -> None:
        """Keep the host's count; ``chosen``: what did not fit has been dropped already."""
        lengths = [group.lengths for group in self.groups if group.lengths is not None]
        if call.added is None or len(lengths) < len(self.groups):
            self.forget_lengths()
            return
        self._undoable = self._undoable + call.position.shape[1] if call.valid is None else 0
        for group, filled in zip(self.groups, lengths, strict=True):
            group.lengths = [n + more for n, more in zip(filled, call.added, strict=True)]
            if chosen and self._eviction_due(group):
                self._undoable = 0
                self._cut(group)

    def _cut(self, group: SlotGroup) -> None:
        if group.lengths is not None:
            due = [self.trigger.is_due(n, group.budget) for n in group.lengths]
            group.has_evicted |= any(due)
            group.lengths = [
                group.budget if cut else n for n, cut in zip(group.lengths, due, strict=True)
            ]

    def _know_lengths(self, new: int) -> bool:
        """Whether the host's own count of filled slots stands; read back before longer calls."""
        if _is_recorded(self.device):
            self.forget_lengths()
            return False
        if new == 1 and any(group.lengths is None for group in self.groups):
            return False
        self._read_lengths()
        return True

    def _read_lengths(self) -> list[list[int]]:
        """Filled slots of each group's rows; read back where the host does not know."""
        if any(group.lengths is None for group in self.groups):
            firsts = [group.num_valid[0, :, 0].to(self.device) for group in self.groups]
            counts = torch.stack(firsts).tolist()
            for group, lengths in zip(self.groups, counts, strict=True):
                group.lengths = lengths
        return [group.lengths for group in self.groups if group.lengths is not None]

    def _tokens(self, layer: int, call: _Call, inputs: Mapping[str, Tensor | None]) -> TokenView:
        given = {
            name: tensor
            for name, tensor in inputs.items()
            if tensor is not None and name in self.needs.insert
        }
        return TokenView(
            policy=policy_name(self.policy),
            layer=layer,
            t=self._layers[layer].group.t,
            position=call.position,
            valid=call.real,
            given=given,
            num_kv_heads=self.num_kv_heads,
        )

    def _remember_queries(
        self, place: _Layer, call: _Call, query: Tensor, query_nope: Tensor | None
    ) -> None:
        place.group.remember_queries(place.index, query, call.valid, place.group.t)
        if self.needs.query_moments and query_nope is not None:
            counted = call.real & (call.position >= self.sinks)
            total = (place.group.t - self.sinks).clamp(min=0)
            place.group.add_moments(place.index, query_nope, counted, total)

    def _affine(self, tokens: TokenView) -> tuple[Tensor, Tensor] | None:
        """``(slope, offset)`` of new tokens, ``[batch, num_kv_heads, new]`` fp32."""
        if not self._is_affine:
            return None
        terms = self.policy.affine(tokens)
        if terms is None:
            raise ValueError(f"policy {tokens.policy!r} is affine but affine() returned None")
        shape = (self.batch_size, self.num_kv_heads, tokens.position.shape[1])
        slope, offset = (_expand(x, shape, tokens.policy, "affine") for x in terms)
        pinned = self._pinned(tokens.position[:, None])
        if pinned is not None:
            slope, offset = slope.masked_fill(pinned, 0.0), offset.masked_fill(pinned, torch.inf)
        return slope, offset

    def _pinned(self, position: Tensor) -> Tensor | None:
        """Where ``position`` ``[batch, ...]`` lies in a protected span; None without spans."""
        if self._pins is None:
            return None
        start, stop = (
            x.reshape(x.shape[0], *(1,) * (position.dim() - 1), x.shape[1])
            for x in self._pins.to(position.device).unbind(dim=2)
        )
        return ((position[..., None] >= start) & (position[..., None] < stop)).any(dim=-1)

    def _new_fields(self, tokens: TokenView) -> Pool:
        """Every field of the new tokens, ``[batch, num_kv_heads, new, ...]``."""
        specs = self._fields
        written = self.policy.on_insert(tokens) if specs else {}
        unknown = sorted(set(written) - set(specs))
        if unknown:
            raise ValueError(f"policy {tokens.policy!r} wrote undeclared fields {unknown}")
        shape = (self.batch_size, self.num_kv_heads, tokens.position.shape[1])
        new = {}
        for name, spec in specs.items():
            full = (*shape, *field_shape(spec, (self.num_heads or 0) // self.num_kv_heads))
            if name in written:
                new[name] = _expand(written[name], full, tokens.policy, name, spec.dtype)
            else:
                new[name] = tokens.t.new_full(full, spec.fill, dtype=spec.dtype)
        return new

    # ---- a decode step ---------------------------------------------------------------------

    def _decode(
        self,
        place: _Layer,
        call: _Call,
        tokens: TokenView,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        group, index = place.group, place.index
        affine = self._affine(tokens)
        slope, offset = (None, None) if affine is None else (x[:, :, 0] for x in affine)
        fields = self._new_fields(tokens)
        if fields:
            # the new token's slot; a pad writes into the next free one, which stays free
            slot = place.num_valid.clamp(max=group.num_slots - 1).long()
            for name, new in fields.items():
                _scatter_slots(group.fields[name][index], slot, new)
        stat = self.needs.attention
        mass = None
        if stat is not None:
            mass = group.mass if stat.into is None else group.fields[stat.into]
        output = kernels.append_attention.unchecked(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            group.slots,
            group.t,
            layer=index,
            valid=None if call.valid is None else call.valid[:, 0],
            new_slope=slope,
            new_offset=offset,
            scale=self.head_dim**-0.5 if scale is None else scale,
            mass=mass,
            mass_reduce="mean" if stat is None else _head_reduction(stat),
            mass_accumulate=stat is not None and stat.into is not None and stat.queries == "all",
            # until something is evicted, the bits are those of transformers' full cache
            packed=not torch.compiler.is_compiling() and group.has_evicted,
            impl=self._resolved_impls[place.layer],
        )
        if stat is not None and stat.into is None:
            self._observe_step(stat, place, call)
        return output[:, :, None]

    def _observe_step(self, stat: AttentionStat, place: _Layer, call: _Call) -> None:
        group, index = place.group, place.index
        if group.mass is None:
            return
        held = self._held(place)
        attention = self._over_heads(stat, group.mass[index])
        if stat.reduce == "count_below":
            seen = held & call.real[:, None]
            share = place.num_valid.clamp(min=1).float().reciprocal()[:, :, None]
            if stat.group == "none":
                seen, share = seen[..., None], share[..., None]
            attention = ((attention < share) & seen).float()
        fields = {name: field[index] for name, field in group.fields.items()}
        pool = {"position": group.position[index], **fields}
        self._observe(place, pool, held, attention, call.real.sum(dim=1, dtype=torch.int32))

    def _over_heads(self, stat: AttentionStat, attention: Tensor) -> Tensor:
        """A kernel's ``[batch, heads, num_slots]`` in the shape that policies are given."""
        if stat.group == "none":
            return rearrange(attention, "b (h g) n -> b h n g", h=self.num_kv_heads)
        if stat.group == "all_heads":
            return attention.mean(dim=1, keepdim=True).expand_as(attention)
        return attention

    def _observe(
        self, place: _Layer, pool: Pool, valid: Tensor, attention: Tensor, num_queries: Tensor
    ) -> None:
        self.policy.observe(
            ObservationView(
                policy=policy_name(self.policy),
                layer=place.layer,
                t=place.group.t,
                position=pool["position"],
                valid=valid,
                fields={name: pool[name] for name in self._fields},
                given={"attention": attention, "num_queries": num_queries},
            )
        )

    def _held(self, place: _Layer) -> Tensor:
        """``[batch, num_kv_heads, num_slots]`` bool: the filled slots."""
        slot = torch.arange(place.group.num_slots, device=place.num_valid.device)
        return slot < place.num_valid[..., None]

    # ---- a longer call ---------------------------------------------------------------------

    def _extend(
        self,
        place: _Layer,
        call: _Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        self_attention: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The call's output, and what its attention reports of slots and new tokens."""
        stat = self.needs.attention
        if call.first and self_attention is not None and stat is None:
            return self_attention(), None
        group, filled = place.group, place.group.filled()
        key_slots, value_slots = place.key[:, :, :filled], place.value[:, :, :filled]
        all_valid = call.valid is None and group.is_even()
        num_valid = None if all_valid else place.num_valid
        options: dict[str, Any] = {"valid": call.valid, "scale": scale, "impl": self.impl}
        if stat is None:
            output = kernels.extend_attention(
                query, key, value, key_slots, value_slots, num_valid, **options
            )
            return output, None
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        output = kernels.extend_attention(
            query, key, value, key_slots, value_slots, num_valid, **options, lse=lse
        )
        attention = kernels.column_mass(
            query,
            key,
            key_slots,
            lse,
            num_valid,
            **options,
            queries=_last_queries(stat, query.shape[2]),
            reduce=_head_reduction(stat),
            count_below=stat.reduce == "count_below",
        )
        return output, self._over_heads(stat, attention)

    def _insert(
        self,
        place: _Layer,
        call: _Call,
        inputs: Mapping[str, Tensor | None],
        attention: Tensor | None,
    ) -> None:
        """Choose among the slots and a longer call's tokens, and keep what stays."""
        group, index, filled = place.group, place.index, place.group.filled()
        query, key, value = _states(inputs)
        self._remember_queries(place, call, query, inputs["query_nope"])
        tokens = self._tokens(place.layer, call, inputs)
        fields = self._new_fields(tokens)
        affine = self._affine(tokens)
        slope, offset = (None, None) if affine is None else affine
        scores = None
        if affine is None:
            shape = (self.batch_size, self.num_kv_heads, filled + key.shape[2])
            scores = torch.zeros(shape, dtype=torch.float32, device=key.device)
        to_score = affine is None and self._is_due(group, call)
        if to_score or attention is not None:
            pool = self._pool(place, call, {"key": key, "value": value, **fields})
            real = call.real[:, None].expand(-1, self.num_kv_heads, -1)
            valid = torch.cat((self._held(place)[:, :, :filled], real), dim=2)
            if attention is not None:
                self._observe_call(place, call, pool, valid, attention)
                for name in fields:
                    group.fields[name][index][:, :, :filled] = pool[name][:, :, :filled]
                    fields[name] = pool[name][:, :, filled:]
            if to_score:
                scores = self._score(place, pool, valid)
        kernels.fill_slots(
            key,
            value,
            call.position,
            group.slots,
            group.t,
            layer=index,
            buffer=group.num_slots - group.budget,
            new_slope=slope,
            new_offset=offset,
            scores=scores,
            valid=call.valid,
            sinks=self.sinks,
            recent=self.recent,
            new_fields=tuple(fields[name] for name in group.fields),
            max_valid=filled,
            impl=self.impl,
        )

    def _is_due(self, group: SlotGroup, call: _Call) -> bool:
        """Whether a longer call may have to drop something; True where the host does not know."""
        if group.lengths is None or call.added is None:
            return True
        lengths = (n + more for n, more in zip(group.lengths, call.added, strict=True))
        return self.trigger.is_due(max(lengths), group.budget)

    def _pool(self, place: _Layer, call: _Call, new: Pool) -> Pool:
        """What a policy may see of the slots and, behind them, of a longer call's tokens."""
        filled = place.group.filled()
        new = {"position": call.position[:, None].expand(-1, self.num_kv_heads, -1), **new}
        stored = self._stored(place)
        return {
            name: torch.cat((stored[name][:, :, :filled], tensor), dim=2) if filled else tensor
            for name, tensor in new.items()
            if name in stored
        }

    def _stored(self, place: _Layer) -> Pool:
        """What a policy may see of a layer's slots."""
        group, index = place.group, place.index
        pool = {"position": group.position[index]}
        pool |= {name: getattr(place, name) for name in self.needs.score}
        return pool | {name: field[index] for name, field in group.fields.items()}

    def _observe_call(
        self, place: _Layer, call: _Call, pool: Pool, valid: Tensor, attention: Tensor
    ) -> None:
        stat = self.needs.attention
        if stat is None:
            return
        if stat.into is None:
            for name in self._fields:  # on_insert may have returned views of its input
                pool[name] = pool[name].clone()
            queries = call.real[:, -_last_queries(stat, call.real.shape[1]) :]
            count = queries.sum(dim=1, dtype=torch.int32)
            self._observe(place, pool, valid, attention, count)
        elif stat.queries == "all":
            pool[stat.into] = pool[stat.into] + attention
        else:
            pool[stat.into] = attention

    # ---- drafts ------------------------------------------------------------------------------

    def hold(self) -> None:
        """From now on tokens wait outside the slots until :meth:`settle` confirms them.

        They are attended to as ever. Nothing is evicted, observed or scored for their sake while
        they may still be taken back, so a draft that is rejected leaves no trace.
        """
        self.is_holding = True

    def settle(self, drop: int = 0) -> None:
        """Confirm the tokens that wait, but for the last ``drop``, and go on holding.

        Raises:
            ValueError: fewer tokens wait, or a call is under way.
        """
        self._check_between_calls("settle")
        draft, self._draft = self._draft, None
        waiting = 0 if draft is None else draft.call.position.shape[1]
        if not 0 <= drop <= waiting:
            self._draft = draft
            raise ValueError(f"drop must lie in [0, {waiting}], the tokens that wait, got {drop}")
        if draft is None:
            return
        keep = waiting - drop
        self.t -= draft.call.real[:, keep:].sum(dim=1, dtype=torch.int32).to(self.device)
        self.seen -= drop
        self._update_copies()
        if keep == 0:
            self.started = not draft.call.first
            return
        call = _first_tokens(draft.call, keep)
        for place, waiting_inputs in zip(self._layers, draft.inputs, strict=True):
            call = _moved(call, place.num_valid.device)
            inputs = {
                name: None if x is None else x[..., :keep, :] for name, x in waiting_inputs.items()
            }
            attention = None
            if self.needs.attention is not None:
                query, key, value = _states(inputs)
                _, attention = self._extend(place, call, query, key, value, draft.scale, None)
            self._insert(place, call, inputs, attention)
        self._count(call, chosen=True)

    def release(self) -> None:
        """Confirm what waits and stop holding."""
        self.settle()
        self.is_holding = False

    def crop(self, count: int) -> None:
        """Take back the last ``count`` tokens of every row.

        Tokens that wait (see :meth:`hold`) can always be taken back, and the others of them are
        confirmed. Without that, positions, keys, values and fields of insertion are restored
        exactly as long as nothing was evicted since.

        Raises:
            ValueError: something was evicted or padded since, or the policy has observed the
                tokens, which cannot be undone; nothing is changed.
        """
        if self.is_holding:
            self.settle(drop=count)
            return
        self._check_between_calls("crop")
        if count == 0:
            return
        if not 0 < count <= self._undoable:
            raise ValueError(
                f"count must lie in [0, {self._undoable}], the tokens since the last eviction, "
                f"got {count}: call hold() before tokens that may be taken back"
            )
        needs = self.needs
        if needs.attention is not None or needs.query_window or needs.query_moments:
            raise ValueError(
                f"policy {policy_name(self.policy)!r} has observed the last {count} tokens, which "
                "cannot be undone: call hold() before tokens that may be taken back"
            )
        for group in self.groups:
            group.num_valid -= count
            if group.lengths is not None:
                group.lengths = [n - count for n in group.lengths]
        self.t -= count
        self.seen -= count
        self._update_copies()
        self._undoable -= count

    def _extended_draft(self, call: _Call, scale: float | None) -> _Draft:
        before = self._draft
        if before is None:
            return _Draft(call, [{} for _ in range(self.num_layers)], scale)
        return _Draft(_joined(_moved(before.call, self.device), call), before.inputs, scale)

    def _attend_draft(
        self, draft: _Draft, place: _Layer, inputs: Mapping[str, Tensor | None]
    ) -> Tensor:
        """Attention of new tokens to the slots, to those that wait, and to themselves."""
        joined = dict(inputs)
        for name, before in draft.inputs[place.layer].items():
            new = inputs[name]
            if before is not None and new is not None:
                joined[name] = torch.cat((before, new), dim=-2)
        draft.inputs[place.layer] = joined
        query, key, value = _states(joined)
        filled = place.group.filled()
        output = kernels.extend_attention(
            query,
            key,
            value,
            place.key[:, :, :filled],
            place.value[:, :, :filled],
            place.num_valid,
            valid=_moved(draft.call, key.device).valid,
            scale=draft.scale,
            impl=self.impl,
        )
        return output[:, :, -_states(inputs)[0].shape[2] :]

    def _check_between_calls(self, method: str) -> None:
        if self._call is not None:
            raise ValueError(
                f"{method}() must come between calls: some layers have not been called"
            )

    # ---- scores ----------------------------------------------------------------------------

    def _score(self, place: _Layer, pool: Pool, valid: Tensor) -> Tensor:
        """The policy's scores of ``pool``, checked, with pinned spans at +inf."""
        policy = self.policy
        order = None
        if self.needs.chronological:
            last = torch.iinfo(torch.int32).max
            order = pool["position"].masked_fill(~valid, last).argsort(dim=-1, stable=True)
            pool = {name: _gather_slots(tensor, order) for name, tensor in pool.items()}
            valid = valid.gather(2, order)
        view = SlotView(
            policy=policy_name(policy),
            layer=place.layer,
            t=place.group.t,
            position=pool["position"],
            valid=valid,
            budget=place.group.budget,
            fields={name: pool[name] for name in self._fields},
            given={name: pool[name] for name in self.needs.score} | self._queries(place),
        )
        scores = policy.score(view)
        if scores.shape != valid.shape or scores.dtype != torch.float32:
            raise ValueError(
                f"policy {view.policy!r}: score must return float32 {list(valid.shape)}, "
                f"got {scores.dtype} {list(scores.shape)}"
            )
        pinned = self._pinned(pool["position"])
        if pinned is not None:
            scores = scores.masked_fill(pinned, torch.inf)
        return scores if order is None else torch.empty_like(scores).scatter_(2, order, scores)

    def _queries(self, place: _Layer) -> Pool:
        """What ``score`` is given of the queries."""
        group, index, given = place.group, place.index, {}
        if group.queries is not None:
            given["queries"] = group.queries[index]
            given["query_position"] = window_positions(group.t, self.needs.query_window)
        if group.query_mean is not None and group.query_scatter is not None:
            count = (group.t - self.sinks).clamp(min=1)[:, None, None, None]
            given["query_mean"] = group.query_mean[index]
            given["query_covariance"] = group.query_scatter[index] / count
        return given

    # ---- captured steps --------------------------------------------------------------------

    def forget_lengths(self) -> None:
        """Let the device alone count filled slots: every :meth:`evict` is launched, and looks.

        The host reads the counts again before the next call of more than one token.
        """
        self._undoable = 0  # written, not read: a compiled step would be bound to its value
        for group in self.groups:
            group.lengths = None

    @contextmanager
    def counting_a_step(self) -> Iterator[None]:
        """Count a decode step on the host, around a replay, which does not run what counts.

        Every row counts, so that :meth:`evict` afterwards comes in time. Where rows take no token
        any more it may come too early, which the device notices; call :meth:`forget_lengths` once
        those rows go on.
        """
        lengths = [[n + 1 for n in filled] for filled in self._read_lengths()]
        yield
        self._undoable = 0
        for group, filled in zip(self.groups, lengths, strict=True):
            group.lengths = filled

    # ---- eviction --------------------------------------------------------------------------

    def evict(self) -> None:
        """Cut every head that has filled its slots back to its budget: after the last layer.

        One launch for all layers of one budget. Where the host does not know that nothing is due, a
        predicate on the device decides, so that the call can be captured or compiled.
        """
        blind = _is_recorded(self.device)
        for group in self.groups:
            if blind or self._eviction_due(group):
                self._evict(group)
                self._undoable = 0
                if not blind:
                    self._cut(group)

    def _evict(self, group: SlotGroup) -> None:
        scores = None
        if not self._is_affine:
            places = [self._layers[layer] for layer in group.layers]
            scores = torch.stack([self._score(p, self._stored(p), self._held(p)) for p in places])
        kernels.evict(
            group.slots,
            group.t,
            buffer=group.num_slots - group.budget,
            scores=scores,
            sinks=self.sinks,
            recent=self.recent,
            impl=self.impl,
        )

    def _eviction_due(self, group: SlotGroup) -> bool:
        return group.lengths is None or self.trigger.is_due(max(group.lengths), group.budget)

    # ---- rows ------------------------------------------------------------------------------

    def keys(self, layer: int) -> Tensor:
        """A layer's keys, ``[batch, num_kv_heads, num_slots, head_dim]``, the state itself."""
        self._check_layer(layer)
        return self._layers[layer].key

    def values(self, layer: int) -> Tensor:
        """A layer's values, as :meth:`keys`."""
        self._check_layer(layer)
        return self._layers[layer].value

    def positions(self, layer: int) -> Tensor:
        """``[batch, num_kv_heads, num_slots]`` int32: what each slot holds, -1 where empty."""
        self._check_layer(layer)
        place = self._layers[layer]
        return place.group.position[place.index].masked_fill(~self._held(place), -1)

    def pin(self, spans: Sequence[Sequence[Span]]) -> None:
        """Protect more positions of each row, before their tokens are inserted.

        Args:
            spans: For each row ``(start, stop)`` pairs of positions; they add to those there.

        Raises:
            ValueError: not one list for each row, a span is not a span, or a layer's budget would
                not exceed the protected slots. The spans stay as they were.
        """
        if len(spans) != self.batch_size:
            raise ValueError(
                f"spans must have one list for each of {self.batch_size} rows, got {len(spans)}"
            )
        there = self._spans if self._spans is not None else _read_spans(self._pins)
        rows = [
            sorted({*row, *check_spans("spans", more)})
            for row, more in zip(there, spans, strict=True)
        ]
        for row in rows:
            check_protected(self.budgets, self.sinks, self.recent, row)
        if rows != self._spans:
            self._spans, self._pins = rows, self._pin_table(rows)

    def _unpin(self, rows: Sequence[int]) -> None:
        """Back to the spans that every row has."""
        if self._pins is None:
            return
        spans = list(self._spans if self._spans is not None else _read_spans(self._pins))
        for row in rows:
            spans[row] = self._protect
        self._spans, self._pins = spans, self._pin_table(spans)

    def _pin_table(self, spans: Sequence[list[Span]]) -> Tensor | None:
        """The rows' spans as ``[batch, most spans, 2]`` int32, filled up with empty ones."""
        most = max(map(len, spans))
        if most == 0:
            return None
        table = [row + [(0, 0)] * (most - len(row)) for row in spans]
        return torch.tensor(table, dtype=torch.int32, device=self.device)

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Free all rows, or the given ones, in place, for the next sequences.

        Args:
            rows: Row indices, ints in ``[0, batch_size)``; None frees all and clears the flags.

        Raises:
            ValueError: a row is out of range.
        """
        self._next_layer, self._call, self._draft, self._undoable = 0, None, None, 0
        if rows is None:
            for group in self.groups:
                group.reset(slice(None))
                group.nan_seen.zero_()
                group.lengths = [0] * self.batch_size
                group.has_evicted = False
            self.t.zero_()
            self.seen.zero_()
            self._update_copies()
            self.started = False
            self._unpin(range(self.batch_size))
            return
        index = self._row_index("rows", rows)
        self._unpin(torch.as_tensor(rows).tolist())
        for group in self.groups:
            group.reset(index.to(group.device))
            group.lengths = None
        self.t[index] = 0
        self._update_copies()

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, in place (beam search).

        Args:
            index: ``[batch]`` ints in ``[0, batch_size)``.

        Raises:
            ValueError: wrong length, a row is out of range, or tokens wait to be confirmed.
        """
        index = self._row_index("index", index)
        if len(index) != self.batch_size:
            raise ValueError(f"index must have {self.batch_size} entries, got {len(index)}")
        self._check_settled("reorder")
        for group in self.groups:
            group.reorder(index.to(group.device))
        self.t.copy_(self.t.index_select(0, index))
        self._update_copies()
        self._move_pins(index)

    def select(self, index: Tensor | Sequence[int]) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, for any number of rows, in new tensors.

        Args:
            index: Ints in ``[0, batch_size)``, at least one.

        Raises:
            ValueError: no row, a row is out of range, or tokens wait to be confirmed.
        """
        index = self._row_index("index", index)
        if len(index) == 0:
            raise ValueError("index must name at least one row, got none")
        self._check_settled("select")
        with torch.inference_mode(False):
            self.groups = [group.select(index.to(group.device)) for group in self.groups]
            self._share_t(self.t.index_select(0, index))
            mark_static([self.t, *self._t_copies])
            self._move_pins(index)
        self.batch_size = len(index)
        self._layers = _places(self.groups)

    def fork(self, copies: int) -> BoundedKVCache:
        """A new cache with ``copies`` rows for each row, next to each other; this one stays.

        Raises:
            ValueError: ``copies`` is below 1, or tokens wait to be confirmed.
        """
        check_positive("copies", copies)
        twin = copy.copy(self)
        twin.seen = self.seen.clone()
        mark_static([twin.seen])
        twin.select(torch.arange(self.batch_size).repeat_interleave(copies))
        return twin

    def _check_settled(self, method: str) -> None:
        if self._draft is not None:
            raise ValueError(f"{method}() must not meet unconfirmed tokens: call settle() first")

    def _move_pins(self, index: Tensor) -> None:
        if self._pins is None:
            self._spans = [self._protect] * len(index)
        else:
            self._pins = self._pins.index_select(0, index)
            self._spans = None  # the host may not know the index

    def _row_index(self, argument: str, rows: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(rows, dtype=torch.int64)
        # a tensor that lives on an accelerator is trusted: checking it would wait for the device
        if index.device.type == "cpu" and len(index) > 0:
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.batch_size:
                raise ValueError(
                    f"{argument} must lie in [0, {self.batch_size}), got {low} to {high}"
                )
        return index.to(self.device)

    # ---- files -----------------------------------------------------------------------------

    def _named_state(self) -> dict[str, Tensor]:
        """Everything that a file needs, by name; without the pins, which change their shape."""
        state = {"t": self.t, "seen": self.seen}
        for number, group in enumerate(self.groups):
            state |= {f"{number}.{name}": tensor for name, tensor in group.named_state()}
            state[f"{number}.nan_seen"] = group.nan_seen
        return state

    def fingerprint(self) -> dict[str, str]:
        """What must agree for saved slots to mean the same here; texts by name."""
        parts = {
            "policy": policy_fingerprint(self.policy),
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "batch_size": self.batch_size,
            "budgets": self.budgets,
            "groups": [group.layers for group in self.groups],
            "buffer": self.buffer,
            "sinks": self.sinks,
            "recent": self.recent,
            "dtype": self.dtype,
        }
        return {name: str(part) for name, part in parts.items()}

    def save(self, path: str | Path, **extra: str) -> None:
        """Write the slots as safetensors, with their fingerprint; all or nothing.

        Args:
            path: The file; one that is there is replaced.
            **extra: More of the fingerprint, such as the model's.

        Raises:
            ValueError: a call is under way.
        """
        self._check_between_calls("save")
        self.settle()
        state = {name: tensor.contiguous() for name, tensor in self._named_state().items()}
        if self._pins is not None:
            state["pins"] = self._pins
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(state, partial, metadata=self.fingerprint() | extra)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: str | Path, **extra: str) -> None:
        """Take the slots of a file that :meth:`save` wrote, in place of those here.

        Args:
            path: The file.
            **extra: What was given to :meth:`save`.

        Raises:
            ValueError: the file's fingerprint is another; the first difference is named, and the
                cache stays as it was.
        """
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            saved = file.metadata() or {}
            for name, here in (self.fingerprint() | extra).items():
                if saved.get(name) != here:
                    raise ValueError(
                        f"{path}: {name} must be {here}, got {saved.get(name)}: these slots belong "
                        "to a cache of another kind"
                    )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.reset()
        for name, tensor in self._named_state().items():
            tensor.copy_(state[name])
        self._update_copies()
        self._pins = state.get("pins")
        self._spans = _read_spans(self._pins) or [[]] * self.batch_size
        for group in self.groups:
            group.lengths = None
        self.started = bool(self.seen > 0)

    def stats(self) -> CacheStats:
        """What the cache did so far; reads the device.

        Raises:
            RuntimeError: with ``strict=True``, no head ever evicted or a score was NaN.
        """
        used = torch.stack([place.num_valid.to(self.device) for place in self._layers]).cpu()
        nan_seen = torch.stack(
            [place.group.nan_seen[place.index].to(self.device) for place in self._layers]
        )
        seen = self.t.cpu()
        row_bytes = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        stats = CacheStats(
            tokens_seen=seen.tolist(),
            slots_used=used,
            evictions=seen[None, :, None] - used,
            bytes_held=sum(group.nbytes for group in self.groups)
            + sum(t.nbytes for t in (self.t, *self._t_copies))
            + self.seen.nbytes,
            bytes_full=int(seen.sum()) * row_bytes,
            nan_layers=nan_seen.nonzero().flatten().tolist(),
        )
        if self.strict:
            self._check_strict(stats)
        return stats

    def _check_strict(self, stats: CacheStats) -> None:
        name = policy_name(self.policy)
        if stats.nan_layers:
            raise RuntimeError(f"policy {name!r} gave NaN scores in layers {stats.nan_layers}")
        if not stats.budget_reached:
            raise RuntimeError(
                f"policy {name!r} never had to evict: {max(stats.tokens_seen)} tokens seen, "
                f"eviction starts at budget + buffer = {self.num_slots}; lower the budget"
            )

    # ---- checks ----------------------------------------------------------------------------

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")

    def _check_call(
        self, layer: int, inputs: Mapping[str, Tensor | None], valid: Tensor | None
    ) -> None:
        self._check_layer(layer)
        if layer != self._next_layer and layer != 0:
            raise ValueError(
                f"layers must be called in order: expected layer {self._next_layer} "
                f"(or 0, a new call), got {layer}"
            )
        q_len = self._check_states(inputs, self.devices[layer])
        hidden_states = inputs["hidden_states"]
        if hidden_states is not None and hidden_states.shape[:2] != (self.batch_size, q_len):
            raise ValueError(
                f"hidden_states must have shape [{self.batch_size}, {q_len}, hidden_size], "
                f"got {list(hidden_states.shape)}"
            )
        needs = self.needs
        for name in (*needs.insert, *(("query_nope",) if needs.query_moments else ())):
            if inputs[name] is None:
                raise ValueError(
                    f"policy {policy_name(self.policy)!r} needs {name}: "
                    f"pass {name}= to attend(), or choose another policy"
                )
        if valid is not None:
            _check_shape("valid", valid, (self.batch_size, q_len))
            if valid.dtype != torch.bool:
                raise ValueError(f"valid must have dtype torch.bool, got {valid.dtype}")

    def _check_states(self, inputs: Mapping[str, Tensor | None], device: torch.device) -> int:
        """Check queries, keys and values; returns ``q_len``."""
        query = inputs["query"]
        if query is None or query.dim() != 4 or query.shape[2] < 1:
            got = None if query is None else list(query.shape)
            raise ValueError(
                f"query must have shape [batch, num_heads, q_len >= 1, head_dim], got {got}"
            )
        num_heads, q_len = query.shape[1], query.shape[2]
        if num_heads % self.num_kv_heads or self.num_heads not in (None, num_heads):
            wanted = self.num_heads or f"a multiple of {self.num_kv_heads}"
            raise ValueError(f"query must have {wanted} heads, got {num_heads}")
        queries = (self.batch_size, num_heads, q_len, self.head_dim)
        slots = (self.batch_size, self.num_kv_heads, q_len, self.head_dim)
        for name, shape in (
            ("query", queries),
            ("key", slots),
            ("value", slots),
            ("query_nope", queries),
            ("key_nope", slots),
        ):
            tensor = inputs[name]
            if tensor is None:
                continue
            _check_shape(name, tensor, shape)
            if tensor.dtype != self.dtype:
                raise ValueError(f"{name} must have dtype {self.dtype}, got {tensor.dtype}")
            if tensor.device.type != device.type:
                raise ValueError(f"{name} must be on {device}, got {tensor.device}")
            if tensor.stride(3) != 1:
                raise ValueError(
                    f"{name} must have contiguous head vectors, got stride {tensor.stride(3)}"
                )
            if name in ("key", "value") and tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} must not require grad: a bounded cache does not carry gradients; "
                    "run under torch.no_grad() or torch.inference_mode(), or without a cache"
                )
        return q_len


# ---- helpers -------------------------------------------------------------------------------


def saved_shape(path: str | Path) -> tuple[int, torch.dtype]:
    """Batch size and dtype of saved slots.

    Raises:
        ValueError: the file does not say.
    """
    with safe_open(path, framework="pt") as file:
        saved = file.metadata() or {}
    dtypes = {str(dtype): dtype for dtype in _DTYPES}
    if not saved.get("batch_size", "").isdigit() or saved.get("dtype") not in dtypes:
        raise ValueError(f"{path} must be written by save() of a bounded cache, got {saved}")
    return int(saved["batch_size"]), dtypes[saved["dtype"]]


def _check_devices(
    device: torch.device | str | Sequence[torch.device | str], num_layers: int
) -> tuple[torch.device, ...]:
    """Where each layer is."""
    if isinstance(device, (torch.device, str)):
        return (torch.device(device),) * num_layers
    devices = tuple(torch.device(each) for each in device)
    if len(devices) != num_layers:
        raise ValueError(
            f"device must be one device, or one for each of {num_layers} layers, got {len(devices)}"
        )
    return devices


def _places(groups: Sequence[SlotGroup]) -> list[_Layer]:
    """Where the slots of each layer are, by layer."""
    places = [
        _Layer(layer, group, index) for group in groups for index, layer in enumerate(group.layers)
    ]
    return sorted(places, key=lambda place: place.layer)


def _states(inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if query is None or key is None or value is None:
        raise ValueError("query, key and value must be given")
    return query, key, value


def _joined(call: _Call, more: _Call) -> _Call:
    """Two calls in a row as one."""
    added = None
    if call.added is not None and more.added is not None:
        added = [a + b for a, b in zip(call.added, more.added, strict=True)]
    real = torch.cat((call.real, more.real), dim=1)
    valid = None if call.valid is None and more.valid is None else real
    return _Call(valid, real, torch.cat((call.position, more.position), dim=1), added, call.first)


def _moved(call: _Call, device: torch.device) -> _Call:
    """A call where a layer is: it moves along with the layers."""
    if call.position.device == device:
        return call
    real = call.real.to(device)
    valid = None if call.valid is None else real
    return replace(call, valid=valid, real=real, position=call.position.to(device))


def _first_tokens(call: _Call, count: int) -> _Call:
    real = call.real[:, :count]
    if call.valid is None:
        return replace(
            call,
            real=real,
            position=call.position[:, :count],
            added=None if call.added is None else [count] * len(call.added),
        )
    return _Call(real, real, call.position[:, :count], _counts(real), call.first)


def _read_spans(pins: Tensor | None) -> list[list[Span]]:
    if pins is None:
        return []
    return [[(start, stop) for start, stop in row if start < stop] for row in pins.tolist()]


def _head_reduction(stat: AttentionStat) -> str:
    """What the kernel does with the query heads of a group."""
    return "mean" if stat.group == "all_heads" else stat.group


def _last_queries(stat: AttentionStat, new: int) -> int:
    return new if stat.queries == "all" else min(stat.queries, new)


def _gather_slots(slots: Tensor, order: Tensor) -> Tensor:
    """``slots`` ``[batch, heads, slots, ...]`` in the order of ``[batch, heads, slots]``."""
    index = order.reshape(*order.shape, *(1,) * (slots.dim() - 3)).expand_as(slots)
    return slots.gather(2, index)


def _is_recorded(device: torch.device) -> bool:
    """Whether the call is being compiled or captured: nothing may be decided on the host."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _counts(valid: Tensor) -> list[int] | None:
    """Real tokens per row. Not read back in a decode step on an accelerator."""
    if valid.shape[1] == 1 and valid.device.type != "cpu":
        return None
    counts: list[int] = valid.sum(dim=1).tolist()
    return counts


def _expand(
    tensor: Tensor,
    shape: tuple[int, ...],
    policy: str,
    what: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    if tensor.dtype != dtype:
        raise ValueError(f"policy {policy!r}: {what} must be {dtype}, got {tensor.dtype}")
    if tensor.shape == shape:
        return tensor
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"policy {policy!r}: {what} must broadcast to {list(shape)}, got {list(tensor.shape)}"
        ) from None


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _scatter_slots(slots: Tensor, slot: Tensor, new: Tensor) -> None:
    """Write ``new`` ``[batch, heads, 1, ...]`` into one slot of each head."""
    slots.scatter_(2, slot.reshape(*slot.shape, *(1,) * (new.dim() - 2)).expand_as(new), new)
