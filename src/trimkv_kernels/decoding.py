"""Decoding without ``generate``: a step, its eviction and the choice of the next token in one.

On a GPU this is one CUDA graph, captured once and replayed. Every few steps the host reads whether
all rows have finished, and nothing else. On other devices the same step runs without a graph.
If a policy's scores are not affine, evictions run between the replays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimkv_kernels.cache import BoundedKVCache
from trimkv_kernels.capture import (
    CompiledStep,
    RecordedStep,
    Recordings,
    Step,
    Steps,
    surroundings,
)
from trimkv_kernels.checks import check_positive
from trimkv_kernels.integrations import compat
from trimkv_kernels.integrations.discovery import HANDLE
from trimkv_kernels.integrations.hf_cache import BoundedCache
from trimkv_kernels.integrations.images import Prompt, check_images
from trimkv_kernels.integrations.padding import check_rows
from trimkv_kernels.patching import PatchHandle
from trimkv_kernels.token_choice import TokenChoice

_CHECK_EVERY = 16  # steps between two checks whether all rows have finished, on a GPU


def decode_loop(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    past_key_values: BoundedCache | None = None,
    images: Mapping[str, Any] | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    check_every: int | None = None,
    compile: bool | None = None,
) -> Iterator[Tensor]:
    """Generate tokens one after the other, on a GPU as replays of one CUDA graph.

    Decoding is greedy, or samples as ``generate`` does with these options. Only the token ids of
    ``model.generation_config`` are read. For penalties, beams, constraints and assistants use
    ``generate``. Nothing runs until the first token is requested.

    Args:
        model: A patched model in eval mode, or a wrapper around one.
        input_ids: ``[batch, length]`` int64, on the model's device. With ``past_key_values`` the
            text from its beginning, as for ``generate``: the tokens that the cache has seen are
            skipped.
        attention_mask: ``[batch, length]``, 0 for padding, which must be on the left; None: no
            padding.
        max_new_tokens: Most tokens of each row.
        past_key_values: A cache from ``PatchHandle.new_cache()`` to continue; None makes one.
        images: For a vision-language model, what its processor returned beside ``input_ids``, for
            all images of the text. None: no images, or only those that the cache has seen.
        do_sample: Draw from the distribution; False takes the likeliest token.
        temperature: The logits are divided by it.
        top_k: Draw from this many likeliest tokens.
        top_p: Draw from the fewest likeliest tokens whose probabilities add up to this.
        generator: Source of randomness, on the model's device; None is torch's own.
        eos_token_id: Tokens that end a row. None is those of the generation config; ``()`` is none.
        pad_token_id: What a finished row yields; None is the generation config's, else an eos.
        check_every: Steps between two checks whether all rows have finished; None is 16 on a GPU
            and 1 elsewhere. Tokens come in groups of this size; without eos tokens one by one.
        compile: Compile the step with Inductor, about a minute once for each model and batch size;
            None does so on a GPU, for a model without sliding windows. Sums are then rounded in
            other places, so a near-tie of two logits may fall otherwise than in ``generate``.

    Yields:
        ``[batch]`` int64 on the device, a token of each row, until every row has met an eos or has
        ``max_new_tokens``. A finished row gives the cache only padding. If the caller stops
        earlier, the cache may be up to ``check_every`` tokens ahead.

    Raises:
        ValueError: the model is not patched, or an argument does not fit; the message says what.
        TypeError: ``past_key_values`` is not a cache of this model.
    """
    handle = handle_of(model)
    device = handle.shape.device
    check_positive("max_new_tokens", max_new_tokens)
    if check_every is not None:
        check_positive("check_every", check_every)
    if model.training:
        raise ValueError("model must be in eval mode, got one in training: call model.eval()")
    mask = _check_prompt(input_ids, attention_mask, device)
    choice = TokenChoice(do_sample, temperature, top_k, top_p, generator)
    choice.check(device)
    eos, pad = _end_tokens(model, eos_token_id, pad_token_id)
    cache = handle.new_cache(input_ids, mask) if past_key_values is None else past_key_values
    handle.check_cache(cache)
    seen = int(cache.get_seq_length())
    cache.check_finished()
    if input_ids.shape[1] <= seen:
        raise ValueError(
            f"input_ids must hold more than the {seen} tokens that the cache has seen, got "
            f"{input_ids.shape[1]}: pass the text from its beginning"
        )
    if cache.slots is not None and cache.slots.is_holding:
        raise ValueError(
            "past_key_values must not hold tokens back, got the cache of an assistant: call its "
            "stop_past_recording() first"
        )
    check_images(handle.parts, input_ids[:, seen:], images)
    if compile and cache.sliding:
        raise ValueError(
            "compile must be False for a model with sliding windows, whose caches are new tensors "
            "at each step"
        )
    if compile is None:
        compile = device.type == "cuda" and not cache.sliding
    loop = _Loop(handle, model, cache, choice, eos, pad, compile)
    if check_every is None:
        check_every = _CHECK_EVERY if device.type == "cuda" else 1
    block = check_every if eos else 1
    return loop.tokens(_Prompt(input_ids, mask, seen, images), max_new_tokens, block)


@dataclass(frozen=True)
class _Prompt:
    """The prompt, and how many of its tokens the cache has seen."""

    input_ids: Tensor
    mask: Tensor
    seen: int
    images: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Buffers:
    """What a step works on. All are written in place: a captured step keeps their addresses.

    Attributes:
        token: ``[batch, 1]`` int64, the latest tokens.
        unfinished: ``[batch, 1]`` bool, the rows that have not met an eos.
        history: ``[block, batch]`` int64, a ring of the tokens that were not yielded yet.
        place: ``[1]`` int64, index in the ring for the next token.
        going_on: int64 scalar, how many tokens were chosen while some row was unfinished.
        offset: ``[batch, 1]`` int64, added to the positions of RoPE.
    """

    token: Tensor
    unfinished: Tensor
    history: Tensor
    place: Tensor
    going_on: Tensor
    offset: Tensor

    @classmethod
    def allocate(cls, batch: int, block: int, device: torch.device) -> _Buffers:
        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            token=empty(batch, 1),
            unfinished=empty(batch, 1, dtype=torch.bool),
            history=empty(block, batch),
            place=empty(1),
            going_on=empty(),
            offset=empty(batch, 1),
        )

    def begin(self, offset: Tensor | int) -> None:
        """Set them for the first token of an answer."""
        for tensor in (self.token, self.history, self.place, self.going_on):
            tensor.zero_()
        self.unfinished.fill_(True)
        self.offset.copy_(offset) if isinstance(offset, Tensor) else self.offset.fill_(offset)


_recordings = Recordings()


class _Loop:
    """One call of :func:`decode_loop`: its buffers, and the step that works on them.

    A graph of the step is kept for the next call on the same cache.
    """

    def __init__(
        self,
        handle: PatchHandle,
        model: Any,
        cache: BoundedCache,
        choice: TokenChoice,
        eos: tuple[int, ...],
        pad: int,
        is_compiled: bool,
    ) -> None:
        self._is_compiled = is_compiled
        self._handle, self._model, self._cache, self._choice = handle, model, cache, choice
        self._parts = handle.parts
        self._pad, self._device = pad, handle.shape.device
        self._ends = eos
        self._eos = torch.tensor(eos, device=self._device) if eos else None

    @torch.no_grad()
    def tokens(self, prompt: _Prompt, max_new_tokens: int, block: int) -> Iterator[Tensor]:
        self._handle.follow(self._cache)
        logits = self._read_prompt(prompt)
        slots = self._slots
        if slots.policy.capacity_only:
            check_capacity(slots, int(slots.t.max()), max_new_tokens)
        self._mask = prompt.mask
        made_for = self._made_for(prompt.input_ids.shape[0], block)
        recorded = None if made_for is None else _recordings.take(slots, made_for)
        if recorded is None:
            self.buffers = _Buffers.allocate(prompt.input_ids.shape[0], block, self._device)
        else:
            self.buffers = recorded.tensors
        self.buffers.begin(self._offset)
        self._take(self._choice(logits))
        yield self.buffers.token[:, 0].clone()
        replay = None if recorded is None else recorded.replay
        generator = self._choice.generator
        advance = Steps(self._compiled_step(), self._cache, self._device, generator, replay)
        try:
            yield from self._blocks(advance, slots, max_new_tokens, block)
        finally:
            if self._eos is not None:
                self._cache.padding.unfed = ~self.buffers.unfinished[:, 0]
                slots.forget_counts()  # finished rows were counted as if they had continued
            if made_for is not None and advance.replay is not None:
                _recordings.put(slots, RecordedStep(made_for, self.buffers, advance.replay))
        self._handle.finish(self._cache)

    def _made_for(self, batch: int, block: int) -> tuple[object, ...] | None:
        """Everything that a graph of the step depends on; None if that cannot be told."""
        policy = vars(self._handle.policy).values()
        modules = [self._model, *(x for x in policy if isinstance(x, nn.Module))]
        outside = surroundings(modules, self._slots)
        if outside is None:
            return None
        asked = (self._choice, self._ends, self._pad, self._is_compiled)
        return (batch, block, *asked, id(self._model), outside)

    def _blocks(
        self, advance: Steps, slots: BoundedKVCache, max_new_tokens: int, block: int
    ) -> Iterator[Tensor]:
        buffers = self.buffers
        made = told = 1
        while made < max_new_tokens:
            steps = min(block, max_new_tokens - made)
            buffers.place.zero_()
            for _ in range(steps):
                advance()
            made += steps
            going_on = made if self._eos is None else int(buffers.going_on)
            real = min(made, going_on + 1)
            slots.uncount_padding(made - real)  # steps in which every row was padding
            yield from buffers.history[: real - told].clone()
            told = real
            if going_on < made:
                return

    @property
    def _slots(self) -> BoundedKVCache:
        if self._cache.slots is None:
            raise RuntimeError("the model's call made no slots: it must be the patched one")
        return self._cache.slots

    def _read_prompt(self, prompt: _Prompt) -> Tensor:
        """The logits ``[batch, vocabulary]`` after the prompt, which may be read in chunks."""
        length, chunk = prompt.input_ids.shape[1], self._handle.options.prefill_chunk
        self._cache.chunked = chunk is not None
        encoded = self._encode_images(prompt)
        ids, mask, order = prompt.input_ids, prompt.mask, self._order(prompt)
        if order is not None:
            ids, mask = ids.gather(1, order), mask.gather(1, order)
            encoded = None if encoded is None else encoded.in_order(order)
        for start in range(prompt.seen, length, chunk or length):
            stop = min(start + (chunk or length), length)
            real = mask[:, start:stop]
            known = mask[:, :stop] if order is None else real
            if encoded is None:
                logits = self._read_text(ids[:, start:stop], real, known)
            else:
                hidden = encoded.read(self._parts, self._cache, start, stop, known)
                head = self._parts.generator.get_output_embeddings()
                logits = head(hidden[:, -1]).to(self._device)
        self._cache.chunked = False
        return logits

    def _encode_images(self, prompt: _Prompt) -> Prompt | None:
        """The prompt with its images, or None without any. Also sets the offset of positions."""
        body, padding = self._parts.body, (~prompt.mask).sum(dim=1, keepdim=True)
        encoded = None
        if prompt.images is not None:
            encoded = Prompt.of(self._parts, prompt.input_ids, prompt.images, prompt.mask)
        elif prompt.seen == 0:
            compat.note_no_images(body, padding)
        if prompt.images is not None or prompt.seen == 0 or self._cache.position_offset is None:
            # the model's own offset may be that of another conversation
            self._cache.position_offset = compat.rope_offset(body, padding)
        offset = self._cache.position_offset
        self._offset = 0 if offset is None else offset
        return encoded

    def _order(self, prompt: _Prompt) -> Tensor | None:
        """The order of the columns if rows have ended; None: as they are.

        The last token of such a row was not read by the cache. It is read with the new tokens.
        """
        slots, ended = self._cache.slots, self._cache.padding.unfed
        if slots is not None and ended is not None:
            ended = _unfed(prompt.mask[:, : prompt.seen], slots.t, ended)
        self._cache.padding.unfed = None
        return None if ended is None else _with_last_token(prompt.mask, prompt.seen, ended)

    def _read_text(self, ids: Tensor, real: Tensor, mask: Tensor) -> Tensor:
        slots = self._cache.slots
        before = 0 if slots is None else slots.t[:, None]
        return self._logits(
            ids, mask, position_ids=before + (real.cumsum(dim=1) - 1).clamp(min=0) + self._offset
        )

    def _logits(self, input_ids: Tensor, mask: Tensor | None, **positions: Tensor) -> Tensor:
        logits = last_logits(self._model, self._cache, input_ids, mask, **positions)
        return logits.to(self._device)  # the last layer may be on another device than the first

    def _compiled_step(self) -> Step:
        """The step, compiled if that is asked for. Random draws stay torch's own."""
        if not self._is_compiled:
            return self._step
        self._slots.forget_counts()  # else the first step would be compiled by itself
        if not self._choice.do_sample:
            return CompiledStep(self._step)
        feed = CompiledStep(self._feed)
        return lambda: self._take(self._choice(feed()))

    def _step(self) -> None:
        """Feed the latest token, evict, choose the next."""
        self._take(self._choice(self._feed()))

    def _feed(self) -> Tensor:
        """Feed the latest token and evict; the logits ``[batch, vocabulary]`` of the next."""
        slots = self._slots
        return self._logits(
            self.buffers.token,
            self._mask_of_step(),
            position_ids=slots.t[:, None].long() + self.buffers.offset,
            cache_position=slots.seen[None],  # transformers up to 5.0 would read back to make it
        )

    def _mask_of_step(self) -> Tensor | None:
        if self._cache.sliding:  # these layers hold padding, so they need the whole mask
            self._mask = torch.cat((self._mask, self.buffers.unfinished), dim=1)
            return self._mask
        return None if self._eos is None else self.buffers.unfinished

    def _take(self, token: Tensor) -> None:
        """Note the chosen tokens ``[batch]``, and which rows end with them."""
        buffers, token = self.buffers, token[:, None]
        if self._eos is not None:
            # torch.where with a number and torch.isin may wait for the device
            token = token.masked_fill(~buffers.unfinished, self._pad)
            buffers.unfinished.bitwise_and_((token != self._eos).all(dim=1, keepdim=True))
            buffers.going_on.add_(buffers.unfinished.any())
        buffers.token.copy_(token)
        buffers.history.index_copy_(0, buffers.place, token.T)
        buffers.place.add_(1).remainder_(buffers.history.shape[0])


def last_logits(
    model: Any, cache: BoundedCache, input_ids: Tensor, mask: Tensor | None, **positions: Tensor
) -> Tensor:
    """Call the model; the logits of the last token of each row, ``[batch, vocabulary]``."""
    logits: Tensor = model(
        input_ids=input_ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **positions,
    ).logits[:, -1]
    return logits


def check_capacity(slots: BoundedKVCache, seen: int, max_new_tokens: int) -> None:
    """Check that a policy that never evicts has room for an answer after ``seen`` tokens.

    Raises:
        ValueError: it has not.
    """
    needed = seen + max_new_tokens - 1
    if slots.policy.capacity_only and needed > min(slots.budgets):
        raise ValueError(
            "max_new_tokens must leave room in a cache that never evicts: it holds budget="
            f"{min(slots.budgets)} tokens, got {max_new_tokens}, which needs {needed}; "
            "give a larger budget or another policy"
        )


def handle_of(model: nn.Module) -> PatchHandle:
    """The handle of a patched model, or of a wrapper around one.

    Raises:
        TypeError: not a model.
        ValueError: it is not patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    for module in model.modules():
        handle = module.__dict__.get(HANDLE)
        if isinstance(handle, PatchHandle):
            return handle
    raise ValueError("model must be patched, got one that is not: call patch(model) first")


def _check_prompt(input_ids: Tensor, mask: Tensor | None, device: torch.device) -> Tensor:
    """The mask as bool, all True if it is None."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype != torch.int64:
        raise ValueError(
            f"input_ids must be int64 [batch, length >= 1], got {input_ids.dtype} "
            f"{list(input_ids.shape)}"
        )
    if mask is None:
        mask = torch.ones_like(input_ids)
    for name, tensor in (("input_ids", input_ids), ("attention_mask", mask)):
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have shape {list(input_ids.shape)}, got {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    mask = mask.bool()
    check_rows(mask.any(dim=1))
    return mask


def _unfed(seen: Tensor, t: Tensor, ended: Tensor) -> Tensor | None:
    """The rows in ``ended`` whose last token the mask calls real.

    None if there are none, or if the mask of the ``seen`` tokens does not fit ``t``.
    """
    missing = seen.sum(dim=1) - t
    fits = ((missing == 0) | ((missing == 1) & ended)).all()
    return missing == 1 if fits and missing.any() else None


def _with_last_token(mask: Tensor, seen: int, ended: Tensor) -> Tensor:
    """The order of the columns in each row, ``[batch, length]`` int64.

    In rows that ended, the first new column is padding. It is replaced by the last real token.

    Raises:
        ValueError: a row has no padding there.
    """
    taken = ended & mask[:, seen]
    if taken.any():
        raise ValueError(
            "attention_mask must be 0 from the end of a row up to the next turn, got 1 in rows "
            f"{taken.nonzero().flatten().tolist()}"
        )
    column = torch.arange(mask.shape[1], device=mask.device)
    last = (mask[:, :seen] * column[:seen]).argmax(dim=1)
    order = column.expand(*mask.shape).clone()
    order[ended, seen] = last[ended]
    return order


def _end_tokens(
    model: nn.Module, eos: int | Sequence[int] | None, pad: int | None
) -> tuple[tuple[int, ...], int]:
    """The tokens that end a row, and the token that it yields afterwards."""
    config = getattr(model, "generation_config", None)
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    ends = compat.end_tokens(eos)
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    return ends, next(itertools.chain([] if pad is None else [pad], ends), 0)
