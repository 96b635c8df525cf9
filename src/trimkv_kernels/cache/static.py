"""The promise that the tensors of a cache keep their addresses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mark_static(tensors: Iterable[Tensor]) -> None:
    """Promise compiled code that these tensors keep their addresses while a cache lives.

    Without the promise Inductor makes no CUDA graph of a step, because the step writes to its
    inputs. Another cache has other addresses. The graph is then recorded again, but nothing is
    compiled again.
    """
    if torch.compiler.is_compiling():  # compiled code cannot make the promise
        return
    for tensor in tensors:
        if tensor.device.type != "cpu":  # a CPU has no graphs, and dynamo is slow to import
            torch._dynamo.mark_static_address(tensor, guard=False)
