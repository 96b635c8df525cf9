"""Which implementation runs, and the argument checks that every op shares.

A check reads shapes, dtypes, strides and devices, never tensor contents: it cannot synchronize, and
`torch.compile` turns it into guards.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "torch")
REDUCES = ("sum", "mean", "max", "none")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_impl(impl: str, device: torch.device) -> str:
    """Turn ``impl`` into ``"triton"`` or ``"torch"`` for tensors on ``device``.

    Args:
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``. An
            explicit choice is either followed or raises.
        device: Where the tensors are. ROCm devices have type ``"cuda"`` too.

    Raises:
        ValueError: ``impl`` is not one of the three.
        RuntimeError: Triton was asked for and is not installed, or the tensors are not on a GPU and
            Triton is not interpreted.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return "torch"
    if not _HAS_TRITON:
        raise RuntimeError(
            f"impl={impl!r} runs on Triton here, and Triton is not installed; "
            "install it (pip install triton) or pass impl='torch'"
        )
    if device.type != "cuda" and not is_interpreted():
        raise RuntimeError(
            f"impl='triton' needs tensors on a GPU, got {device.type}; pass impl='torch', "
            "or set TRITON_INTERPRET=1 before the first import to interpret the kernels"
        )
    return "triton"


def is_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter instead of being compiled."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at a time; a small number where the kernels are interpreted."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def compute_capability(device: torch.device) -> int:
    """The major version of the GPU's instruction set; that of a Hopper where there is no GPU.

    An AMD GPU, whatever it reports, counts as 8: tiles for more shared memory do not fit its 64 KB.
    """
    if is_amd():
        return 8
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def is_amd() -> bool:
    """Whether this torch runs on ROCm."""
    return torch.version.hip is not None


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make ``device`` current: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def as_bits(tensor: Tensor) -> Tensor:
    """View as integers of the same size: rows are moved as bits, whatever they mean."""
    return tensor.view(_INTEGERS[tensor.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_rank(name: str, tensor: Tensor, dims: str) -> None:
    """Require one dimension per name in ``dims``, such as ``"batch, num_heads, head_dim"``."""
    if tensor.dim() != len(dims.split(",")):
        raise ValueError(f"{name} must have shape [{dims}], got {list(tensor.shape)}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Require a shape, one of some dtypes, and a device."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(_dtype_name(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {wanted}, got {_dtype_name(tensor.dtype)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Require a dense row-major tensor; the ops that write slots address them as rows."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {list(tensor.stride())} "
            f"for shape {list(tensor.shape)}; pass the base tensor, not a view of it"
        )


def check_unit_stride(name: str, tensor: Tensor) -> None:
    """Require that the elements of one head vector are adjacent."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(
            f"{name} must have stride 1 in its last dimension, got {tensor.stride(-1)}"
        )


def check_int(name: str, number: int, low: int, high: int | None = None) -> None:
    """Require ``low <= number`` and, where given, ``number <= high``."""
    if number < low or (high is not None and number > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {span}, got {number}")


def check_reduce(name: str, reduce: str) -> None:
    """Require a known way to combine the query heads of a group, or ``"none"`` to keep them."""
    if reduce not in REDUCES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, REDUCES))}, got {reduce!r}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
