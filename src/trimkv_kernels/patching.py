"""``patch(model)``: a stock transformers model decodes on a bounded cache, and back again.

Only the instance is touched: the ``forward`` of its attention layers, a pre-hook on its decoder
stack, and the methods with which ``generate`` makes its cache and its masks. :func:`unpatch`
restores all of it.
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn

from trimkv_kernels.cache import BoundedKVCache, CacheStats, Impl
from trimkv_kernels.cache.checks import DTYPES
from trimkv_kernels.checks import (
    Span,
    check_budget,
    check_policy,
    check_positive,
    check_protection,
    check_shared,
)
from trimkv_kernels.chosen_policy import (
    DEFAULT_BUDGET,
    DEFAULT_BUFFER,
    choose_policy,
    gates_sizes,
)
from trimkv_kernels.gates import checkpoint_folder, resolve_base_model
from trimkv_kernels.gates.published import SHIPPED, SMOLLM2
from trimkv_kernels.integrations import BoundedCache, compat
from trimkv_kernels.integrations.base import STOCK_FORWARD
from trimkv_kernels.integrations.discovery import (
    HANDLE,
    ModelParts,
    auto_model_class,
    find_handle,
    find_parts,
)
from trimkv_kernels.integrations.generation import Generation
from trimkv_kernels.integrations.hf_cache import MakeSlots
from trimkv_kernels.integrations.images import Protect, check_text_length, split_protection
from trimkv_kernels.integrations.instance_patch import InstancePatch
from trimkv_kernels.integrations.prompt_pins import SpanFinder
from trimkv_kernels.integrations.rows_cache import RowsCache, check_rows_fit
from trimkv_kernels.integrations.sharding import check_sharded
from trimkv_kernels.integrations.weights import PackedLayers, packed_layers
from trimkv_kernels.kernels import resolve_impl
from trimkv_kernels.policies import ModelShape, RetentionPolicy
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.base import policy_name
from trimkv_kernels.policies.streaming_llm import StreamingLLM
from trimkv_kernels.policies.trimkv import TrimKV
from trimkv_kernels.smollm2 import NAME as SMOLLM2_NAME
from trimkv_kernels.smollm2 import smollm2_folder

logger = logging.getLogger("trimkv_kernels")


@dataclass(frozen=True)
class PatchOptions:
    """The arguments of :func:`patch`, resolved."""

    budget: int
    buffer: int
    allocation: Allocation | None
    sinks: int
    recent: int
    protect: tuple[Span, ...]
    finders: tuple[SpanFinder, ...]
    beside_text: bool
    prefill_chunk: int | None
    impl: Impl
    strict: bool
    pack_weights: bool


def patch(
    model: nn.Module,
    policy: RetentionPolicy | str | None = None,
    *,
    budget: int | None = None,
    buffer: int | None = None,
    allocation: Allocation | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    protect: Protect | Sequence[Span | Protect] = (),
    beside_text: bool = False,
    prefill_chunk: int | None = None,
    impl: Impl = "auto",
    strict: bool = False,
    pack_weights: bool = False,
) -> PatchHandle:
    """Make a transformers model decode on a bounded cache; ``generate()`` works unchanged.

    Args:
        model: A supported model, such as ``Qwen3ForCausalLM``, or a wrapper around one.
        policy: What to keep: a policy, a registered name, or ``"trimkv"`` for the published gates
            of this base model, downloaded if needed. None is TRIM-KV if its gates are on this
            machine, else StreamingLLM; the log names the choice.
        budget: Pairs kept per (layer, row, KV head); None is the gates' own, else 512.
        buffer: New tokens a full head takes before the next eviction; None is the gates' own,
            else 128.
        allocation: How layers and heads share the budget, such as ``GlobalTopK(min_per_head=4)``;
            None is the policy's own rule, for most policies the same budget everywhere.
        sinks: First positions that are never evicted; None is the policy's own number.
        recent: Last positions that are never evicted; None is the policy's own number.
        protect: What else is never evicted, one or several of: spans ``(start, stop)`` of
            positions, :class:`~trimkv_kernels.ChatRoles` for the messages of some roles,
            ``"image"`` for the image tokens of prompts, ``"text"`` for their other tokens.
        beside_text: The budget grows by the number of text tokens in the prompt, which is that of
            ``generate`` or of ``new_cache(input_ids=...)``.
        prefill_chunk: ``generate`` reads prompts in chunks of this many tokens, evicting in
            between; None reads them whole.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.
        strict: Raise at the end of ``generate``, at ``stats()`` and at ``unpatch()`` if the
            budget was never reached or a score was NaN.
        pack_weights: While the model is patched, store the weights of layers that read the same
            input side by side (q, k, v and the first layer of TRIM-KV's gates; gate and up), and
            on a CPU large wide fp32 weights by column. Steps are then faster, and round otherwise
            than those of the stock model. Parameters stay what they are.

    Returns:
        A handle with ``unpatch()``, ``new_cache()`` and ``stats()``. As a context manager it
        unpatches at the end.

    Raises:
        TypeError: the model or its attention forward is not supported.
        ValueError: the model is patched already, or an option does not fit it. Nothing is changed.
    """
    compat.warn_if_untested()
    parts = find_parts(model)
    shape = parts.shape()
    if shape.dtype not in DTYPES:
        raise ValueError(
            f"model must compute in one of {', '.join(map(str, DTYPES))}, got {shape.dtype}: "
            "convert it first, for example with model.float()"
        )
    chosen = choose_policy(policy, shape.name_or_path)
    check_sharded(chosen, shape)
    chosen = chosen.bind(shape)
    check_policy(chosen)
    gates_budget, gates_buffer = gates_sizes(chosen)
    budget = budget if budget is not None else gates_budget or DEFAULT_BUDGET
    buffer = buffer if buffer is not None else gates_buffer or DEFAULT_BUFFER
    if prefill_chunk is not None:
        check_positive("prefill_chunk", prefill_chunk)
    resolve_impl(impl, shape.device)
    spans, finders = split_protection(protect, parts.image_ids)
    if beside_text and not parts.image_ids:
        raise ValueError("beside_text=True is for vision-language models, got one that reads text")
    layers, kv_heads = shape.num_layers, shape.num_kv_heads
    budgets = check_budget(chosen, budget, buffer, layers, kv_heads, allocation)
    check_shared(chosen, allocation, parts.devices(), is_sharded=shape.is_sharded)
    options = PatchOptions(
        budget,
        buffer,
        allocation,
        *check_protection(chosen, budgets, sinks=sinks, recent=recent, protect=spans),
        finders,
        beside_text,
        prefill_chunk,
        impl,
        strict,
        pack_weights,
    )
    handle = PatchHandle(parts, shape, chosen, options)
    logger.info("patched %s: %s", parts.integration.name, handle)
    return handle


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch` exactly.

    Raises:
        ValueError: the model is not patched.
    """
    handle = find_handle(model)
    if handle is None:
        raise ValueError("model is not patched: there is nothing to undo")
    handle.unpatch()


def from_pretrained(
    checkpoint: str | Path,
    *,
    budget: int | None = None,
    buffer: int | None = None,
    revision: str | None = None,
    beside_text: bool | None = None,
    **model_kwargs: Any,
) -> Any:
    """Load a published TRIM-KV checkpoint: the base model that it names, patched with its gates.

    Args:
        checkpoint: Folder or hub id of the gates, or ``"smollm2"`` for the model of
            ``trimkv_kernels.smollm2`` with the gates in this package. Loading from the hub is
            untested.
        budget: Pairs kept per head; None is what the gates were trained for, else 512.
        buffer: New tokens between evictions; None is the gates' own, else 128.
        revision: Revision of the checkpoint on the hub.
        beside_text: As for :func:`patch`. None is True for vision-language models, because the
            authors of their gates count the budget this way.
        model_kwargs: Passed on to transformers' ``from_pretrained``.

    Returns:
        The patched model, in eval mode.

    Raises:
        ValueError: no such checkpoint, or it does not fit its base.
        ImportError, OSError: ``"smollm2"`` cannot be fetched or unpacked.
    """
    is_smollm2 = checkpoint == SMOLLM2_NAME
    folder = SHIPPED[SMOLLM2] if is_smollm2 else checkpoint_folder(checkpoint, revision=revision)
    policy = TrimKV.from_pretrained(folder)
    config = policy.gates.config
    if config.base_revision is not None:
        model_kwargs.setdefault("revision", config.base_revision)
    base = smollm2_folder() if is_smollm2 else resolve_base_model(folder, config)
    model = auto_model_class(base, **model_kwargs).from_pretrained(base, **model_kwargs).eval()
    if beside_text is None:
        beside_text = bool(find_parts(model).image_ids)
    patch(model, policy, budget=budget, buffer=buffer, beside_text=beside_text)
    return model


class PatchHandle:
    """What :func:`patch` did, and how to undo it. All per-call state is in the caches it makes.

    Attributes:
        policy: Decides which pairs stay; bound to the model.
        options: The arguments of :func:`patch`, resolved.
        shape: What the policy knows about the model.
        parts: The parts of the model.
    """

    def __init__(
        self, parts: ModelParts, shape: ModelShape, policy: RetentionPolicy, options: PatchOptions
    ) -> None:
        self.policy = policy
        self.options = options
        self.shape = shape
        self.parts = parts
        self._fingerprint = parts.fingerprint()
        self._latest: weakref.ref[BoundedCache] | None = None
        self._figures: CacheStats | None = None  # of a generate() whose cache may be freed
        self._packs: list[PackedLayers] = []
        self._patch = InstancePatch()
        try:
            self._install()
        except BaseException:
            self._patch.restore()
            raise

    def __repr__(self) -> str:
        o = self.options
        return (
            f"PatchHandle(policy={policy_name(self.policy)!r}, budget={o.budget}, "
            f"buffer={o.buffer}, sinks={o.sinks}, recent={o.recent}, impl={o.impl!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchHandle:
        """The handle of a copied model. It has made no cache yet."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.__dict__ | {"_latest": None, "_figures": None}
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a patched model cannot be pickled: call unpatch(model) first, and patch() the loaded "
            "model. save_pretrained() and state_dict() work as they are; copy.deepcopy(model) "
            "makes a patched copy"
        )

    @overload
    def new_cache(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> BoundedCache: ...

    @overload
    def new_cache(self, *, rows: int) -> RowsCache: ...

    def new_cache(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        rows: int | None = None,
    ) -> BoundedCache:
        """An empty cache, to pass as ``past_key_values=`` to the model or to ``generate``.

        Args:
            input_ids: ``[batch, length]``, the prompt; only read with ``beside_text``.
            attention_mask: ``[batch, length]``, 0 for padding; None: no padding.
            rows: Make so many rows at once, which sequences enter and leave one by one.

        Raises:
            ValueError: with ``beside_text``, ``input_ids`` is missing, or its rows differ in text
                tokens; with ``rows``, the model has sliding-window layers or reads images.
        """
        self._pack_again()
        budget = self.options.budget
        if rows is not None:
            check_rows_fit(rows, self.parts.windows, reads_images=bool(self.parts.image_ids))
        elif self.options.beside_text:
            budget += check_text_length(input_ids, attention_mask, self.parts.image_ids)
        depth = self.parts.config.num_hidden_layers
        windows = self.parts.windows[:depth]
        is_apart = rows is not None
        make_slots: MakeSlots = functools.partial(self._make_slots, budget, rows_apart=is_apart)
        if depth < len(self.parts.layers):  # generate() drafts with the first layers
            make_slots = functools.partial(self._make_draft_slots, budget, windows.count(None))
        kind: Callable[..., BoundedCache] = BoundedCache
        if rows is not None:
            kind = functools.partial(RowsCache, rows=rows, dtype=self.shape.dtype)
        cache = kind(
            make_slots,
            owner=self,
            windows=windows,
            is_compileable=self._is_compileable,
            chunked=self.options.prefill_chunk is not None,
            finders=self.options.finders,
            device=self.shape.device,
            fingerprint=self._fingerprint,
        )
        self.follow(cache)
        return cache

    def _pack_again(self) -> None:
        """Weights lie apart after a copy of the model, a conversion or a replacement."""
        moved = sum(pack.pack() for pack in self._packs)
        if moved:
            logger.info("packed weights again, of %d groups of layers: they had moved", moved)

    @property
    def _is_compileable(self) -> bool:
        """Whether ``generate`` may compile a step. Sharing a budget out on torch reads back."""
        allocation = self.options.allocation or self.policy.allocation
        devices = set(self.parts.devices())
        is_local = len(devices) == 1 and (
            allocation.is_fixed or resolve_impl(self.options.impl, *devices) == "triton"
        )
        return self.policy.is_compileable and is_local

    def stats(self) -> CacheStats:
        """The figures of the latest cache; if it is freed, those from the end of ``generate``.

        Raises:
            RuntimeError: no cache of this model is alive, or the check of ``strict`` failed.
        """
        cache = None if self._latest is None else self._latest()
        if cache is None and self._figures is not None:
            return self._figures
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
            RuntimeError: the check of ``strict`` failed; the model is restored anyway.
        """
        if self._patch.is_empty:
            raise ValueError("model is not patched any more: there is nothing to undo")
        self._patch.restore()
        self._check_strict()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._patch.is_empty:
            self._patch.restore()
            if error is None:
                self._check_strict()

    def _install(self) -> None:
        parts = self.parts
        forward = parts.integration.attention_forward
        self._patch.set(parts.base, HANDLE, self)
        for layer in parts.bounded_layers:
            if "forward" in layer.__dict__:
                self._patch.set(layer, STOCK_FORWARD, layer.__dict__["forward"])
            self._patch.set(layer, "forward", functools.partial(forward, layer))
        Generation(self, parts, self.options.prefill_chunk).install(parts, self._patch)
        if self.options.pack_weights:
            self._packs = packed_layers(self.parts, self.policy)
            for pack in self._packs:
                pack.install(self._patch)

    def _make_slots(
        self,
        budget: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rows_apart: bool = False,
    ) -> BoundedKVCache:
        o, shape, devices = self.options, self.shape, self.parts.devices()
        return BoundedKVCache(
            self.policy,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            batch_size=batch,
            budget=budget,
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
            rows_apart=rows_apart,
        )

    def _make_draft_slots(
        self, budget: int, num_layers: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> BoundedKVCache:
        """Slots of the first layers, for drafts. The policy would need all layers."""
        o, shape, devices = self.options, self.shape, self.parts.devices()[:num_layers]
        return BoundedKVCache(
            StreamingLLM(),
            num_layers=num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            batch_size=batch,
            budget=budget,
            buffer=o.buffer,
            sinks=min(StreamingLLM.sinks, budget - 1),
            dtype=dtype,
            device=device if len(set(devices)) == 1 else devices,
            impl=o.impl,
        )

    def check_cache(self, cache: Any) -> None:
        """Check that ``cache`` was made by this handle.

        Raises:
            TypeError: it was not.
        """
        if not isinstance(cache, BoundedCache) or cache.owner is not self:
            got = "one of another patch" if isinstance(cache, BoundedCache) else type(cache)
            raise TypeError(
                "past_key_values must be a cache from this model's PatchHandle.new_cache(), "
                f"got {got}; "
                "PEFT's prefix tuning makes such a cache, and does not work on a patched model"
            )

    def follow(self, cache: BoundedCache) -> None:
        """Make ``cache`` the one that :meth:`stats` reads."""
        self._latest, self._figures = weakref.ref(cache), None

    def finish(self, cache: BoundedCache) -> None:
        """Note the figures of a cache whose ``generate`` has ended.

        Raises:
            RuntimeError: the check of ``strict`` failed.
        """
        self.follow(cache)
        if cache.slots is not None:
            self._figures = cache.stats()

    def _check_strict(self) -> None:
        if self.options.strict and self._latest is not None and self._latest() is not None:
            self.stats()
