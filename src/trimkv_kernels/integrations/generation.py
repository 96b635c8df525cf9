"""How a patched model comes by its cache and its masks: in ``generate`` and in a bare forward.

``generate`` makes its cache and its masks through methods of the model; they are replaced on the
instance. A bare forward is served by a pre-hook on the decoder stack, and by one on the module that
puts images before it, where there is such a module: it alone sees which tokens are images.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from trimkv_kernels.integrations import compat
from trimkv_kernels.integrations.discovery import ModelParts
from trimkv_kernels.integrations.hf_cache import BoundedCache, check_rows
from trimkv_kernels.integrations.images import is_image
from trimkv_kernels.integrations.instance_patch import InstancePatch

# The methods of transformers' continuous batching, which runs on a paged cache of its own.
_PAGED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_IMAGES = ("pixel_values", "pixel_values_videos")


@dataclass(eq=False)
class _Call:
    """A running ``generate``: its prompt, and the caches that it was given or made."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    caches: weakref.WeakSet[BoundedCache] = field(default_factory=weakref.WeakSet)


# A call inside a call has its own.
_running: ContextVar[_Call | None] = ContextVar("running", default=None)


class CacheOwner(Protocol):
    """What ``generate`` and a forward ask of the handle of a patched model."""

    def new_cache(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> BoundedCache:
        """An empty cache of this model, for this prompt where its size depends on one."""
        ...

    def check_cache(self, cache: Any) -> None:
        """Raise ``TypeError`` unless ``cache`` is one of this model's."""
        ...

    def follow(self, cache: BoundedCache) -> None:
        """Make ``cache`` the latest one."""
        ...

    def check_strict(self) -> None:
        """Raise ``RuntimeError`` where ``strict`` finds what it forbids."""
        ...


class Generation:
    """Gives a model bounded caches and the masks that go with them.

    Args:
        owner: Makes the caches.
        parts: The model's.
        prefill_chunk: ``generate`` reads prompts in chunks of this many tokens, None whole.
    """

    def __init__(self, owner: CacheOwner, parts: ModelParts, prefill_chunk: int | None) -> None:
        self._owner, self._prefill_chunk = owner, prefill_chunk
        self._integration, self._image_ids = parts.integration, parts.image_ids
        self._base_arguments = _argument_names(parts.base)
        self._body_arguments = () if parts.body is None else _argument_names(parts.body)

    def install(self, parts: ModelParts, patch: InstancePatch) -> None:
        """Put the pre-hooks on decoder stack and body, and the overrides on what generates."""
        hooks = [(parts.base, self._before_forward), (parts.body, self._before_body)]
        for module, run in hooks:
            if module is not None:
                hook = module.register_forward_pre_hook(run, with_kwargs=True)
                patch.on_restore(hook.remove)
        generator = parts.generator
        if generator is None:
            return
        overrides = {
            "_prepare_cache_for_generation": self._prepare_cache,
            "create_masks_for_generate": self._create_masks,
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
        """Pre-hook of the body: see to the cache, show it the text that the base does not get."""
        inputs = _by_name(self._body_arguments, args, kwargs)
        cache = self._cache_of(body.language_model, inputs)
        if cache is not None:
            cache.input_ids = inputs.get("input_ids")
            self._check_images(inputs)
        return (), inputs

    def _before_forward(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the decoder stack: see to the cache and take the padding mask."""
        inputs = _by_name(self._base_arguments, args, kwargs)
        cache = self._cache_of(base, inputs)
        if cache is None:
            return (), inputs
        batch, q_len = _tokens(inputs).shape[:2]
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.numel() else None
        if cache.chunked and self._integration.position_axes == 1:
            compat.place_chunk(inputs, mask, q_len)
        cache.begin_call(mask, batch, q_len, inputs.get("input_ids"))
        # slots are valid or not, whatever their order; sliding layers do need their mask
        if not (cache.is_empty or cache.sliding):
            inputs["attention_mask"] = self._integration.no_mask(_tokens(inputs).device)
        return (), inputs

    def _cache_of(self, base: Any, inputs: dict[str, Any]) -> BoundedCache | None:
        """The call's cache, made where there is none; None where the stock forward is to run."""
        cache = inputs.get("past_key_values")
        if cache is None and not _uses_cache(base, inputs):
            return None
        if base.training:
            raise ValueError(
                "a bounded cache does not train: call model.eval(), or pass use_cache=False"
            )
        if inputs.get("output_attentions") or getattr(base.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True does not work on a bounded cache: attention covers slots, "
                "not tokens; unpatch() the model or pass use_cache=False"
            )
        if cache is None:
            prompt = (inputs.get(name) for name in ("input_ids", "attention_mask"))
            cache = inputs["past_key_values"] = self._owner.new_cache(*prompt)
        self._owner.check_cache(cache)
        return cache

    def _check_images(self, inputs: dict[str, Any]) -> None:
        """Raise where a call has tokens of images that are not there.

        ``generate`` of some versions drops images of later turns, and of chunks after the first.
        """
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[1] == 1 or torch.compiler.is_compiling():
            return
        encoded = inputs.get("mm_encoder_outputs") or {}
        images = [*encoded.values(), *(inputs.get(name) for name in _IMAGES)]
        if all(image is None for image in images) and bool(is_image(ids, self._image_ids).any()):
            raise ValueError(
                "input_ids hold tokens of images, and no images came with them: pass pixel_values. "
                "Where this version's generate() drops them, in a later turn or between the chunks "
                "of a prompt, use decode_loop(images=), or prefill_chunk=None"
            )

    def _prepare_cache(
        self,
        stock: Callable[..., Any],
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Give ``generate`` a bounded cache, and its own prompt chunking."""
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is False:
            return stock(generation_config, model_kwargs, *args, **kwargs)
        if compat.chosen_cache(generation_config) is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not work on "
                "a patched model, which brings its own cache; leave it out, or pass "
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
            cache._is_user_defined = True
        cache.chunked = generation_config.prefill_chunk_size is not None
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            check_rows(mask.bool().any(1))
        cache.is_assistant = bool(getattr(generation_config, "is_assistant", False))
        if call is not None:
            call.caches.add(cache)
        if compat.must_hold(generation_config, args[0]):
            cache.activate_past_recording()
        self._owner.follow(cache)
        return None

    def _create_masks(self, stock: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Keep the 2-D padding mask for the forward; a decode step on the slots needs none."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, BoundedCache):
            return (stock or create_masks_for_generate)(*args, **kwargs)
        embeds = compat.prompt_embeds(kwargs)
        if embeds.shape[1] == 1 and not (cache.is_empty or cache.sliding):
            # a body, which may read the mask, gets none; the decoder stack's hook sees to its own
            return None if self._image_ids else self._integration.no_mask(embeds.device)
        return kwargs.get("attention_mask")

    def _generate(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The stock ``generate``, after which drafts are settled and ``strict`` is checked."""
        given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
        ids = next((tokens for tokens in given if tokens is not None), None)
        call = _Call(ids, kwargs.get("attention_mask"))
        token = _running.set(call)
        try:
            output = stock(*args, **kwargs)
        finally:
            _running.reset(token)
            for cache in call.caches:
                if not cache.is_assistant:
                    cache.stop_past_recording()
        self._owner.check_strict()
        return output


def _in_place_of(
    stock: Callable[..., Any] | None, method: functools.partial[Any]
) -> functools.partial[Any]:
    """``method`` with the name and the signature of what it replaces."""
    if stock is not None:
        functools.update_wrapper(method, stock)
    return method


def _refuse_paged(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"{name}() does not work on a patched model: continuous batching of transformers keeps all "
        "keys and values in a paged cache of its own; call generate() or decode_loop() with a "
        "left-padded batch, start `transformers serve` without --continuous-batching, or "
        "unpatch(model) first"
    )


def _argument_names(module: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _uses_cache(base: Any, inputs: dict[str, Any]) -> bool:
    use_cache = inputs.get("use_cache")
    return bool(base.config.use_cache if use_cache is None else use_cache)


def _tokens(inputs: dict[str, Any]) -> Tensor:
    """``[batch, q_len, ...]``: ids or embeddings."""
    ids = inputs.get("input_ids")
    tokens: Tensor = inputs["inputs_embeds"] if ids is None else ids
    return tokens
