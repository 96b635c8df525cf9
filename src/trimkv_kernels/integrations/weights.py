"""How large weights lie in memory, for decode steps on a CPU.

A step multiplies each weight matrix with one vector or a few, so its time is that of reading the
matrix. torch keeps ``[out, in]`` by row. MKL reads a wide matrix (``out > in``), such as those of
gate, up and query projections, up to twice as fast by column. From about four rows on both layouts
take the same time.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from trimkv_kernels.integrations.instance_patch import InstancePatch

MIN_WEIGHTS = 2**18  # smaller matrices stay in the processor's cache


def lay_out_by_column(module: nn.Module, patch: InstancePatch) -> int:
    """Store the large wide fp32 weights of linear layers by column; ``patch`` undoes it.

    Parameters stay the same objects, with the same shapes and values, and no copy is kept. Layers
    that are not plain ``nn.Linear`` (quantised, with adapters) are left alone, as are weights that
    are elsewhere (sharded, offloaded, on another device) or share their memory.

    Args:
        module: All linear layers in it.
        patch: Notes what was changed.

    Returns:
        How many weights were changed.
    """
    if not torch.backends.mkl.is_available():
        return 0
    chosen = [layer for layer in module.modules() if type(layer) is nn.Linear and _gains(layer)]
    for layer in chosen:
        patch.on_restore(functools.partial(_lay_out_by_row, layer))
        layer.weight.data = layer.weight.data.t().contiguous().t()
    return len(chosen)


def _gains(layer: nn.Linear) -> bool:
    weight = layer.weight
    if type(weight) is not nn.Parameter or hasattr(layer, "_hf_hook") or weight.is_inference():
        return False
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    is_large = weight.shape[0] > weight.shape[1] and weight.numel() >= MIN_WEIGHTS
    return (
        is_plain
        and is_large
        and weight.is_contiguous()
        and weight.untyped_storage().nbytes() == weight.nbytes
    )


def _lay_out_by_row(layer: nn.Linear) -> None:
    """Undo it. Nothing happens if the weight was replaced meanwhile by one that lies by row."""
    weight = layer.weight
    if type(weight) is nn.Parameter and not weight.is_contiguous():
        weight.data = weight.data.contiguous()
