"""`BoundedKVCache`: key/value pairs in a fixed number of slots, for any engine.

Each (layer, batch row, KV head) owns ``num_slots = budget + buffer`` slots, front-packed. A layer's
call inserts its new pairs and attends to all valid slots; when a head has filled its slots,
:meth:`BoundedKVCache.evict` keeps the ``budget`` highest scores of the policy. Keys are stored
after RoPE at their original positions, so slot order does not matter to attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimkv_kernels import kernels
from trimkv_kernels.policies.base import (
    ModelShape,
    RetentionPolicy,
    SlotView,
    TokenView,
    default_protection,
    policy_name,
)

Impl = Literal["auto", "triton", "torch"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GIVEN_AT_INSERT = ("hidden_states", "key", "value", "query")


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
    lengths: list[int] | None  # slots filled in each row before the call, where the host knows
    added: list[int] | None  # real tokens of each row, where it knows both
    first: bool  # nothing was inserted before

    @property
    def length(self) -> int | None:
        """Slots filled in every head, when they agree and the new tokens are all real."""
        if self.valid is not None or self.lengths is None:
            return None
        return self.lengths[0] if len(set(self.lengths)) == 1 else None


class BoundedKVCache:
    """A key/value cache of fixed size that keeps what its policy scores highest.

    A step is one :meth:`attend` per layer, in order, then :meth:`evict`. State lives in base
    tensors at fixed addresses: ``key``/``value`` ``[layers, batch, num_kv_heads, num_slots,
    head_dim]``; ``position`` int32 and ``slope``/``offset`` fp32 of that shape less ``head_dim``;
    ``num_valid`` int32 ``[layers, batch, num_kv_heads]``; ``t`` int32 ``[batch]``, real tokens
    seen; ``seen`` int64 scalar, all tokens seen, padding included.

    Args:
        policy: Scores the slots.
        num_layers, num_kv_heads, head_dim, batch_size: Shape of the cache.
        budget: Slots of each head that survive an eviction.
        buffer: New tokens a full head takes before the next eviction.
        sinks: First positions that are never evicted; None is the policy's own number.
        recent: Last positions that are never evicted; None is the policy's own number.
        protect: Spans ``(start, stop)`` of positions that are never evicted.
        dtype: fp32, fp16 or bf16.
        device: Where the state lives.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.
        strict: :meth:`stats` raises where the budget was never reached or a score was NaN.

    Raises:
        ValueError: a size is out of range, the budget does not exceed the protected slots, or the
            policy needs what this cache cannot give.
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
        sinks: int | None = None,
        recent: int | None = None,
        protect: Sequence[tuple[int, int]] = (),
        dtype: torch.dtype,
        device: torch.device | str,
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
        check_policy_needs(policy)
        self.sinks, self.recent, self.protect = check_budget(
            policy, budget, buffer, sinks=sinks, recent=recent, protect=protect
        )
        self.device = torch.device(device)
        self.impl = impl
        kernels.resolve_impl(impl, self.device)  # raises where it cannot run
        self.policy = policy.bind(
            ModelShape(
                num_layers=num_layers,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=self.device,
            )
        )
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.batch_size, self.budget, self.buffer = batch_size, budget, buffer
        self.dtype, self.strict = dtype, strict
        self._allocate()

    @property
    def num_slots(self) -> int:
        """Slots of each head: ``budget + buffer``."""
        return self.budget + self.buffer

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step reads nothing back and can be captured or compiled."""
        return self.policy.is_compileable

    def _allocate(self) -> None:
        # normal tensors, also when the first call comes under inference_mode: the state must
        # stay writable when a later call does not
        with torch.inference_mode(False):
            heads = (self.num_layers, self.batch_size, self.num_kv_heads)
            slots = (*heads, self.num_slots)

            def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=self.device)

            self.key = zeros(*slots, self.head_dim, dtype=self.dtype)
            self.value = zeros(*slots, self.head_dim, dtype=self.dtype)
            self.position = zeros(*slots, dtype=torch.int32)
            affine = self.policy.is_affine
            self.slope = zeros(*slots, dtype=torch.float32) if affine else None
            self.offset = zeros(*slots, dtype=torch.float32) if affine else None
            self.fields = {
                name: zeros(*slots, *spec.shape, dtype=spec.dtype)
                for name, spec in self.policy.fields.items()
            }
            self.num_valid = zeros(*heads, dtype=torch.int32)
            self.t = zeros(self.batch_size, dtype=torch.int32)
            self.seen = zeros(dtype=torch.int64)
            self.nan_seen = zeros(self.num_layers, dtype=torch.int32)
        self._lengths: list[int] | None = [0] * self.batch_size
        self.started = False
        self._next_layer = 0
        self._call: _Call | None = None

    def _state(self) -> list[Tensor]:
        """Every tensor with a batch dimension 1."""
        affine = [x for x in (self.slope, self.offset) if x is not None]
        return [self.key, self.value, self.position, *affine, *self.fields.values(), self.num_valid]

    # ---- one layer's call ------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor | None = None,
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
            valid: ``[batch, q_len]`` bool, False for padding, which is never stored; None: all
                real. Real tokens of a call stand at its right end.
            scale: Softmax scale; None is ``head_dim ** -0.5``.
            self_attention: The call's causal attention to itself, ``[batch, num_heads, q_len,
                head_dim]``; used instead of ours while nothing is stored.

        Returns:
            ``[batch, num_heads, q_len, head_dim]``, dtype of ``query``. Padding's rows are
            unspecified.

        Raises:
            ValueError: a shape, dtype or device disagrees, layers come out of order, gradients
                would flow into the slots, or the policy's capacity would be exceeded.
        """
        self._check_call(layer, query, key, value, hidden_states, valid)
        if layer == 0:
            self._call = self._begin(query.shape[2], valid)
        call = self._call
        if call is None:
            raise ValueError("layer must start at 0 for each call")
        self._next_layer = (layer + 1) % self.num_layers
        tokens = self._tokens(layer, call, query, key, value, hidden_states)
        if query.shape[2] == 1:
            output = self._decode(layer, call, tokens, query, key, value, scale)
        else:
            if call.first and self_attention is not None:
                output = self_attention()
            else:
                output = self._extend(layer, call, query, key, value, scale)
            self._insert(layer, call, tokens, key, value)
        if self._next_layer == 0:
            self._end(call, query.shape[2])
        return output

    def _begin(self, new: int, valid: Tensor | None) -> _Call:
        lengths = self._known_lengths(new)
        added = None
        if lengths is not None:
            added = [new] * self.batch_size if valid is None else _counts(valid)
            if self.policy.capacity_only:
                self._check_capacity(lengths, added or [new] * self.batch_size)
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
        first, self.started = not self.started, True
        return _Call(valid, real, position, lengths, added, first)

    def _check_capacity(self, lengths: list[int], added: list[int]) -> None:
        needed = max(n + more for n, more in zip(lengths, added, strict=True))
        if needed > self.budget:
            raise ValueError(
                f"policy {policy_name(self.policy)!r} never evicts: the cache holds "
                f"budget={self.budget} tokens and this call needs {needed}; "
                "give a larger budget or another policy"
            )

    def _end(self, call: _Call, new: int) -> None:
        self._call = None
        self._lengths = None
        if call.lengths is not None and call.added is not None:
            lengths = [n + more for n, more in zip(call.lengths, call.added, strict=True)]
            # a longer call has already chosen what stays; a decode step leaves it to evict()
            self._lengths = lengths if new == 1 else self._cut(lengths)

    def _cut(self, lengths: list[int]) -> list[int]:
        return [self.budget if n >= self.num_slots else n for n in lengths]

    def _known_lengths(self, new: int) -> list[int] | None:
        """Slots filled in each row, from the host's own count; read back before longer calls."""
        if _is_recorded(self.device):
            return None
        if self._lengths is None and new > 1:
            self._lengths = self.num_valid[0, :, 0].tolist()
        return self._lengths

    def _tokens(
        self,
        layer: int,
        call: _Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None,
    ) -> TokenView:
        inputs = {"query": query, "key": key, "value": value, "hidden_states": hidden_states}
        given = {
            name: tensor
            for name, tensor in inputs.items()
            if tensor is not None and name in self.policy.needs.insert
        }
        return TokenView(
            policy=policy_name(self.policy),
            layer=layer,
            t=self.t,
            position=call.position,
            valid=call.real,
            given=given,
            num_kv_heads=self.num_kv_heads,
        )

    def _affine(self, tokens: TokenView) -> tuple[Tensor, Tensor] | None:
        """``(slope, offset)`` of new tokens, ``[batch, num_kv_heads, new]`` fp32."""
        if not self.policy.is_affine:
            return None
        terms = self.policy.affine(tokens)
        if terms is None:
            raise ValueError(f"policy {tokens.policy!r} is affine but affine() returned None")
        shape = (self.batch_size, self.num_kv_heads, tokens.position.shape[1])
        slope, offset = (_expand(x, shape, tokens.policy, "affine") for x in terms)
        pinned = self._pinned(tokens.position)
        if pinned is not None:
            pinned = pinned[:, None]
            slope, offset = slope.masked_fill(pinned, 0.0), offset.masked_fill(pinned, torch.inf)
        return slope, offset

    def _pinned(self, position: Tensor) -> Tensor | None:
        """Where ``position`` lies in a protected span; None without spans."""
        if not self.protect:
            return None
        mask = torch.zeros_like(position, dtype=torch.bool)
        for start, stop in self.protect:
            mask |= (position >= start) & (position < stop)
        return mask

    def _new_fields(self, tokens: TokenView) -> dict[str, Tensor]:
        """Every field of the new tokens, ``[batch, num_kv_heads, new, ...]``."""
        written = self.policy.on_insert(tokens) if self.fields else {}
        unknown = sorted(set(written) - set(self.fields))
        if unknown:
            raise ValueError(f"policy {tokens.policy!r} wrote undeclared fields {unknown}")
        shape = (self.batch_size, self.num_kv_heads, tokens.position.shape[1])
        new = {}
        for name, spec in self.policy.fields.items():
            full = (*shape, *spec.shape)
            if name in written:
                new[name] = _expand(written[name], full, tokens.policy, name, spec.dtype)
            else:
                new[name] = self.key.new_full(full, spec.fill, dtype=spec.dtype)
        return new

    def _decode(
        self,
        layer: int,
        call: _Call,
        tokens: TokenView,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        affine = self._affine(tokens)
        slope, offset = (None, None) if affine is None else (x[:, :, 0] for x in affine)
        # the slot of the new token; a padding row writes into its next free slot, which stays free
        slot = self.num_valid[layer].clamp(max=self.num_slots - 1).long() if self.fields else None
        for name, new in self._new_fields(tokens).items():
            _scatter_slots(self.fields[name][layer], slot, new)
        output = kernels.append_attention(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            self.key,
            self.value,
            self.position,
            self.num_valid,
            self.t,
            layer=layer,
            valid=None if call.valid is None else call.valid[:, 0],
            slope=self.slope,
            offset=self.offset,
            new_slope=slope,
            new_offset=offset,
            scale=scale,
            impl=self.impl,
        )
        return output[:, :, None]

    def _extend(
        self,
        layer: int,
        call: _Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        filled = self._filled(call)
        return kernels.extend_attention(
            query,
            key,
            value,
            self.key[layer, :, :, :filled],
            self.value[layer, :, :, :filled],
            None if call.length is not None else self.num_valid[layer],
            valid=call.valid,
            scale=scale,
            impl=self.impl,
        )

    def _filled(self, call: _Call) -> int:
        """Slots that any row may have filled before the call."""
        return self.num_slots if call.lengths is None else max(call.lengths)

    def _insert(
        self, layer: int, call: _Call, tokens: TokenView, key: Tensor, value: Tensor
    ) -> None:
        """Choose among the slots and a longer call's tokens, and keep what stays."""
        filled = self._filled(call)
        fields = self._new_fields(tokens)
        affine = self._affine(tokens)
        slope, offset = (None, None) if affine is None else affine
        scores = None
        if affine is None:
            scores = self._pool_scores(layer, call, filled, {"key": key, "value": value, **fields})
        kernels.fill_slots(
            key,
            value,
            call.position,
            self.key,
            self.value,
            self.position,
            self.num_valid,
            self.t,
            layer=layer,
            budget=self.budget,
            slope=self.slope,
            offset=self.offset,
            new_slope=slope,
            new_offset=offset,
            scores=scores,
            valid=call.valid,
            sinks=self.sinks,
            recent=self.recent,
            fields=tuple(self.fields.values()),
            new_fields=tuple(fields[name] for name in self.fields),
            nan_seen=self.nan_seen,
            filled=filled,
            impl=self.impl,
        )

    def _pool_scores(self, layer: int, call: _Call, filled: int, new: dict[str, Tensor]) -> Tensor:
        """The policy's scores of the slots and, behind them, a call's new tokens."""
        new = {"position": call.position[:, None].expand(-1, self.num_kv_heads, -1), **new}
        stored = self._scored_state()
        pool = {
            name: torch.cat((stored[name][layer, :, :, :filled], tensor), dim=2)
            if filled
            else tensor
            for name, tensor in new.items()
            if name not in ("key", "value") or name in self.policy.needs.score
        }
        held = torch.arange(filled, device=self.device) < self.num_valid[layer, :, :, None]
        real = call.real[:, None].expand(-1, self.num_kv_heads, -1)
        return self._score(layer, pool, torch.cat((held, real), dim=2))

    def _scored_state(self) -> dict[str, Tensor]:
        """What ``score`` may read of the slots."""
        return {"key": self.key, "value": self.value, "position": self.position, **self.fields}

    def _score(self, layer: int, pool: dict[str, Tensor], valid: Tensor) -> Tensor:
        """The policy's scores of ``pool``, checked, with pinned spans at +inf."""
        policy = self.policy
        view = SlotView(
            policy=policy_name(policy),
            layer=layer,
            t=self.t,
            position=pool["position"],
            valid=valid,
            fields={name: pool[name] for name in self.fields},
            given={name: pool[name] for name in policy.needs.score},
        )
        scores = policy.score(view)
        if scores.shape != valid.shape or scores.dtype != torch.float32:
            raise ValueError(
                f"policy {view.policy!r}: score must return float32 {list(valid.shape)}, "
                f"got {scores.dtype} {list(scores.shape)}"
            )
        pinned = self._pinned(pool["position"])
        return scores if pinned is None else scores.masked_fill(pinned, torch.inf)

    # ---- eviction --------------------------------------------------------------------------

    def evict(self) -> None:
        """Cut every head that has filled its slots back to ``budget``: after the last layer.

        One launch for all layers. Where the host does not know that nothing is due, a predicate
        on the device decides, so that the call can be captured or compiled.
        """
        blind = _is_recorded(self.device)
        if not blind and not self._eviction_due():
            return
        terms = {"slope": self.slope, "offset": self.offset}
        scores = None if self.policy.is_affine else torch.stack(self._slot_scores())
        kernels.evict(
            self.key,
            self.value,
            self.position,
            self.num_valid,
            self.t,
            budget=self.budget,
            **terms,
            scores=scores,
            sinks=self.sinks,
            recent=self.recent,
            fields=tuple(self.fields.values()),
            nan_seen=self.nan_seen,
            impl=self.impl,
        )
        if not blind and self._lengths is not None:
            self._lengths = self._cut(self._lengths)

    def _eviction_due(self) -> bool:
        return self._lengths is None or max(self._lengths) >= self.num_slots

    def _slot_scores(self) -> list[Tensor]:
        slot = torch.arange(self.num_slots, device=self.device)
        stored = self._scored_state()
        return [
            self._score(
                layer,
                {name: tensor[layer] for name, tensor in stored.items()},
                slot < self.num_valid[layer, :, :, None],
            )
            for layer in range(self.num_layers)
        ]

    # ---- rows ------------------------------------------------------------------------------

    def positions(self, layer: int) -> Tensor:
        """``[batch, num_kv_heads, num_slots]`` int32: what each slot holds, -1 where empty."""
        self._check_layer(layer)
        slot = torch.arange(self.num_slots, device=self.device)
        filled = slot < self.num_valid[layer, :, :, None]
        return self.position[layer].masked_fill(~filled, -1)

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Free all rows, or the given ones, in place, for the next sequences.

        Args:
            rows: Row indices, ints in ``[0, batch_size)``; None frees all and clears the flags.

        Raises:
            ValueError: a row is out of range.
        """
        self._next_layer, self._call = 0, None
        if rows is None:
            for tensor in (self.num_valid, self.t, self.seen, self.nan_seen):
                tensor.zero_()
            self._lengths, self.started = [0] * self.batch_size, False
            return
        index = self._row_index("rows", rows)
        self.num_valid[:, index] = 0
        self.t[index] = 0
        self._lengths = None

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, in place (beam search).

        Args:
            index: ``[batch]`` ints in ``[0, batch_size)``.

        Raises:
            ValueError: wrong length, or a row is out of range.
        """
        index = self._row_index("index", index)
        if len(index) != self.batch_size:
            raise ValueError(f"index must have {self.batch_size} entries, got {len(index)}")
        for tensor in self._state():
            for layer in tensor:  # one layer at a time bounds the temporary copy
                layer.copy_(layer.index_select(0, index))
        self.t.copy_(self.t.index_select(0, index))
        if self._lengths is not None and len(set(self._lengths)) > 1:
            self._lengths = None

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

    def stats(self) -> CacheStats:
        """What the cache did so far; reads the device.

        Raises:
            RuntimeError: with ``strict=True``, no head ever evicted or a score was NaN.
        """
        used = self.num_valid.cpu()
        seen = self.t.cpu()
        row_bytes = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.key.itemsize
        stats = CacheStats(
            tokens_seen=seen.tolist(),
            slots_used=used,
            evictions=seen[None, :, None] - used,
            bytes_held=sum(x.nbytes for x in [*self._state(), self.t, self.seen, self.nan_seen]),
            bytes_full=int(seen.sum()) * row_bytes,
            nan_layers=self.nan_seen.nonzero().flatten().tolist(),
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
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        self._check_layer(layer)
        if layer != self._next_layer and layer != 0:
            raise ValueError(
                f"layers must be called in order: expected layer {self._next_layer} "
                f"(or 0, a new call), got {layer}"
            )
        if query.dim() != 4 or query.shape[2] < 1:
            raise ValueError(
                "query must have shape [batch, num_heads, q_len >= 1, head_dim], "
                f"got {list(query.shape)}"
            )
        num_heads, q_len = query.shape[1], query.shape[2]
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"query must have a multiple of {self.num_kv_heads} heads, got {num_heads}"
            )
        _check_shape("query", query, (self.batch_size, num_heads, q_len, self.head_dim))
        slots = (self.batch_size, self.num_kv_heads, q_len, self.head_dim)
        _check_shape("key", key, slots)
        _check_shape("value", value, slots)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dtype != self.dtype:
                raise ValueError(f"{name} must have dtype {self.dtype}, got {tensor.dtype}")
            if tensor.device.type != self.device.type:
                raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        if hidden_states is None and "hidden_states" in self.policy.needs.insert:
            raise ValueError(
                f"policy {policy_name(self.policy)!r} needs hidden_states: "
                "pass hidden_states= to attend()"
            )
        if hidden_states is not None and hidden_states.shape[:2] != (self.batch_size, q_len):
            raise ValueError(
                f"hidden_states must have shape [{self.batch_size}, {q_len}, hidden_size], "
                f"got {list(hidden_states.shape)}"
            )
        if valid is not None:
            _check_shape("valid", valid, (self.batch_size, q_len))
            if valid.dtype != torch.bool:
                raise ValueError(f"valid must have dtype torch.bool, got {valid.dtype}")
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError(
                "key and value must not require grad: a bounded cache does not carry gradients; "
                "run under torch.no_grad() or torch.inference_mode(), or without a cache"
            )


# ---- helpers -------------------------------------------------------------------------------


def check_positive(argument: str, size: int) -> None:
    """Raise unless ``size`` is an int of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{argument} must be an int of at least 1, got {size!r}")


def check_budget(
    policy: RetentionPolicy,
    budget: int,
    buffer: int,
    *,
    sinks: int | None,
    recent: int | None,
    protect: Sequence[tuple[int, int]],
) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Resolve ``(sinks, recent, protect)`` and check that the budget exceeds them.

    Raises:
        ValueError: a size is out of range, or nothing would be left to choose.
    """
    check_positive("budget", budget)
    check_positive("buffer", buffer)
    own_sinks, own_recent = default_protection(policy, budget)
    sinks = own_sinks if sinks is None else sinks
    recent = own_recent if recent is None else recent
    for argument, size in (("sinks", sinks), ("recent", recent)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{argument} must be an int of at least 0, got {size!r}")
    spans = tuple((int(start), int(stop)) for start, stop in protect)
    for start, stop in spans:
        if not 0 <= start < stop:
            raise ValueError(
                f"protect must hold (start, stop) with 0 <= start < stop, got {(start, stop)}"
            )
    pinned = len({p for span in spans for p in range(*span) if p >= sinks})
    if budget <= sinks + recent + pinned:
        raise ValueError(
            f"budget must exceed the protected slots: budget={budget}, but sinks={sinks}, "
            f"recent={recent} and {pinned} positions of protect= are never evicted; "
            "raise the budget or lower the protection"
        )
    return sinks, recent, spans


def check_policy_needs(policy: RetentionPolicy) -> None:
    """Raise where a policy needs what the cache cannot give.

    Raises:
        TypeError: not a :class:`RetentionPolicy`.
        ValueError: the need and the policy are named.
    """
    if not isinstance(policy, RetentionPolicy):
        raise TypeError(f"policy must be a RetentionPolicy, got {type(policy).__name__}")
    needs = policy.needs
    missing = [f"insert={name!r}" for name in needs.insert if name not in _GIVEN_AT_INSERT]
    missing += [
        name
        for name, wanted in (
            ("attention", needs.attention is not None),
            ("query_window", needs.query_window > 0),
            ("query_moments", needs.query_moments),
            ("chronological", needs.chronological),
        )
        if wanted
    ]
    missing += [
        f"field {name!r} per query head"
        for name, spec in policy.fields.items()
        if spec.per == "query_head"
    ]
    if missing:
        raise ValueError(
            f"policy {policy_name(policy)!r} needs {', '.join(missing)}, "
            "which this version of the cache does not provide"
        )


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


def _scatter_slots(slots: Tensor, slot: Tensor | None, new: Tensor) -> None:
    """Write ``new`` ``[batch, heads, 1, ...]`` into one slot of each head."""
    if slot is not None:
        slots.scatter_(2, slot.reshape(*slot.shape, *(1,) * (new.dim() - 2)).expand_as(new), new)
