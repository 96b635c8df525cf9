"""What the launchers of all ops share: facts about the device, sizes of blocks, views as bits."""

import contextlib
import functools
import os

import torch
from torch import Tensor


def is_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter instead of being compiled."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def is_amd() -> bool:
    """Whether this torch runs on ROCm."""
    return torch.version.hip is not None


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; a small number if the kernels are interpreted."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def compute_capability(device: torch.device) -> int:
    """The major compute capability; 9, as for Hopper, if the device is no GPU.

    AMD GPUs count as 8, because the tiles of newer NVIDIA GPUs do not fit their 64 KB of shared
    memory.
    """
    if is_amd():
        return 8
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make ``device`` current: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def block_d(head_dim: int) -> int:
    """Elements of a head vector's block; a matrix product takes at least 16."""
    return max(16, power_of_2(head_dim))


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """``scale``, or its default for ``None``."""
    return head_dim**-0.5 if scale is None else scale


def log2_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale of kernels, which take exponentials of base 2."""
    from trimkv_kernels.kernels._triton.primitives import LOG2_E

    return softmax_scale(scale, head_dim) * float(LOG2_E.value)


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor in row-major order, for kernels that take no strides."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def as_bits(tensor: Tensor) -> Tensor:
    """View as integers of the same size, because kernels move rows as bits."""
    return tensor.view(_INTEGERS[tensor.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
