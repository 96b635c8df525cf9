"""The promise that a cache's tensors stay where they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mark_static(tensors: Iterable[Tensor]) -> None:
    """Promise compiled code that state stays at its address while a cache lives.

    Without the promise Inductor makes no CUDA graph of a step, because the step writes to its
    inputs. Another cache has other addresses: then the graph is recorded again, and nothing is
    compiled again.
    """
    if torch.compiler.is_compiling():  # the promise cannot be made from within
        return
    for tensor in tensors:
        if tensor.device.type != "cpu":  # there are no graphs there, and dynamo is slow to import
            torch._dynamo.mark_static_address(tensor, guard=False)
