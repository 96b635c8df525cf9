"""The transformers ``Cache`` around a :class:`~trimkv_kernels.cache.BoundedKVCache`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from trimkv_kernels.cache import BoundedKVCache, CacheStats, saved_shape
from trimkv_kernels.checks import Span
from trimkv_kernels.integrations import compat
from trimkv_kernels.integrations.prompt_pins import PromptPins, SpanFinder
from trimkv_kernels.integrations.protocol import AttentionCache

MakeSlots = Callable[[int, torch.dtype, torch.device], BoundedKVCache]


class BoundedLayer(CacheLayerMixin):
    """One layer of a :class:`BoundedCache`, as transformers lists them; it holds no state."""

    def __init__(self, cache: BoundedCache, slot_layer: int) -> None:
        self._cache = cache
        self.slot_layer = slot_layer

    @property
    def is_initialized(self) -> bool:
        return self._cache.slots is not None

    @property
    def keys(self) -> Tensor | None:
        slots = self._cache.slots
        return None if slots is None else slots.keys(self.slot_layer)

    @property
    def values(self) -> Tensor | None:
        slots = self._cache.slots
        return None if slots is None else slots.values(self.slot_layer)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        _refuse("lazy_initialization", "the slots are made by the model's first call")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _refuse("update", "only a model patched with trimkv_kernels.patch() can use this cache")

    def get_seq_length(self, *args: Any) -> int | Tensor:
        return self._cache.get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        _refuse("reset of one layer", "call reset() of the cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        _refuse("reorder_cache of one layer", "call reorder_cache() of the cache")


class BoundedCache(Cache, AttentionCache):
    """A transformers ``Cache`` of fixed size. Made by ``PatchHandle.new_cache()`` or ``generate``.

    The slots are made by the first call, which knows the batch size, dtype and device. Layers with
    a sliding window, where a model has some, keep transformers' own caches, of the window's size;
    the slots know nothing of them, and number the other layers from 0.

    Args:
        make_slots: Called with batch size, dtype and device.
        owner: The handle of the model that may use it.
        windows: For each layer of the model its sliding window, None where it is bounded.
        is_compileable: Whether the policy's decode step can be compiled.
        chunked: The prompt comes in chunks.
        finders: Find what to pin in prompts.
        device: Where :meth:`load` makes slots.
        fingerprint: What else must agree for saved slots to mean the same.

    Attributes:
        slots: The :class:`BoundedKVCache`, None before the first call.
        sliding: The caches of the layers with a sliding window.
        chunked: The prompt comes in chunks, so that a row may have no real token in its first ones.
        is_assistant: It drafts for another model, which takes tokens back between its calls.
        evicts: The last layer's call evicts. False leaves ``slots.evict()`` to the caller.
        input_ids: Of the next call, where the decoder stack gets embeddings in their place.
        position_offset: ``[batch, 1]``, the next position less the tokens before it; None: unknown.
    """

    def __init__(
        self,
        make_slots: MakeSlots,
        *,
        owner: object,
        windows: Sequence[int | None],
        is_compileable: bool,
        chunked: bool = False,
        finders: Sequence[SpanFinder] = (),
        device: torch.device | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        layers: list[CacheLayerMixin] = []
        bounded = 0
        for window in windows:
            if window is None:
                layers.append(BoundedLayer(self, bounded))
                bounded += 1
            else:
                layers.append(DynamicSlidingWindowLayer(sliding_window=window))
        super().__init__(layers=layers)
        self.sliding = _sliding(layers)
        self.slots: BoundedKVCache | None = None
        self.chunked = chunked
        self.is_assistant = False
        self.evicts = True
        self.input_ids: Tensor | None = None
        self.position_offset: Tensor | None = None
        self.owner = owner
        self._make_slots = make_slots
        self._is_compileable = is_compileable and not self.sliding
        self._valid: Tensor | None = None
        self._was_padded = False
        self._device = device or torch.device("cpu")
        self._fingerprint = dict(fingerprint or {})
        self._is_holding = False
        self._pins = PromptPins(finders)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedCache:
        """An independent copy of the slots; the model and the policy are shared."""
        shared = [self.owner, self._pins.finders]
        if self.slots is not None:
            shared.append(self.slots.policy)
        memo.update({id(item): item for item in shared})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def is_empty(self) -> bool:
        """Whether no token was inserted since the cache was made or reset."""
        return self.slots is None or self.slots.is_empty

    def begin_call(
        self, mask: Tensor | None, batch: int, q_len: int, input_ids: Tensor | None = None
    ) -> None:
        """Take a call's padding mask and find what its text pins, before its first layer.

        Args:
            mask: ``[batch, >= q_len]``, 0 for padding; the last ``q_len`` columns are the call's.
                Beside layers with a sliding window it must cover all tokens so far.
            input_ids: ``[batch, q_len]``, read where messages, images or text are protected; None:
                those that were set before.

        Raises:
            ValueError: wrong shape, right padding or a hole, a row without a real token, or a
                batch size other than the cache's.
        """
        input_ids, self.input_ids = self.input_ids if input_ids is None else input_ids, None
        if self.slots is not None and batch != self.slots.batch_size:
            raise ValueError(
                f"the batch must have {self.slots.batch_size} rows, as when this cache was first "
                f"used, got {batch}; make another with new_cache()"
            )
        if self.sliding:
            self._check_whole_mask(mask, q_len)
        self._valid = None if mask is None else self._call_mask(mask, batch, q_len)
        self._was_padded |= self._valid is not None
        if q_len > 1:
            self._pins.find(input_ids, self._valid, batch, self.slots)

    def _check_whole_mask(self, mask: Tensor | None, q_len: int) -> None:
        """A sliding layer keeps padding, and leaves it to the mask to hide it."""
        total = self.sliding[0].get_seq_length() + q_len
        if mask is None and self._was_padded:
            raise ValueError(
                f"attention_mask must be given, with {total} columns: earlier calls were padded, "
                "and layers with a sliding window keep padding"
            )
        if mask is not None and mask.dim() == 2 and mask.shape[1] != total:
            raise ValueError(
                f"attention_mask must have {total} columns, one for each token so far, got "
                f"{mask.shape[1]}: this model has layers with a sliding window"
            )

    def _call_mask(self, mask: Tensor, batch: int, q_len: int) -> Tensor | None:
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < q_len:
            raise ValueError(
                f"attention_mask must have shape [{batch}, at least {q_len}], "
                f"got {list(mask.shape)}; custom 4-D masks do not work on a bounded cache"
            )
        valid = mask[:, -q_len:].bool()
        if torch.compiler.is_compiling() or (q_len == 1 and mask.device.type != "cpu"):
            return valid  # a decode step reads nothing back
        if valid.all():
            return None
        self._check_padding(valid)
        return valid

    def _check_padding(self, valid: Tensor) -> None:
        started = torch.zeros_like(valid[:, 0])
        if self.slots is not None:
            started = (self.slots.t > 0).to(valid.device)
        late = (valid[:, :-1] & ~valid[:, 1:]).any(1)
        if valid.shape[1] > 1:  # a single False closes a finished row
            late |= started & ~valid.all(1)
        if late.any():
            raise ValueError(
                "attention_mask must be padded on the left only, got padding after a real token "
                f"in rows {late.nonzero().flatten().tolist()}; set tokenizer.padding_side='left'"
            )
        check_rows(valid.any(1) | started | self.chunked)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor,
        query_nope: Tensor,
        key_nope: Tensor,
        scale: float,
        self_attention: Callable[[], Tensor],
    ) -> Tensor:
        """One attention layer's call, see :meth:`BoundedKVCache.attend`; the last layer evicts."""
        layer = self._slot_layer(layer)
        if self.slots is None:
            self.slots = self._make_slots(key.shape[0], key.dtype, key.device)
            if self._is_holding:
                self.slots.hold()
        if layer == 0:
            self._pins.apply(self.slots)
        if self._valid is not None:
            self._valid = self._valid.to(key.device)
        output = self.slots.attend(
            layer,
            query,
            key,
            value,
            hidden_states=hidden_states,
            query_nope=query_nope,
            key_nope=key_nope,
            valid=self._valid,
            scale=scale,
            self_attention=self_attention,
        )
        if layer == self.slots.num_layers - 1:
            self._valid = None
            if self.evicts:
                self.slots.evict()
        return output

    @property
    def is_compileable(self) -> bool:
        return self._is_compileable

    @property
    def is_initialized(self) -> bool:
        return self.slots is not None

    @property
    def is_croppable(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens seen, padding included: a device scalar once the cache is in use.

        Beside layers with a sliding window, which count on the host, an int.
        """
        if self.sliding:
            return self.sliding[0].get_seq_length()
        return 0 if self.slots is None else self.slots.seen

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        layer = self.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer):
            return layer.get_mask_sizes(query_length)
        # masks of bounded layers are only used for a prompt on an empty cache
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def positions(self, layer: int) -> Tensor:
        """``[batch, num_kv_heads, num_slots]`` int32: what each slot holds, -1 where empty.

        Raises:
            ValueError: the model's layer ``layer`` is not bounded.
        """
        return self._used("positions").positions(self._slot_layer(layer))

    def pin(self, spans: Sequence[Sequence[Span]]) -> None:
        """Protect positions of each row from eviction, before their tokens are read.

        Args:
            spans: For each row ``(start, stop)`` pairs of positions; they add to those there.

        Raises:
            ValueError: a span is not a span. What :meth:`BoundedKVCache.pin` raises of the rest is
                raised by the first call, before anything is stored.
        """
        if self.slots is None:
            self._pins.add(spans)
        else:
            self.slots.pin(spans)

    def stats(self) -> CacheStats:
        """What the slots of the bounded layers did so far, see :class:`CacheStats`."""
        return self._used("stats").stats()

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Free all rows, or the given ones, in place."""
        if rows is not None and self.sliding:
            _refuse("reset of some rows", "layers with a sliding window have one length; reset all")
        if self.slots is not None:
            self.slots.reset(rows)
        if rows is None:
            self._is_holding = False
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                self.layers[index] = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
        self.sliding = _sliding(self.layers)
        self._record_sliding()
        self._was_padded = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        if self.slots is not None:
            self.slots.reorder(beam_idx)
        for layer in self.sliding:
            layer.reorder_cache(beam_idx)
        self._move_offset(beam_idx)

    reorder = reorder_cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer with a sliding window calls; bounded layers call :meth:`attend`."""
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Let tokens wait outside the slots until :meth:`crop` confirms them (assisted decoding).

        See :meth:`BoundedKVCache.hold`. It ends with ``generate``.
        """
        self._is_holding = True
        if self.slots is not None:
            self.slots.hold()
        self._record_sliding()

    def _record_sliding(self) -> None:
        for layer in self.sliding:
            if self._is_holding and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def stop_past_recording(self) -> None:
        """Confirm what waits and let no more tokens wait."""
        self._is_holding = False
        if self.slots is not None and self.slots.is_holding:
            self.slots.release()
        for layer in self.sliding:
            if _records(layer):
                layer.crop(0)  # back to the window's size
                layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row.

        Args:
            tokens_to_remove: 0 or their number, negated, as transformers passes it; before 5.18
                also the number of tokens, padding included, that stay.

        Raises:
            ValueError: a positive number since 5.18, or the tokens cannot be taken back any more,
                see :meth:`BoundedKVCache.crop`.
        """
        count = compat.tokens_to_remove(int(tokens_to_remove), int(self.get_seq_length()))
        if self.slots is None:
            return
        for layer in self.sliding:
            if count and not _records(layer) and layer.get_seq_length() >= layer.sliding_window:
                raise ValueError(
                    "tokens cannot be taken back: layers with a sliding window have dropped those "
                    "before them; call activate_past_recording() before tokens that may be"
                )
        self.slots.crop(count)
        for layer in self.sliding:
            if count or _records(layer):
                layer.crop(-count)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` rows, next to each other."""
        slots = self._used("batch_repeat_interleave")
        self.batch_select_indices(torch.arange(slots.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in this order."""
        self._used("batch_select_indices").select(indices)
        for layer in self.sliding:
            layer.batch_select_indices(indices)
        self._move_offset(indices)

    def fork(self, copies: int) -> BoundedCache:
        """A new cache with ``copies`` rows for each row of this one, which stays as it is."""
        twin = copy.copy(self)
        twin.slots = self._used("fork").fork(copies)
        twin.layers = [
            BoundedLayer(twin, layer.slot_layer)
            if isinstance(layer, BoundedLayer)
            else copy.copy(layer)
            for layer in self.layers
        ]
        twin.sliding = _sliding(twin.layers)
        for layer in twin.sliding:
            layer.batch_repeat_interleave(copies)
        if twin.position_offset is not None:
            twin.position_offset = twin.position_offset.repeat_interleave(copies, dim=0)
        return twin

    def save(self, path: str | Path) -> None:
        """Write the slots as safetensors, with a fingerprint of cache, policy and model."""
        self._refuse_sliding("save")
        self._used("save").save(path, **self._fingerprint)

    def load(self, path: str | Path) -> None:
        """Take the slots of a file that :meth:`save` wrote.

        Raises:
            ValueError: it was saved with another model, policy, dtype or shape; the first
                difference is named, and the cache stays as it was.
        """
        self._refuse_sliding("load")
        slots = self.slots
        if slots is None:
            batch_size, dtype = saved_shape(path)
            slots = self._make_slots(batch_size, dtype, self._device)
        slots.load(path, **self._fingerprint)
        self.slots = slots

    def _move_offset(self, rows: Tensor) -> None:
        if self.position_offset is not None:
            self.position_offset = self.position_offset[rows.to(self.position_offset.device)]

    def _refuse_sliding(self, method: str) -> None:
        if self.sliding:
            _refuse(method, "layers with a sliding window are not in the file; read the text again")

    def _slot_layer(self, layer: int) -> int:
        """A layer of the model, as the slots number it."""
        bounded = self.layers[layer]
        if not isinstance(bounded, BoundedLayer):
            raise ValueError(f"layer {layer} has a sliding window and holds no slots")
        return bounded.slot_layer

    def _used(self, what: str) -> BoundedKVCache:
        if self.slots is None:
            raise RuntimeError(f"{what}() of an unused cache: pass it to the model first")
        return self.slots


def check_rows(has_token: Tensor) -> None:
    """Raise unless every row of ``has_token`` ``[batch]`` bool is True.

    Raises:
        ValueError: names the rows.
    """
    if not has_token.all():
        rows = (~has_token).nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask must have a real token in every row, got only padding in rows {rows}"
        )


def _sliding(layers: Sequence[CacheLayerMixin]) -> list[DynamicSlidingWindowLayer]:
    return [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]


def _records(layer: DynamicSlidingWindowLayer) -> bool:
    """Whether a layer keeps what has left its window, so that tokens can be taken back."""
    return bool(getattr(layer, "record_past", False))


def _refuse(method: str, alternative: str) -> NoReturn:
    raise NotImplementedError(f"a bounded cache does not support {method}: {alternative}")
