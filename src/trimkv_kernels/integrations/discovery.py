"""The parts of a transformers model, for patching, training and evaluation.

:func:`find_parts` is the only search. It finds a model's integration, its decoder stack, the module
that generates, the one that reads images, and the attention layers. Sizes, devices and names are
read from these parts. A multimodal model has two configs: sizes come from the decoder stack's, the
name from the generating module's.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from trimkv_kernels.integrations.base import FULL, SLIDING, Integration
from trimkv_kernels.integrations.models import DECODERS, INTEGRATIONS
from trimkv_kernels.integrations.sharding import local_heads
from trimkv_kernels.policies.base import ModelShape

HANDLE = "_trimkv_handle"  # where the decoder stack of a patched model keeps the handle
# Options of from_pretrained() that locate a config.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")

_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")  # of PEFT


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The parts of a supported model, and what can be read from them.

    Attributes:
        integration: The model's family.
        generator: The module that generates and has the output head; None for a decoder stack
            alone.
        base: The decoder stack.
        layers: All attention layers of the decoder stack.
        body: The module that puts image features among the embeddings and calls the decoder stack;
            None in a text-only model.
    """

    integration: Integration
    generator: Any
    base: Any
    layers: tuple[Any, ...]
    body: Any = None

    @property
    def config(self) -> Any:
        """The decoder stack's config: sizes, kinds of layers, RoPE."""
        return self.base.config

    @property
    def name_or_path(self) -> str:
        """Hub id or folder that the model was loaded from, empty if there is none."""
        return self._outer_config._name_or_path

    @property
    def revision(self) -> str | None:
        """The commit of the hub's repository that the model was loaded from, None if unknown."""
        return getattr(self._outer_config, "_commit_hash", None)

    @property
    def _outer_config(self) -> Any:
        outer = (self.generator, self.body, self.base)
        return next(module.config for module in outer if module is not None)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """The tokens that stand for a piece of an image or a video frame; none without a body."""
        config = None if self.body is None else self.body.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return tuple(token for token in ids if token is not None)

    @property
    def device(self) -> torch.device:
        """Device of the first layer."""
        return next(self.base.parameters()).device

    @property
    def bounded_layers(self) -> list[Any]:
        """The attention layers with full attention, which a bounded cache serves."""
        kinds = self._kinds
        return [layer for layer in self.layers if kinds[layer.layer_idx] == FULL]

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer, None for full attention."""
        config = self.config
        return [None if kind == FULL else config.sliding_window for kind in self._kinds]

    @property
    def _kinds(self) -> list[str]:
        """Each layer's kind. During early-exit drafts the config has fewer layers."""
        return layer_types(self.config, len(self.layers))

    def devices(self) -> list[torch.device]:
        """The device of each bounded layer."""
        return [_device(layer, self.device) for layer in self.bounded_layers]

    def gate_sizes(self) -> dict[str, int]:
        """The sizes of the whole model that :func:`~trimkv_kernels.gates.check_base` compares."""
        config = self.config
        return {
            "num_layers": config.num_hidden_layers,
            "num_kv_heads": config.num_key_value_heads,
            "hidden_size": config.hidden_size,
        }

    def shape(self) -> ModelShape:
        """What a policy may know about the bounded layers.

        Raises:
            ValueError: KV heads are distributed unevenly over processes.
        """
        config, layers = self.config, self.bounded_layers
        heads = local_heads(self.integration, self.base, layers[0])
        inv_freq, rope_scaling = _rope(self.base.rotary_emb)
        head_dim, axes = layers[0].head_dim, self.integration.position_axes
        # if RoPE rotates only a part of a head, it pairs other channels
        is_plain = axes == 1 and len(inv_freq) == head_dim // 2
        devices = tuple(self.devices())
        return ModelShape(
            num_layers=len(layers),
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            kv_head_offset=heads.kv_head_offset,
            total_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            dtype=self.base.dtype,
            device=devices[0],
            layer_devices=devices,
            name_or_path=self.name_or_path,
            inv_freq=inv_freq if is_plain else None,
            rope_scaling=rope_scaling,
            position_axes=axes,
            scale=layers[0].scaling,
            output_weights=_OutputWeights(layers, heads.num_heads * head_dim, self.base.dtype),
        )

    def fingerprint(self) -> dict[str, str]:
        """Everything but the weights that determines keys and values."""
        config = self.config.to_dict()
        for name in ("_name_or_path", "transformers_version", "dtype"):
            config.pop(name, None)
        text = json.dumps(config, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"model": f"{type(self.base).__name__} {self.name_or_path} {digest[:16]}"}


def find_parts(model: Any) -> ModelParts:
    """Find the parts of a supported model that is not patched.

    Args:
        model: A model, its decoder stack, or a wrapper around either.

    Raises:
        TypeError: the model is not supported, or its attention is not the stock one.
        ValueError: it is patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if find_handle(model) is not None:
        raise ValueError("model is already patched: call unpatch(model) first")
    _refuse_prefixes(model)
    for integration in DECODERS:
        bases = [m for m in model.modules() if type(m) is integration.base_model]
        if len(bases) == 1 and not any(_generates_otherwise(model, integration)):
            return _checked_parts(model, integration, bases[0])
    raise TypeError(
        f"model must contain one of {', '.join(i.causal_model.__name__ for i in INTEGRATIONS)}, "
        f"got {type(model).__name__}, which is not supported"
    )


def _refuse_prefixes(model: nn.Module) -> None:
    """Check that no adapter of PEFT starts the cache with keys and values of no tokens.

    Raises:
        TypeError: there is one.
    """
    for module in model.modules():
        adapters = getattr(module, "peft_config", None)
        if not isinstance(adapters, dict):
            continue
        for name, config in adapters.items():
            if getattr(config, "peft_type", None) in _PREFIXES:
                raise TypeError(
                    f"model must have no prefix tuning, got the adapter {name!r} of "
                    f"{type(config).__name__}: it fills a full cache with keys and values of its "
                    "own, which a bounded cache cannot take; use prompt tuning or LoRA, or patch "
                    "the model without it"
                )


def find_handle(model: nn.Module) -> Any:
    """The handle of a patched model, or of a wrapper around one; None if it is not patched."""
    handles = (module.__dict__.get(HANDLE) for module in model.modules())
    return next((handle for handle in handles if handle is not None), None)


def layer_types(config: Any, num_layers: int | None = None) -> list[str]:
    """The kind of attention of each layer, as transformers names it.

    With ``num_layers=None``, all layers of the config. A sliding window that covers the
    model's longest text does not count: Phi-3 for 128k tokens has one of 256k.
    """
    stated = getattr(config, "layer_types", None)
    if stated is not None:
        return list(stated)
    window = getattr(config, "sliding_window", None)
    slides = window is not None and window < config.max_position_embeddings
    return [SLIDING if slides else FULL] * (num_layers or config.num_hidden_layers)


def check_layer_types(base: Any, allowed: Sequence[str] = ()) -> None:
    """Check that a decoder stack's layers can be bounded.

    Args:
        base: The decoder stack.
        allowed: Kinds of layers that are allowed beside those with full attention.

    Raises:
        TypeError: a layer has another kind of attention, none has full attention, or attention is
            not causal.
    """
    config = base.config
    if getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        raise TypeError("attention must be causal, got a model that attends in both directions")
    found = set(layer_types(config))
    other = sorted(found - {FULL, *allowed})
    if other:
        raise TypeError(
            f"every layer must have full attention, got layers with {other}, which are not "
            "supported; a model loaded with sliding_window=None has full attention in every layer"
        )
    if FULL not in found:
        raise TypeError("some layer must have full attention, got none: nothing can be bounded")


def _checked_parts(model: nn.Module, integration: Integration, base: Any) -> ModelParts:
    layers = tuple(m for m in base.modules() if isinstance(m, integration.attention))
    for layer in layers:
        integration.check_attention(layer)
    check_layer_types(base, integration.layer_types)
    generators = (m for m in model.modules() if isinstance(m, integration.causal_model))
    bodies = (m for m in model.modules() if m._modules.get("language_model") is base)
    return ModelParts(integration, next(generators, None), base, layers, next(bodies, None))


def auto_model_class(name: str | Path, **options: Any) -> Any:
    """The class of transformers that loads a model with a language-model head.

    Args:
        name: Folder or hub id.
        options: Of ``from_pretrained``; those that locate the model are used.
    """
    where = {option: options[option] for option in _WHERE if option in options}
    kind = type(AutoConfig.from_pretrained(name, **where))
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _generates_otherwise(model: nn.Module, integration: Integration) -> Iterator[bool]:
    """For each module that generates, whether its class is not the integration's."""
    generators = (m for m in model.modules() if isinstance(m, GenerationMixin))
    return (not isinstance(m, integration.causal_model) for m in generators)


def _device(layer: nn.Module, default: torch.device | None = None) -> torch.device:
    """Where a layer computes. If accelerate keeps the weights elsewhere, its hook says where.

    A layer whose projections were replaced may have no tensor. Its device is then the model's.
    """
    for module in layer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensors = itertools.chain(layer.parameters(), layer.buffers())
    return next((tensor.device for tensor in tensors), default or torch.device("cpu"))


def _rope(rotary: Any) -> tuple[Tensor, float]:
    """Frequencies and factor of RoPE in layers with full attention."""
    prefix = "" if hasattr(rotary, "inv_freq") else f"{FULL}_"
    return getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")


class _OutputWeights(Sequence[Tensor]):
    """Each layer's output projection as ``[hidden_size, columns]``, computed on access.

    If a projection is not a plain linear layer (quantised, or with adapters), its weights are its
    output for the identity matrix.
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


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's ``forward``, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
