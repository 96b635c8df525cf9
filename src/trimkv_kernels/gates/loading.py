"""Checks of gates that come from a file, before and after they are built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from trimkv_kernels.files import listed

Gates = TypeVar("Gates", bound=nn.Module)


def size_problems(
    num_layers: int, sizes: Iterable[int], tensors: Mapping[str, Tensor]
) -> list[str]:
    """What a config declares that its weights cannot have: it costs nothing to declare a size.

    Args:
        num_layers: Layers of the config, each with one tensor at least.
        sizes: Each is a dimension of some tensor.
        tensors: The weights.
    """
    problems = []
    if num_layers > len(tensors):
        problems.append(f"{num_layers} layers are declared, and there are {len(tensors)} tensors")
    largest = max((x.numel() for x in tensors.values()), default=0)
    too_large = [str(size) for size in sizes if size > largest]
    return problems + listed(f"the largest tensor has {largest} numbers, and sizes of", too_large)


def build_empty(build: Callable[[], Gates]) -> Gates:
    """Gates without memory, to compare shapes with.

    Raises:
        ValueError: their sizes are out of range.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"the sizes of the gate config are out of range: {error}") from error


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors with numbers that would decide every score alike."""
    return listed(
        "NaN or infinite", (name for name, x in tensors.items() if not bool(x.isfinite().all()))
    )
