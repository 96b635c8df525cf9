"""How the weights of linear layers lie in memory, for decode steps.

A step multiplies each weight matrix with one vector or a few, so its time is that of reading the
matrix, and on a GPU that of starting a kernel. Layers that read the same input (q, k and v; gate
and up) get weights that lie side by side, and one product serves them all.

torch keeps ``[out, in]`` by row. On a CPU, MKL reads a wide fp32 matrix (``out > in``) up to twice
as fast by column. From about four rows on both layouts take the same time.

Parameters stay the same objects, with the same shapes and values, and no copy is kept. A product
looks each time at where its weights lie, so weights that were replaced or converted meanwhile are
read as they are now.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimkv_kernels.integrations.discovery import ModelParts
from trimkv_kernels.integrations.instance_patch import InstancePatch
from trimkv_kernels.policies.base import RetentionPolicy
from trimkv_kernels.policies.trimkv import TrimKV

QUERIES = ("q_proj", "k_proj", "v_proj")
SAME_INPUT = (QUERIES, ("gate_proj", "up_proj"))
MAX_ROWS = 64  # vectors that a step multiplies with
MIN_WEIGHTS = 2**18  # smaller matrices stay in the processor's cache


class PackedLayers:
    """Linear layers whose weights lie together.

    Args:
        layers: One, or several that read the same input.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = tuple(layers)
        self._moved = False
        # The latest input of several layers, and the outputs that are still to be taken.
        self._pending: tuple[Tensor, list[Tensor | None]] | None = None

    def install(self, patch: InstancePatch) -> None:
        """Move the weights together; ``patch`` undoes it."""
        patch.on_restore(self._unpack)
        self.pack()
        if len(self._layers) == 1:
            return
        for index, layer in enumerate(self._layers):
            patch.on_restore(layer.register_state_dict_post_hook(_by_row).remove)
            patch.set(layer, "forward", functools.partial(self._forward, index))

    def pack(self) -> bool:
        """Move the weights together, unless they lie so already or differ in kind.

        Returns:
            Whether they moved.
        """
        if not _are_alike(self._layers):
            return False
        weights = [layer.weight for layer in self._layers]
        if _is_packed(weights):
            return False
        sizes, columns = [len(weight) for weight in weights], weights[0].shape[1]
        first = weights[0].data
        if _gains_by_column(weights):
            whole = first.new_empty(columns, sum(sizes)).t()
        else:
            whole = first.new_empty(sum(sizes), columns)
        for weight, part in zip(weights, whole.split(sizes), strict=True):
            weight.data = part.copy_(weight.data)
        self._moved = True
        return True

    def _unpack(self) -> None:
        self._pending = None
        for layer in self._layers if self._moved else ():
            weight = layer.weight
            if type(weight) is nn.Parameter and not _has_own_storage(weight):
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)

    def _forward(self, index: int, states: Tensor) -> Tensor:
        """The ``forward`` of a layer."""
        layer, output = self._layers[index], self._take(index, states)
        if output is None:
            return F.linear(states, layer.weight, layer.bias)
        return output if layer.bias is None else output + layer.bias

    def _take(self, index: int, states: Tensor) -> Tensor | None:
        """A layer's part of the product. The first layer that gets an input computes for all."""
        pending = self._pending
        if pending is None or pending[0] is not states or pending[1][index] is None:
            outputs = self._products(states)
            if outputs is None:
                return None
            self._pending = pending = (states, outputs)
        outputs = pending[1]
        output, outputs[index] = outputs[index], None
        if all(other is None for other in outputs):
            self._pending = None
        return output

    def _products(self, states: Tensor) -> list[Tensor | None] | None:
        """The outputs of all layers, without biases; None if each computes its own.

        That is where a gradient is recorded, and under autocast, which casts single weights.
        Prompts gain nothing, and their outputs would be held until all are taken.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(states.device.type):
            return None
        if states.numel() > MAX_ROWS * states.shape[-1]:
            return None
        weights = [layer.weight for layer in self._layers]
        sizes = [len(weight) for weight in weights]
        if torch.compiler.is_compiling():
            return [*linear_side_by_side(states, weights).split(sizes, -1)]
        whole = side_by_side(weights)
        return None if whole is None else [*F.linear(states, whole).split(sizes, -1)]


def packed_layers(parts: ModelParts, policy: RetentionPolicy) -> list[PackedLayers]:
    """Choose the layers that gain from it.

    Layers that are not plain ``nn.Linear`` (quantised, with adapters) are left alone, as are
    weights that are elsewhere (sharded, offloaded) or share their memory.

    Args:
        parts: All linear layers of this model.
        policy: TRIM-KV's gates read what queries are made of, and are packed with them.
    """
    model, gates = parts.generator or parts.base, {}
    if isinstance(policy, TrimKV):
        gates = dict(zip(parts.bounded_layers, policy.gates.layers, strict=True))
    packs: list[list[Any]] = []
    for module in model.modules():
        for names in SAME_INPUT:
            pack = [getattr(module, name, None) for name in names]
            if _can_join(pack):
                gate = gates.get(module) if names == QUERIES else None
                with_gate = pack if gate is None else [*pack, gate.linear1]
                packs.append(with_gate if _can_join(with_gate) else pack)
    taken = {layer for pack in packs for layer in pack}
    for layer in model.modules():
        if layer not in taken and _can_join([layer]) and _gains_by_column([layer.weight]):
            packs.append([layer])
    return [PackedLayers(pack) for pack in packs]


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """The matrix that several make up in memory, as a view; None if they do not.

    Args:
        weights: Each ``[out, in]``, with the same ``in``.

    Returns:
        ``[sum of out, in]``, by row or by column as they are.
    """
    first, total = weights[0], 0
    if not all(map(_is_plain, weights)):
        return None
    strides, row = first.stride(), first.stride(0) * first.element_size()
    memory = first.untyped_storage().data_ptr()
    for weight in weights:
        lies_next = weight.data_ptr() == first.data_ptr() + total * row
        is_alike = weight.dtype == first.dtype and weight.stride() == strides
        if not (lies_next and is_alike and weight.untyped_storage().data_ptr() == memory):
            return None
        total += len(weight)
    return first.detach().as_strided((total, first.shape[1]), strides)


@torch.library.custom_op("trimkv_kernels::linear_side_by_side", mutates_args=())
def linear_side_by_side(states: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``[..., in]`` times each weight ``[out, in]``: ``[..., sum of out]``, one product if it can.

    A compiled step calls it, because where weights lie is known only as it runs.
    """
    whole = side_by_side(weights)
    if whole is not None:
        return F.linear(states, whole)
    return torch.cat([F.linear(states, weight) for weight in weights], -1)


@linear_side_by_side.register_fake
def _(states: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return states.new_empty(*states.shape[:-1], sum(len(weight) for weight in weights))


def _can_join(layers: Sequence[Any]) -> bool:
    """Whether the weights of layers may be moved together from memory of their own, or were."""
    if not _are_alike(layers):
        return False
    weights = [layer.weight for layer in layers]
    return all(map(_has_own_storage, weights)) or _is_packed(weights)


def _are_alike(layers: Sequence[Any]) -> bool:
    """Whether the weights of layers may lie elsewhere, and differ in their rows alone."""
    if not all(map(_is_movable, layers)):
        return False
    weights = [layer.weight for layer in layers]
    return len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) == 1


def _is_movable(layer: Any) -> bool:
    """Whether a layer's weight may lie elsewhere, and is there at all."""
    if type(layer) is not nn.Linear or hasattr(layer, "_hf_hook"):
        return False
    weight = layer.weight
    return _is_plain(weight) and not (weight.is_meta or weight.is_inference())


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (nn.Parameter, Tensor)


def _has_own_storage(weight: Tensor) -> bool:
    return weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes


def _is_packed(weights: Sequence[Tensor]) -> bool:
    by_row = not _gains_by_column(weights)
    return weights[0].is_contiguous() == by_row and side_by_side(weights) is not None


def _gains_by_column(weights: Sequence[Tensor]) -> bool:
    rows, columns = sum(map(len, weights)), weights[0].shape[1]
    is_fp32 = weights[0].device.type == "cpu" and weights[0].dtype == torch.float32
    is_large = rows > columns and rows * columns >= MIN_WEIGHTS
    return is_fp32 and is_large and torch.backends.mkl.is_available()


def _by_row(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of ``state_dict``: weights that lie among those of other layers are copied out.

    Files and other libraries take a storage for one tensor's, or for whole rows of several.
    """
    weight = state.get(f"{prefix}weight")
    if type(weight) is Tensor and not weight.is_contiguous():
        state[f"{prefix}weight"] = weight.contiguous()
