"""How a patched model gets its cache and its masks, in ``generate`` and in a forward of its own.

``generate`` makes its cache and its masks with methods of the model, which are replaced on the
instance. For a plain forward there is a pre-hook on the decoder stack. A model that reads images
has another one on its body, because only the body sees which tokens are images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList
from transformers.masking_utils import create_masks_for_generate

from trimkv_kernels.integrations import compat
from trimkv_kernels.integrations.assisted import LimitedDrafts
from trimkv_kernels.integrations.discovery import ModelParts, argument_names
from trimkv_kernels.integrations.hf_cache import BoundedCache
from trimkv_kernels.integrations.images import is_image
from trimkv_kernels.integrations.instance_patch import InstancePatch
from trimkv_kernels.integrations.padding import (
    RowEnds,
    check_rows,
    is_right_padded,
    move_back,
    move_columns,
)
from trimkv_kernels.integrations.rows_cache import RowsCache

# The methods of transformers' continuous batching, which runs on a paged cache of its own.
_PAGED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_IMAGES = ("pixel_values", "pixel_values_videos")


@dataclass
class _Running:
    """A running ``generate``.

    Attributes:
        input_ids, attention_mask: Its prompt, as the caller gave it.
        caches: The caches that it uses, each with the number of tokens seen before.
        row_ends: Which rows have ended.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    caches: list[tuple[BoundedCache, int]] = field(default_factory=list)
    row_ends: RowEnds = field(default_factory=RowEnds)

    def end(self, *, failed: bool) -> None:
        """Confirm drafts. After a failure, mark caches that may hold a part of the text."""
        for cache, seen in self.caches:
            cache.row_ends = None
            if failed and int(cache.get_seq_length()) != seen:
                cache.break_off("generate()")
            if not cache.is_assistant:
                cache.stop_past_recording()


# A nested `generate`, or one in another thread, has its own.
_running: ContextVar[_Running | None] = ContextVar("running", default=None)


class CacheOwner(Protocol):
    """What ``generate`` and a forward need from the handle of a patched model."""

    def new_cache(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> BoundedCache:
        """An empty cache of this model. Its size may depend on the prompt."""
        ...

    def check_cache(self, cache: Any) -> None:
        """Raise ``TypeError`` unless ``cache`` is one of this model's."""
        ...

    def follow(self, cache: BoundedCache) -> None:
        """Make ``cache`` the latest one."""
        ...

    def finish(self, cache: BoundedCache) -> None:
        """Note the figures of the latest cache; ``strict`` raises ``RuntimeError`` here."""
        ...


class Generation:
    """Gives a model bounded caches and the masks that go with them.

    Args:
        owner: Makes the caches.
        parts: The parts of the model.
        prefill_chunk: ``generate`` reads prompts in chunks of this many tokens; None: whole.
    """

    def __init__(self, owner: CacheOwner, parts: ModelParts, prefill_chunk: int | None) -> None:
        self._owner, self._prefill_chunk = owner, prefill_chunk
        self._integration, self._image_ids = parts.integration, parts.image_ids
        self._base_arguments = argument_names(parts.base)
        self._body_arguments = () if parts.body is None else argument_names(parts.body)
        self._config, self._num_layers = parts.config, parts.config.num_hidden_layers
        self._generator = parts.generator

    def install(self, parts: ModelParts, patch: InstancePatch) -> None:
        """Put hooks on the decoder stack and the body, and overrides on the generating module."""
        hooks = [(parts.base, self._before_forward), (parts.body, self._before_body)]
        for module, run in hooks:
            if module is not None:
                before = module.register_forward_pre_hook(run, with_kwargs=True)
                patch.on_restore(before.remove)
        after = parts.base.register_forward_hook(self._after_forward, with_kwargs=True)
        patch.on_restore(after.remove)
        generator = parts.generator
        if generator is None:
            return
        overrides = {
            "_prepare_cache_for_generation": self._prepare_cache,
            "create_masks_for_generate": self._create_masks,
            "_get_stopping_criteria": self._get_criteria,
            "_get_candidate_generator": self._get_candidates,
            "generate": self._generate,
        }
        for name, override in overrides.items():
            stock: Any = getattr(generator, name, None)
            patch.set(generator, name, _in_place_of(stock, functools.partial(override, stock)))
        for name in _PAGED:
            stock = getattr(generator, name, None)
            if stock is not None:
                refuse = _in_place_of(stock, functools.partial(_refuse_paged, name))
                patch.set(generator, name, refuse)

    def _before_body(
        self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the body: set the cache, and give it the ids, which the base does not get."""
        inputs = _by_name(self._body_arguments, args, kwargs)
        cache = self._cache_of(body.language_model, inputs)
        if cache is not None:
            cache.input_ids = inputs.get("input_ids")
            self._check_images(inputs)
        return (), inputs

    def _before_forward(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the decoder stack: set the cache and take the padding mask."""
        inputs = _by_name(self._base_arguments, args, kwargs)
        cache = self._cache_of(base, inputs)
        if cache is None:
            return (), inputs
        batch, q_len = _tokens(inputs).shape[:2]
        mask = _padding_mask(inputs)
        if cache.chunked and self._integration.position_axes == 1:
            compat.place_chunk(inputs, mask, q_len)
        cache.begin_call(mask, batch, q_len, inputs.get("input_ids"))
        if cache.padding.order is not None:
            move_columns(inputs, cache.padding.order, int(cache.get_seq_length()))
        if isinstance(cache, RowsCache):
            cache.place(inputs, q_len)
        # attention to slots needs no mask; sliding layers do need one
        if cache.has_free_rows or not (cache.is_empty or cache.sliding):
            inputs["attention_mask"] = self._integration.no_mask(_tokens(inputs).device)
        return (), inputs

    def _cache_of(self, base: Any, inputs: dict[str, Any]) -> BoundedCache | None:
        """The call's cache, made if there is none; None if the stock forward is to run."""
        cache = inputs.get("past_key_values")
        if cache is None and not _uses_cache(base, inputs):
            return None
        if base.training and (_running.get() is None or _is_random(base)):
            raise ValueError(
                "a bounded cache does not train: call model.eval(), or pass use_cache=False. "
                "(generate() runs in training mode without dropout and gradient checkpointing)"
            )
        if inputs.get("output_attentions") or getattr(base.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True does not work on a bounded cache: attention covers slots, "
                "not tokens; unpatch() the model or pass use_cache=False"
            )
        mask = _padding_mask(inputs)
        if cache is None:
            if mask is not None and _needs_no_cache(mask, _tokens(inputs)):
                inputs["use_cache"] = False
                return None
            prompt = (inputs.get(name) for name in ("input_ids", "attention_mask"))
            cache = inputs["past_key_values"] = self._owner.new_cache(*prompt)
        self._owner.check_cache(cache)
        _skip_what_was_seen(inputs, cache, mask)
        if _tokens(inputs).shape[1] == 0:
            raise ValueError(
                f"input_ids must hold more than the {int(cache.get_seq_length())} tokens that the "
                "cache has seen: pass the text from its beginning, or reset() the cache"
            )
        return cache

    def _check_images(self, inputs: dict[str, Any]) -> None:
        """Check that a call with image tokens has images.

        In some versions ``generate`` drops images of later turns, and of chunks after the first.
        """
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[1] == 1 or torch.compiler.is_compiling():
            return
        encoded = inputs.get("mm_encoder_outputs") or {}
        images = [*encoded.values(), *(inputs.get(name) for name in _IMAGES)]
        if all(image is None for image in images) and bool(is_image(ids, self._image_ids).any()):
            raise ValueError(
                "input_ids hold tokens of images, and no images came with them: pass pixel_values. "
                "If this version's generate() drops them, in a later turn or between the chunks "
                "of a prompt, use decode_loop(images=), or prefill_chunk=None"
            )

    def _after_forward(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Hook of the decoder stack, after all layers: end the call."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, BoundedCache):
            return output
        cache.end_call()
        order = cache.padding.order
        return output if order is None else move_back(output, order)

    def _prepare_cache(
        self,
        stock: Callable[..., Any],
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Give ``generate`` a bounded cache, and the chunk size for its prompt."""
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is False:
            return stock(generation_config, model_kwargs, *args, **kwargs)
        if compat.chosen_cache(generation_config) is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not work on "
                "a patched model, which has its own cache; leave it out, or pass "
                "past_key_values=handle.new_cache()"
            )
        if generation_config.prefill_chunk_size is None:
            generation_config.prefill_chunk_size = self._prefill_chunk
        call = _running.get()
        if cache is None:
            prompt = () if call is None else (call.input_ids, call.attention_mask)
            cache = model_kwargs["past_key_values"] = self._owner.new_cache(*prompt)
        else:
            self._owner.check_cache(cache)
            cache.check_finished()
            cache._is_user_defined = True
        cache.chunked = generation_config.prefill_chunk_size is not None
        mask, seen = model_kwargs.get("attention_mask"), int(cache.get_seq_length())
        if isinstance(mask, Tensor) and mask.dim() == 2:
            check_rows(mask.bool().any(1))
        _check_is_longer(compat.text_length(generation_config, mask), seen)
        if mask is None and seen > 0 and cache.slots is not None:  # no padding
            ones = torch.ones(cache.slots.batch_size, seen, dtype=torch.bool)
            cache.padding.check_seen(ones, cache.slots.t)
        cache.is_assistant = bool(getattr(generation_config, "is_assistant", False))
        mode = compat.generation_mode(args[0])
        if call is not None:
            call.row_ends = RowEnds(
                is_tracked=mode in ("greedy_search", "sample"),
                is_assisted=mode == "assisted_generation",
            )
            call.caches.append((cache, seen))
            cache.row_ends = call.row_ends
        if cache.is_assistant:
            cache.activate_past_recording()
        self._owner.follow(cache)
        return None

    def _create_masks(self, stock: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Keep the 2-D padding mask for the forward."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, BoundedCache):
            return (stock or create_masks_for_generate)(*args, **kwargs)
        embeds, mask = compat.prompt_embeds(kwargs), kwargs.get("attention_mask")
        is_step = embeds.shape[1] == 1 and not (cache.is_empty or cache.sliding)
        running = _running.get()
        if is_step and self._image_ids:
            # the body may read the mask; it gets none once the ended rows are known without it
            return None if running is None or running.row_ends.has_begun else mask
        is_known = running is not None and running.row_ends.has_begun
        if mask is not None and is_step and (is_known or embeds.device.type != "cpu"):
            # the same shape in all steps, so that a compiled step is not compiled again
            mask = mask[:, -1:]
        return mask

    def _get_criteria(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap the stopping criteria, to learn which rows end."""
        criteria, running = stock(*args, **kwargs), _running.get()
        return criteria if running is None else _Heard(criteria, running.row_ends)

    def _get_candidates(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let drafts end before a possible eviction."""
        generator, options = stock(*args, **kwargs), kwargs["model_kwargs"]
        cache = options.get("past_key_values")
        if not isinstance(cache, BoundedCache):
            return generator
        chunk = kwargs["generation_config"].prefill_chunk_size
        read = functools.partial(
            self._read_chunks, kwargs["input_ids"], options.get("attention_mask"), cache, chunk
        )
        return LimitedDrafts(generator, cache, read)

    def _read_chunks(
        self, input_ids: Tensor, mask: Tensor | None, cache: BoundedCache, chunk: int | None
    ) -> None:
        """Read all chunks of a prompt except the last, as ``generate`` does without drafts."""
        if chunk is None:
            return
        mask = torch.ones_like(input_ids) if mask is None else mask
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        starts = range(int(cache.get_seq_length()), input_ids.shape[1], chunk)
        for start in starts[:-1]:
            stop = start + chunk
            self._generator(
                input_ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=position[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )

    def _generate(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the stock ``generate``, then confirm drafts and check ``strict``."""
        given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
        ids = next((tokens for tokens in given if tokens is not None), None)
        running = _Running(ids, kwargs.get("attention_mask"))
        is_outermost = _running.get() is None
        token = _running.set(running)
        try:
            output = stock(*args, **kwargs)
        except BaseException:
            running.end(failed=True)
            if is_outermost:  # a failed early exit does not restore it
                self._config.num_hidden_layers = self._num_layers
            raise
        finally:
            _running.reset(token)
        running.end(failed=False)
        for cache, _ in running.caches:
            if not cache.is_assistant:
                self._owner.finish(cache)
        return output


class _Heard(StoppingCriteriaList):
    """Stopping criteria whose results are noted."""

    def __init__(self, criteria: StoppingCriteriaList, row_ends: RowEnds) -> None:
        super().__init__(criteria)
        self._row_ends = row_ends

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._row_ends.has_begun = True
        done = super().__call__(*args, **kwargs)
        self._row_ends.note(done)
        return done


def _in_place_of(
    stock: Callable[..., Any] | None, method: functools.partial[Any]
) -> functools.partial[Any]:
    """``method`` with the name and the signature of the method that it replaces."""
    if stock is not None:
        functools.update_wrapper(method, stock)
    return method


def _refuse_paged(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"{name}() does not work on a patched model: continuous batching of transformers keeps all "
        "keys and values in a paged cache of its own; call generate() or decode_loop() with a "
        "left-padded batch, make a trimkv_kernels.RowBatch(model, rows) for requests that come and "
        "go, start `transformers serve` without --continuous-batching, or unpatch(model) first"
    )


def _by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _uses_cache(base: Any, inputs: dict[str, Any]) -> bool:
    use_cache = inputs.get("use_cache")
    return bool(base.config.use_cache if use_cache is None else use_cache)


def _is_random(base: Any) -> bool:
    """Whether a decoder stack in training mode computes otherwise than in eval mode."""
    return bool(getattr(base.config, "attention_dropout", 0)) or any(
        getattr(module, "gradient_checkpointing", False)
        or (isinstance(module, nn.Dropout) and module.p > 0)
        for module in base.modules()
    )


def _tokens(inputs: dict[str, Any]) -> Tensor:
    """``[batch, q_len, ...]``: ids or embeddings."""
    ids = inputs.get("input_ids")
    tokens: Tensor = inputs["inputs_embeds"] if ids is None else ids
    return tokens


def _padding_mask(inputs: dict[str, Any]) -> Tensor | None:
    """The mask of a call.

    Raises:
        ValueError: it is not a tensor.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            "attention_mask must be a tensor [batch, columns], 0 for padding, got "
            f"{type(mask).__name__}: masks for each kind of layer and block masks do not work on a "
            "bounded cache; use_cache=False takes them"
        )
    return mask


def _needs_no_cache(mask: Tensor, tokens: Tensor) -> bool:
    """Whether a call without a cache is padded on the right; the stock forward then runs it."""
    if torch.compiler.is_compiling() or mask.shape != tokens.shape[:2]:
        return False
    check_rows(mask.bool().any(dim=1))
    return is_right_padded(mask)


def _skip_what_was_seen(inputs: dict[str, Any], cache: BoundedCache, mask: Tensor | None) -> None:
    """Drop tokens of earlier turns, which assisted decoding passes again in its first call."""
    ends = cache.row_ends
    if ends is None or not ends.is_assisted or ends.has_begun or cache.is_empty:
        return
    length, seen = _tokens(inputs).shape[1], int(cache.get_seq_length())
    if mask is None or mask.shape[1] == length:
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(inputs.get(name), Tensor):
                inputs[name] = inputs[name][:, seen:]
        if isinstance(inputs.get("position_ids"), Tensor):
            inputs["position_ids"] = inputs["position_ids"][..., seen:]


def _check_is_longer(length: int | None, seen: int) -> None:
    """Check that a text of ``length`` tokens has new ones for a cache that has seen ``seen``."""
    if length is not None and seen > 0 and length <= seen:
        raise ValueError(
            f"input_ids must hold more than the {seen} tokens that the cache has seen, got "
            f"{length}: pass the text from its beginning, or reset() the cache"
        )
