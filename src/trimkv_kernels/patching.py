"""``patch(model)``: a stock transformers model decodes on a bounded cache, and back again.

Only the instance is touched: the ``forward`` of its attention layers, a pre-hook on its decoder
stack, and the methods through which ``generate`` makes its cache and its masks. What was there
before comes back with :func:`unpatch`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from trimkv_kernels.cache import BoundedKVCache, CacheStats, Impl
from trimkv_kernels.checks import (
    Span,
    check_budget,
    check_policy,
    check_positive,
    check_protection,
)
from trimkv_kernels.gates import checkpoint_folder, resolve_base_model
from trimkv_kernels.gates.published import PUBLISHED, find_gates
from trimkv_kernels.integrations import INTEGRATIONS, BoundedCache, Integration, compat
from trimkv_kernels.integrations.base import FULL, STOCK_FORWARD, check_layer_types, layer_types
from trimkv_kernels.integrations.chat import ChatRoles
from trimkv_kernels.integrations.hf_cache import check_rows
from trimkv_kernels.integrations.sharding import check_sharded, local_heads
from trimkv_kernels.kernels import resolve_impl
from trimkv_kernels.policies import ModelShape, RetentionPolicy, make_policy
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.base import policy_name
from trimkv_kernels.policies.streaming_llm import StreamingLLM
from trimkv_kernels.policies.trimkv import TrimKV

logger = logging.getLogger("trimkv_kernels")

DEFAULT_BUDGET = 512
DEFAULT_BUFFER = 128
_HANDLE = "_trimkv_handle"


@dataclass(frozen=True)
class PatchOptions:
    """The arguments of :func:`patch`, resolved."""

    budget: int
    buffer: int
    allocation: Allocation | None
    sinks: int
    recent: int
    protect: tuple[Span, ...]
    roles: ChatRoles | None
    prefill_chunk: int | None
    impl: Impl
    strict: bool


def patch(
    model: nn.Module,
    policy: RetentionPolicy | str | None = None,
    *,
    budget: int | None = None,
    buffer: int | None = None,
    allocation: Allocation | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    protect: Sequence[Span] | ChatRoles = (),
    prefill_chunk: int | None = None,
    impl: Impl = "auto",
    strict: bool = False,
) -> PatchHandle:
    """Make a transformers model decode on a bounded cache; ``generate()`` works unchanged.

    Args:
        model: A supported model, such as ``Qwen3ForCausalLM``, or a wrapper around one.
        policy: What to keep: a policy, a registered name, ``"trimkv"`` for the published gates of
            this base model (fetched if need be), or None: TRIM-KV where its gates are at hand
            without the network, else StreamingLLM; the log names the choice.
        budget: Pairs kept per (layer, row, KV head); None is the gates' own, else 512.
        buffer: New tokens a full head takes before the next eviction; None is the gates' own,
            else 128.
        allocation: How the budget is shared out over the layers, such as ``PerLayer((64, 192))``;
            None is the policy's own way, mostly the same for all.
        sinks: First positions that are never evicted; None is the policy's own number.
        recent: Last positions that are never evicted; None is the policy's own number.
        protect: What else is never evicted: spans ``(start, stop)`` of positions, or
            :class:`~trimkv_kernels.ChatRoles`, messages of some roles.
        prefill_chunk: ``generate`` reads prompts in chunks of this many tokens, evicting in
            between; None reads them whole.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.
        strict: Raise at the end of ``generate``, at ``stats()`` and at ``unpatch()`` where the
            budget was never reached or a score was NaN.

    Returns:
        A handle: ``unpatch()``, ``new_cache()``, ``stats()``; as a context manager it unpatches.

    Raises:
        TypeError: the model or its attention forward is not supported.
        ValueError: the model is patched already, or an option does not fit it. Nothing is changed.
    """
    compat.warn_if_untested()
    integration, base = find_model(model)
    layers: list[Any] = [m for m in base.modules() if isinstance(m, integration.attention)]
    for layer in layers:
        integration.check_attention(layer)
    check_layer_types(base, integration.layer_types)
    types = layer_types(base.config)
    layers = [layer for layer in layers if types[layer.layer_idx] == FULL]
    shape = _model_shape(integration, base, layers)
    chosen = _choose_policy(policy, shape.name_or_path)
    check_sharded(chosen, shape)
    chosen = chosen.bind(shape)
    check_policy(chosen)
    gates_budget, gates_buffer = _gates_sizes(chosen)
    budget = budget if budget is not None else gates_budget or DEFAULT_BUDGET
    buffer = buffer if buffer is not None else gates_buffer or DEFAULT_BUFFER
    if prefill_chunk is not None:
        check_positive("prefill_chunk", prefill_chunk)
    resolve_impl(impl, shape.device)
    roles = protect if isinstance(protect, ChatRoles) else None
    spans = () if isinstance(protect, ChatRoles) else protect
    budgets = check_budget(chosen, budget, buffer, shape.num_layers, allocation)
    options = PatchOptions(
        budget,
        buffer,
        allocation,
        *check_protection(chosen, budgets, sinks=sinks, recent=recent, protect=spans),
        roles,
        prefill_chunk,
        impl,
        strict,
    )
    handle = PatchHandle(
        base, layers, find_generator(model, integration), integration, shape, chosen, options
    )
    logger.info("patched %s: %s", integration.name, handle)
    return handle


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch` exactly.

    Raises:
        ValueError: the model is not patched.
    """
    for module in model.modules():
        handle = module.__dict__.get(_HANDLE)
        if handle is not None:
            handle.unpatch()
            return
    raise ValueError("model is not patched: there is nothing to undo")


def from_pretrained(
    checkpoint: str | Path,
    *,
    budget: int | None = None,
    buffer: int | None = None,
    revision: str | None = None,
    **model_kwargs: Any,
) -> Any:
    """Load a published TRIM-KV checkpoint: the base model it names, its gates, patched.

    Args:
        checkpoint: Folder or hub id of the gates. The hub path is untested.
        budget: Pairs kept per head; None is what the gates were trained for, else 512.
        buffer: New tokens between evictions; None is the gates' own, else 128.
        revision: Revision of the checkpoint on the hub.
        model_kwargs: Passed on to ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The patched model, in eval mode.

    Raises:
        ValueError: no such checkpoint, or it does not fit its base.
    """
    folder = checkpoint_folder(checkpoint, revision=revision)
    policy = TrimKV.from_pretrained(folder)
    config = policy.gates.config
    if config.base_revision is not None:
        model_kwargs.setdefault("revision", config.base_revision)
    base = resolve_base_model(folder, config)
    model = AutoModelForCausalLM.from_pretrained(base, **model_kwargs).eval()
    patch(model, policy, budget=budget, buffer=buffer)
    return model


class PatchHandle:
    """What :func:`patch` did, and the way back. All per-call state is in the caches it makes.

    Attributes:
        policy: What decides what stays, bound to the model.
        options: Budget, buffer, protection and the rest, as they were resolved.
        shape: What the policy knows of the model.
    """

    def __init__(
        self,
        base: Any,
        layers: list[Any],
        generator: nn.Module | None,
        integration: Integration,
        shape: ModelShape,
        policy: RetentionPolicy,
        options: PatchOptions,
    ) -> None:
        self.policy = policy
        self.options = options
        self.shape = shape
        self._base, self._layers, self._generator = base, layers, generator
        self._integration = integration
        self._argument_names = tuple(inspect.signature(type(base).forward).parameters)[1:]
        self._fingerprint = _fingerprint(base)
        self._latest: weakref.ref[BoundedCache] | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
        except BaseException:
            self._restore()
            raise

    def __repr__(self) -> str:
        o = self.options
        return (
            f"PatchHandle(policy={policy_name(self.policy)!r}, budget={o.budget}, "
            f"buffer={o.buffer}, sinks={o.sinks}, recent={o.recent}, impl={o.impl!r})"
        )

    # ---- the user's side -------------------------------------------------------------------

    def new_cache(self) -> BoundedCache:
        """An empty cache, to pass as ``past_key_values=`` to the model or to ``generate``."""
        cache = BoundedCache(
            self._make_slots,
            owner=self,
            windows=self._windows(),
            is_compileable=self.policy.is_compileable and len(set(self._devices())) == 1,
            chunked=self.options.prefill_chunk is not None,
            roles=self.options.roles,
            device=self.shape.device,
            fingerprint=self._fingerprint,
        )
        self.follow(cache)
        return cache

    def stats(self) -> CacheStats:
        """The figures of the latest cache.

        Raises:
            RuntimeError: no cache of this model is alive, or ``strict`` found what it forbids.
        """
        cache = None if self._latest is None else self._latest()
        if cache is None:
            raise RuntimeError(
                "no cache is alive: keep one from new_cache(), pass it as past_key_values= "
                "and call its stats()"
            )
        return cache.stats()

    def unpatch(self) -> None:
        """Restore the model exactly as it was.

        Raises:
            ValueError: the model is not patched any more.
            RuntimeError: ``strict`` found what it forbids; the model is restored all the same.
        """
        if not self._undo:
            raise ValueError("model is not patched any more: there is nothing to undo")
        self._restore()
        self.check_strict()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._undo:
            self._restore()
            if error is None:
                self.check_strict()

    # ---- installing ------------------------------------------------------------------------

    def _install(self) -> None:
        forward = self._integration.attention_forward
        self._set(self._base, _HANDLE, self)
        for layer in self._layers:
            if "forward" in layer.__dict__:
                self._set(layer, STOCK_FORWARD, layer.__dict__["forward"])
            self._set(layer, "forward", functools.partial(forward, layer))
        hook = self._base.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._undo.append(hook.remove)
        if self._generator is not None:
            for name in _Overrides.names:
                override = getattr(_Overrides, name)
                stock = getattr(self._generator, name, None)
                method = functools.partial(override, self, stock)
                if stock is not None:
                    functools.update_wrapper(method, stock)
                self._set(self._generator, name, method)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        attributes = module.__dict__
        if name in attributes:
            self._undo.append(functools.partial(attributes.__setitem__, name, attributes[name]))
        else:
            self._undo.append(functools.partial(attributes.pop, name, None))
        attributes[name] = value

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _make_slots(self, batch: int, dtype: torch.dtype, device: torch.device) -> BoundedKVCache:
        o, shape, devices = self.options, self.shape, self._devices()
        return BoundedKVCache(
            self.policy,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            batch_size=batch,
            budget=o.budget,
            buffer=o.buffer,
            allocation=o.allocation,
            num_heads=shape.num_heads,
            sinks=o.sinks,
            recent=o.recent,
            protect=o.protect,
            dtype=dtype,
            device=device if len(set(devices)) == 1 else devices,
            impl=o.impl,
            strict=o.strict,
        )

    def _windows(self) -> list[int | None]:
        config = self._base.config
        return [None if kind == FULL else config.sliding_window for kind in layer_types(config)]

    def _devices(self) -> list[torch.device]:
        """Where each bounded layer computes now."""
        return [_device(layer) for layer in self._layers]

    # ---- during a forward ------------------------------------------------------------------

    def _before_forward(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the decoder stack: see to the cache and take the padding mask."""
        inputs = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        cache = inputs.get("past_key_values")
        if cache is None and not _uses_cache(base, inputs):
            return (), inputs
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
            cache = inputs["past_key_values"] = self.new_cache()
        self.check_cache(cache)
        batch, q_len = _tokens(inputs).shape[:2]
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.numel() else None
        if cache.chunked:
            compat.place_chunk(inputs, mask, q_len)
        cache.begin_call(mask, batch, q_len, inputs.get("input_ids"))
        # slots are valid or not, whatever their order; sliding layers do need their mask
        if not (cache.is_empty or cache.sliding):
            inputs["attention_mask"] = self._integration.no_mask(_tokens(inputs).device)
        return (), inputs

    def check_cache(self, cache: Any) -> None:
        """Raise unless ``cache`` is one of this handle's.

        Raises:
            TypeError: it is not.
        """
        if not isinstance(cache, BoundedCache) or cache.owner is not self:
            raise TypeError(
                "past_key_values must be a cache from this model's PatchHandle.new_cache(), "
                f"got {'one of another patch' if isinstance(cache, BoundedCache) else type(cache)}"
            )

    def follow(self, cache: BoundedCache) -> None:
        """Make ``cache`` the one that :meth:`stats` reads."""
        self._latest = weakref.ref(cache)

    def check_strict(self) -> None:
        """Raise where ``strict`` finds what it forbids in the latest cache.

        Raises:
            RuntimeError: names what was found.
        """
        if self.options.strict and self._latest is not None and self._latest() is not None:
            self.stats()


class _Overrides:
    """Instance methods of a generating model; each is given the handle and what it replaces."""

    names: ClassVar[tuple[str, ...]] = (
        "_prepare_cache_for_generation",
        "create_masks_for_generate",
        "generate",
    )

    @staticmethod
    def _prepare_cache_for_generation(
        handle: PatchHandle,
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
            generation_config.prefill_chunk_size = handle.options.prefill_chunk
        if cache is None:
            cache = model_kwargs["past_key_values"] = handle.new_cache()
        else:
            handle.check_cache(cache)
            cache._is_user_defined = True
        cache.chunked = generation_config.prefill_chunk_size is not None
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            check_rows(mask.bool().any(1))
        cache.is_assistant = bool(getattr(generation_config, "is_assistant", False))
        if compat.must_hold(generation_config, args[0]):
            cache.activate_past_recording()
        handle.follow(cache)
        return None

    @staticmethod
    def create_masks_for_generate(
        handle: PatchHandle, stock: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Keep the 2-D padding mask for the forward; a decode step on the slots needs none."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, BoundedCache):
            return (stock or create_masks_for_generate)(*args, **kwargs)
        embeds = compat.prompt_embeds(kwargs)
        if embeds.shape[1] == 1 and not (cache.is_empty or cache.sliding):
            return handle._integration.no_mask(embeds.device)
        return kwargs.get("attention_mask")

    @staticmethod
    def generate(handle: PatchHandle, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The stock ``generate``, after which drafts are settled and ``strict`` is checked."""
        try:
            output = stock(*args, **kwargs)
        finally:
            cache = None if handle._latest is None else handle._latest()
            if cache is not None and not cache.is_assistant:
                cache.stop_past_recording()
        handle.check_strict()
        return output


def find_model(model: nn.Module) -> tuple[Integration, Any]:
    """The integration and the decoder stack of a model that is not patched yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    for module in model.modules():
        if _HANDLE in module.__dict__:
            raise ValueError("model is already patched: call unpatch(model) first")
    for integration in INTEGRATIONS:
        bases = [m for m in model.modules() if type(m) is integration.base_model]
        if len(bases) == 1 and not any(_generates_otherwise(model, integration)):
            return integration, bases[0]
    raise TypeError(
        f"model must contain one of {', '.join(i.causal_model.__name__ for i in INTEGRATIONS)}, "
        f"got {type(model).__name__}, which is not supported"
    )


def _generates_otherwise(model: nn.Module, integration: Integration) -> Iterator[bool]:
    """Of each module that generates whether it is of another class, such as a multimodal one."""
    generators = (m for m in model.modules() if isinstance(m, GenerationMixin))
    return (not isinstance(m, integration.causal_model) for m in generators)


def find_generator(model: nn.Module, integration: Integration) -> nn.Module | None:
    return next((m for m in model.modules() if isinstance(m, integration.causal_model)), None)


def _model_shape(integration: Integration, base: Any, layers: list[Any]) -> ModelShape:
    config = base.config
    heads = local_heads(integration, base, layers[0])
    inv_freq, rope_scaling = _rope(base.rotary_emb)
    head_dim = layers[0].head_dim
    devices = tuple(_device(layer) for layer in layers)
    return ModelShape(
        num_layers=len(layers),
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        kv_head_offset=heads.kv_head_offset,
        total_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        dtype=base.dtype,
        device=devices[0],
        layer_devices=devices,
        name_or_path=config._name_or_path,
        # where RoPE rotates a part of a head, its pairs are others
        inv_freq=inv_freq if len(inv_freq) == head_dim // 2 else None,
        rope_scaling=rope_scaling,
        scale=layers[0].scaling,
        output_weights=_OutputWeights(layers, heads.num_heads * head_dim, base.dtype),
    )


def _device(layer: nn.Module) -> torch.device:
    """Where a layer computes; accelerate may keep its weights elsewhere and say so in a hook."""
    for module in layer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def _rope(rotary: Any) -> tuple[Tensor, float]:
    """Frequencies and factor of RoPE in layers with full attention."""
    prefix = "" if hasattr(rotary, "inv_freq") else f"{FULL}_"
    return getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")


class _OutputWeights(Sequence[Tensor]):
    """Each layer's output projection as ``[hidden_size, columns]``, made when it is asked for.

    One that is not a plain linear layer (quantised, or with adapters) is given the identity.
    """

    def __init__(self, layers: list[Any], columns: int, dtype: torch.dtype) -> None:
        self._layers, self._columns, self._dtype = layers, columns, dtype

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        layer = self._layers[index]
        if type(layer.o_proj) is nn.Linear:
            weight: Tensor = layer.o_proj.weight.detach()
            if isinstance(weight, DTensor):
                weight = weight.to_local()
            if weight.is_floating_point() and weight.device == _device(layer):
                return weight
        return self._through(layer)

    @torch.no_grad()
    def _through(self, layer: Any) -> Tensor:
        units = torch.eye(self._columns, dtype=self._dtype, device=_device(layer))
        bias = layer.o_proj(torch.zeros_like(units[:1]))
        return (layer.o_proj(units) - bias).T.contiguous()


def _fingerprint(base: Any) -> dict[str, str]:
    """What of a model decides what its keys and values mean, short of the weights."""
    config = base.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return {"model": f"{type(base).__name__} {base.config._name_or_path} {digest[:16]}"}


def _choose_policy(policy: RetentionPolicy | str | None, base: str) -> RetentionPolicy:
    if isinstance(policy, RetentionPolicy):
        return policy
    if policy == TrimKV.name:
        checkpoint = find_gates(base) or PUBLISHED.get(base)
        if checkpoint is None:
            raise ValueError(
                f"policy='trimkv' needs retention gates, and none are known for {base!r}; pass "
                f"TrimKV.from_pretrained(folder). Gates are published for {', '.join(PUBLISHED)}"
            )
        return TrimKV.from_pretrained(checkpoint)
    if isinstance(policy, str):
        return make_policy(policy)
    if policy is not None:
        raise TypeError(f"policy must be a RetentionPolicy, a name or None, got {type(policy)}")
    checkpoint = find_gates(base)
    if checkpoint is not None:
        logger.warning("policy: TRIM-KV with the gates in %s", checkpoint)
        return TrimKV.from_pretrained(checkpoint)
    published = PUBLISHED.get(base)
    hint = (
        f"gates are published as {published}: pass policy='trimkv'"
        if published
        else "no gates are published for this base"
    )
    logger.warning("policy: StreamingLLM, for no TRIM-KV gates are at hand (%s)", hint)
    return StreamingLLM()


def _gates_sizes(policy: RetentionPolicy) -> tuple[int | None, int | None]:
    if isinstance(policy, TrimKV):
        return policy.gates.config.budget, policy.gates.config.buffer
    return None, None


def _uses_cache(base: Any, inputs: dict[str, Any]) -> bool:
    use_cache = inputs.get("use_cache")
    return bool(base.config.use_cache if use_cache is None else use_cache)


def _tokens(inputs: dict[str, Any]) -> Tensor:
    """``[batch, q_len, ...]``: ids or embeddings."""
    ids = inputs.get("input_ids")
    tokens: Tensor = inputs["inputs_embeds"] if ids is None else ids
    return tokens
