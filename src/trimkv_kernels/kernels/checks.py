"""Checks of the arguments of the ops.

A check reads shapes, dtypes, strides and devices, never tensor contents. So it never synchronizes,
and `torch.compile` turns it into guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

REDUCES = ("sum", "mean", "max", "none")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
BOOL = (torch.bool,)
Sizes = dict[str, int]


@dataclass(frozen=True)
class Shape:
    """What a tensor must look like, to be written into its annotation.

    Attributes:
        text: Names of the dimensions, such as ``"batch, num_heads, head_dim"``. Within a call, the
            same name means the same size. ``...`` at the end stands for any further dimensions.
        dtypes: The allowed dtypes. None requires the dtype of the tensor that the op checks first,
            and allows any dtype for that tensor itself.
        rows: The elements of one vector must be adjacent: a stride of 1 in the last dimension.
        dense: The tensor must be contiguous, because it is addressed as rows.
        blocks: Its part of each layer and row must be contiguous, see :meth:`by_index`.
    """

    text: str
    dtypes: Sequence[torch.dtype] | None = None
    rows: bool = False
    dense: bool = False
    blocks: bool = False

    def by_index(self) -> Shape:
        """The same of a storage whose rows a call picks by index: any number of them, apart."""
        text = self.text.replace("layers, batch", "layers, num_rows")
        return replace(self, text=text, dense=False, blocks=self.dense)

    @property
    def names(self) -> list[str]:
        """The named dimensions, without the ``...``."""
        return self.text.removesuffix(", ...").split(", ")

    def bind(self, name: str, tensor: Tensor, sizes: Sizes) -> None:
        """Take the sizes that are not known yet from ``tensor``. Its rank must be right."""
        if all(dim in sizes for dim in self.names):
            return
        check_rank(name, tensor, self.text)
        for dim, size in zip(self.names, tensor.shape, strict=True):
            sizes.setdefault(dim, size)

    def check(self, name: str, tensor: Tensor, sizes: Sizes, like: Tensor) -> None:
        """Require the sizes, the dtypes (or that of ``like``), its device, and the strides."""
        shape = [sizes[dim] for dim in self.names]
        if self.text.endswith("..."):
            shape += tensor.shape[len(shape) :]
        dtypes = self.dtypes
        if dtypes is None:
            dtypes = (tensor.dtype if self.text.endswith("...") else like.dtype,)
        check_tensor(name, tensor, shape, dtypes, like.device)
        if self.rows:
            check_unit_stride(name, tensor)
        if self.dense:
            check_contiguous(name, tensor)
        if self.blocks:
            check_contiguous(name, tensor[:1, :1])


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
    """Require ``low <= number`` and, if given, ``number <= high``."""
    if number < low or (high is not None and number > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {span}, got {number}")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    """Require one of some words."""
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")


def check_groups(query: Tensor, num_kv_heads: int) -> None:
    """Require the same number of query heads for each KV head."""
    num_heads = query.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"query must have a multiple of {num_kv_heads} heads (those of key), got {num_heads}"
        )


def required(name: str, tensor: Tensor | None) -> Tensor:
    """``tensor``, for a caller that knows that it is not None.

    Raises:
        ValueError: it is None.
    """
    if tensor is None:
        raise ValueError(f"{name} must be a tensor, got None")
    return tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
