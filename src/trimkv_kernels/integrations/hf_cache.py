"""The transformers ``Cache`` around a :class:`~trimkv_kernels.cache.BoundedKVCache`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from trimkv_kernels.cache import BoundedKVCache, CacheStats, empty_slots
from trimkv_kernels.checks import Span
from trimkv_kernels.integrations import compat
from trimkv_kernels.integrations.hf_layers import (
    BoundedLayer,
    Contents,
    check_sliding_crop,
    copies_of,
    make_layers,
    own_words,
    records,
    refuse,
    renew_sliding,
)
from trimkv_kernels.integrations.mixed_precision import MixedPrecision
from trimkv_kernels.integrations.padding import Padding, RowEnds, check_shape, check_whole_mask
from trimkv_kernels.integrations.prompt_pins import PromptPins, SpanFinder
from trimkv_kernels.integrations.protocol import AttentionCache, LayerCall

MakeSlots = Callable[[int, torch.dtype, torch.device], BoundedKVCache]

_BROKEN_OFF = "the call before broke off, and its tokens are in some layers only"


class BoundedCache(Cache, AttentionCache):
    """A transformers ``Cache`` of fixed size. Made by ``PatchHandle.new_cache()`` or ``generate``.

    The slots are made by the first call, which knows the batch size, dtype and device. If a model
    has layers with a sliding window, they keep transformers' own caches, of the window's size. The
    slots only have the other layers, numbered from 0.

    Args:
        make_slots: Called with batch size, dtype and device.
        owner: The handle of the model that may use it.
        windows: For each layer of the model its sliding window, None if it is bounded.
        is_compileable: Whether the policy's decode step can be compiled.
        chunked: The prompt comes in chunks.
        finders: Find what to pin in prompts.
        device: Where :meth:`load` makes slots.
        fingerprint: What else a file's cache and this one must have in common.

    Attributes:
        chunked: The prompt comes in chunks, so the first chunks of a row may be all padding.
        is_assistant: It drafts for another model, which takes tokens back between its calls.
        evicts: The last layer's call evicts. False leaves ``slots.evict()`` to the caller.
        input_ids: Of the next call, if the decoder stack gets embeddings instead.
        position_offset: ``[batch, 1]``, the next position less the tokens before it; None: unknown.
        padding: Which tokens were padding.
        row_ends: Of the ``generate`` that runs on it; None if none runs.
        has_free_rows: Rows come and go one by one, see :class:`RowsCache`.
    """

    has_free_rows = False

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
        self._contents = Contents()
        super().__init__(layers=make_layers(self._contents, windows))
        self.chunked = chunked
        self.is_assistant = False
        self.evicts = True
        self.input_ids: Tensor | None = None
        self.position_offset: Tensor | None = None
        self.row_ends: RowEnds | None = None
        self.owner = owner
        self._make_slots = make_slots
        self._is_compileable = is_compileable and not self.sliding
        self.padding = Padding()
        self._valid: Tensor | None = None
        self._was_padded = False
        self._unfinished: str | None = None  # what has to end before the next call
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

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a bounded cache cannot be pickled, because it belongs to its patched model: write it "
            "with save(path), and load(path) into new_cache() of a model patched the same way"
        )

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "copy.copy() of a bounded cache would share its slots: use fork(1) or copy.deepcopy()"
        )

    @property
    def slots(self) -> BoundedKVCache | None:
        """Keys, values and all their state; None before the first call."""
        return self._contents.slots

    @property
    def sliding(self) -> list[DynamicSlidingWindowLayer]:
        """The caches of the layers with a sliding window."""
        return self._contents.sliding

    @property
    def is_empty(self) -> bool:
        """Whether no token was inserted since the cache was made or reset."""
        return self.slots is None or self.slots.is_empty

    def begin_call(
        self, mask: Tensor | None, batch: int, q_len: int, input_ids: Tensor | None = None
    ) -> None:
        """Take a call's padding mask and find what to pin in its text, before the first layer.

        Args:
            mask: ``[batch, >= q_len]``, 0 for padding; the last ``q_len`` columns are the call's.
                Beside layers with a sliding window it must cover all tokens so far.
            input_ids: ``[batch, q_len]``, read if messages, images or text are protected; None:
                the attribute of this name.

        Raises:
            ValueError: the mask does not fit, see :meth:`Padding.of_call`, the batch size is not
                the cache's, or the call before did not finish.
        """
        input_ids, self.input_ids = self.input_ids if input_ids is None else input_ids, None
        self.check_finished()
        if self.slots is not None and batch != self.slots.batch_size:
            raise ValueError(
                f"the batch must have {self.slots.batch_size} rows, as when this cache was first "
                f"used, got {batch}; make another with new_cache()"
            )
        if self.sliding:
            check_whole_mask(mask, int(self.get_seq_length()) + q_len, self._was_padded)
        self.padding.order = None
        self._valid = self._call_mask(mask, batch, q_len)
        if self._valid is not None:  # reading it would compile a step twice
            self._was_padded = True
        if q_len > 1:
            if self.padding.order is not None and input_ids is not None:
                input_ids = input_ids.gather(1, self.padding.order.to(input_ids.device))
            self._pins.find(input_ids, self._valid, batch, self.slots)
        if self.sliding:  # they may run before the first bounded layer, and cannot be undone
            self._unfinished = _BROKEN_OFF

    def end_call(self) -> None:
        """The decoder stack is done with a call."""
        self._unfinished = None

    def _call_mask(self, mask: Tensor | None, batch: int, q_len: int) -> Tensor | None:
        ends = self.row_ends
        if ends is not None and ends.has_begun and q_len == 1:
            return ends.of_step()  # generate's own mask has 1 for padding in ended rows
        if mask is None:
            return None
        check_shape(mask, batch, q_len)
        if torch.compiler.is_compiling() or (q_len == 1 and mask.device.type != "cpu"):
            return mask[:, -q_len:].bool()  # a decode step reads nothing back
        if self.is_assistant:  # there generate() masks pad tokens that are a part of the text
            mask = mask.cummax(dim=1).values
        return self.padding.of_call(
            mask,
            q_len,
            seen=int(self.get_seq_length()),
            t=None if self.slots is None else self.slots.t,
            is_whole=ends is not None,
            may_be_empty=self.chunked or self.has_free_rows,
            may_move=not self.sliding,
        )

    def fuses_rope(self, q_len: int) -> bool:
        """See :meth:`BoundedKVCache.fuses_rope`; not under autocast."""
        slots = self.slots
        if slots is None or MixedPrecision.of(slots.device).dtype is not None:
            return False
        return slots.fuses_rope(q_len)

    def attend(self, layer: int, call: LayerCall) -> Tensor:
        """One attention layer's call, see :meth:`BoundedKVCache.attend`; the last layer evicts."""
        layer = self._slot_layer(layer)
        mixed = MixedPrecision.of(call.key.device)
        call = mixed.unified(call)
        slots = self._slots_for(call.key)
        if layer == 0:
            self._pins.apply(slots)  # before anything is stored
            self._unfinished = _BROKEN_OFF
        with mixed.off():
            output = slots.attend(
                layer,
                call.query,
                call.key,
                call.value,
                hidden_states=call.hidden_states,
                query_nope=call.query_nope,
                key_nope=call.key_nope,
                valid=self._valid,
                scale=call.scale,
                self_attention=call.self_attention,
                rope=call.rope,
            )
            if layer == slots.num_layers - 1:
                self._valid = None
                if self.evicts:
                    slots.evict()
        return output

    def _slots_for(self, key: Tensor) -> BoundedKVCache:
        """The slots; the first call makes them."""
        slots = self._contents.slots
        if slots is None:
            slots = self._contents.slots = self._make_slots(key.shape[0], key.dtype, key.device)
            if self._is_holding:
                slots.hold()
        if key.dtype != slots.dtype:
            raise ValueError(
                f"this call must compute in {slots.dtype}, as the first call on this cache did, "
                f"got {key.dtype}: stay inside torch.autocast, or outside, or make another cache "
                "with new_cache()"
            )
        return slots

    def abandon_call(self) -> None:
        """Forget a call that was cut short before the device ran any of it."""
        self._unfinished = self._valid = None
        self._pins.clear()
        if self.slots is not None:
            self.slots.abandon_call()

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

        If there are layers with a sliding window, which count on the host, it is an int.
        """
        return self._contents.seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length
    max_cache_len = property(get_max_length)  # PEFT reads this one

    def positions(self, layer: int) -> Tensor:
        """``[batch, num_kv_heads, num_slots]`` int32: each slot's position, -1 if it is empty.

        Raises:
            ValueError: the model's layer ``layer`` is not bounded.
        """
        return self._used("positions").positions(self._slot_layer(layer))

    def pin(self, spans: Sequence[Sequence[Span]]) -> None:
        """Protect positions of each row from eviction, before their tokens are read.

        Args:
            spans: For each row its spans ``(start, stop)``, added to those it has.

        Raises:
            ValueError: a span is not a span. The other errors of :meth:`BoundedKVCache.pin` are
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
        if rows is not None:
            self._refuse_sliding("reset of some rows", "they have one length; reset all")
            self.check_finished()
        if self.slots is not None:
            self.slots.reset(rows)
        self.padding.reset(rows)
        if rows is None:
            self._is_holding = self._was_padded = False
            self._unfinished = self._valid = None
            self._pins.clear()
            renew_sliding(self.layers, self._contents)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        self.check_finished()
        if self.slots is not None:
            with own_words():
                self.slots.reorder(beam_idx)
        self.padding.select(beam_idx)
        for layer in self.sliding:
            layer.reorder_cache(beam_idx)
        self._move_offset(beam_idx)

    reorder = reorder_cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by layers with a sliding window; bounded layers call :meth:`attend`."""
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Let tokens wait outside the slots until :meth:`crop` confirms them (assisted decoding).

        See :meth:`BoundedKVCache.hold`. It ends with ``generate``.
        """
        self._is_holding = True
        if self.slots is not None:
            self.slots.hold()
        for layer in self.sliding:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def stop_past_recording(self) -> None:
        """Confirm the waiting tokens and stop holding new ones."""
        self._is_holding = False
        if self._unfinished is None and self.slots is not None and self.slots.is_holding:
            self.slots.release()
        for layer in self.sliding:
            if records(layer):
                layer.crop(0)  # back to the window's size
                layer.record_past = False

    def draft_room(self, length: int) -> int:
        """Draft tokens that the next call can verify as if they had come one by one.

        After the last of them a head may evict, so the next token must be in another call. If a
        call has several tokens before the drafts, as a prompt's call has, the answer is 0.

        Args:
            length: Tokens of the text, padding included. The cache has seen all of them, or all
                but the last.
        """
        if self.slots is None or length - int(self.get_seq_length()) != 1:
            return 0
        return max(0, self.slots.room - 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row.

        Args:
            tokens_to_remove: 0 or their number, negated, as transformers passes it; before 5.18
                also the number of tokens, padding included, that stay.

        Raises:
            ValueError: a positive number since 5.18, or the tokens cannot be taken back any more,
                see :meth:`BoundedKVCache.crop`.
        """
        self.check_finished()
        count = compat.tokens_to_remove(int(tokens_to_remove), int(self.get_seq_length()))
        if count:
            check_sliding_crop(self.sliding)
        if self.slots is not None:
            with own_words():
                if self.row_ends is not None and self.slots.is_holding and not self.is_assistant:
                    self.slots.settle(count, one_by_one=True)
                else:
                    self.slots.crop(count)
        for layer in self.sliding:
            if count or records(layer):
                layer.crop(-count)
        if count:
            self.padding.crop(int(self.get_seq_length()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` rows, next to each other."""
        rows = self._used("batch_repeat_interleave").batch_size
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in this order."""
        self.check_finished()
        with own_words():
            self._used("batch_select_indices").select(indices)
        self.padding.select(indices)
        for layer in self.sliding:
            layer.batch_select_indices(indices)
        self._move_offset(indices)

    def fork(self, copies: int) -> BoundedCache:
        """A new cache with ``copies`` rows for each row of this one."""
        self.check_finished()
        with own_words():
            slots = self._used("fork").fork(copies)
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._contents = Contents(slots)
        twin.layers = copies_of(self.layers, twin._contents)
        for layer in twin.sliding:
            layer.batch_repeat_interleave(copies)
        if twin.position_offset is not None:
            twin.position_offset = twin.position_offset.repeat_interleave(copies, dim=0)
        twin._pins = PromptPins(self._pins.finders)
        twin.padding = copy.copy(self.padding)
        rows = torch.arange(slots.batch_size // copies)
        twin.padding.select(rows.repeat_interleave(copies))
        return twin

    def save(self, path: str | Path) -> None:
        """Write the slots as safetensors, with a fingerprint of cache, policy and model."""
        self._refuse_sliding("save", "they are not in the file; read the text again")
        self.check_finished()
        with own_words():
            self._used("save").save(path, **self._fingerprint)

    def load(self, path: str | Path) -> None:
        """Replace the slots by those of a file that :meth:`save` wrote.

        Raises:
            ValueError: it was saved with another model, policy, dtype or shape; the first
                difference is named, and the cache stays as it was.
        """
        self._refuse_sliding("load", "they are not in the file; read the text again")
        slots = self.slots
        if slots is None:
            slots = empty_slots(path, self._make_slots, self._device, self._fingerprint)
        slots.load(path, **self._fingerprint)
        self._contents.slots = slots
        self.padding.reset()
        self._is_holding = self._was_padded = False
        self._unfinished = self._valid = None
        self._pins.clear()

    def break_off(self, what: str) -> None:
        """Note that ``what`` was interrupted, so that the cache may hold unwanted tokens."""
        self._unfinished = f"{what} was broken off, and its cache may hold tokens of it"

    def check_finished(self) -> None:
        """Check that no call and no ``generate`` was broken off.

        Raises:
            ValueError: one was; the message says what to do.
        """
        if self._unfinished is not None:
            raise ValueError(f"{self._unfinished}: call reset() and read the text again")

    def _move_offset(self, rows: Tensor) -> None:
        if self.position_offset is not None:
            self.position_offset = self.position_offset[rows.to(self.position_offset.device)]

    def _refuse_sliding(self, method: str, reason: str) -> None:
        if self.sliding:
            refuse(method, f"layers with a sliding window are beside the slots: {reason}")

    def _slot_layer(self, layer: int) -> int:
        """The number that a layer of the model has in the slots."""
        bounded = self.layers[layer]
        if not isinstance(bounded, BoundedLayer):
            raise ValueError(f"layer {layer} has a sliding window and holds no slots")
        return bounded.slot_layer

    def _used(self, what: str) -> BoundedKVCache:
        if self.slots is None:
            raise RuntimeError(f"{what}() of an unused cache: pass it to the model first")
        return self.slots
