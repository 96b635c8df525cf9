"""Functions that several torch ops share."""

import torch
from torch import Tensor

BLOCK = 64  # targets that are taken at a time
LOWEST_LOG_BETA = -1.0e4  # exp of it is 0, and unlike -inf it can be multiplied by an age of 0


def host_reads_are_free(tensor: Tensor) -> bool:
    """Whether reading a number costs no wait: on a CPU, outside of a graph being compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def has_groups(query: Tensor, key: Tensor) -> bool:
    """Whether query heads share KV heads.

    The branch makes it a plain bool when shapes are symbolic, because SDPA accepts nothing else.
    """
    if query.shape[1] == key.shape[1]:  # noqa: SIM103
        return False
    return True


def grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """``[batch, num_kv_heads, group, seq, ...]`` in at least fp32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.unflatten(1, (num_kv_heads, -1)).to(dtype)


def fold(left: Tensor, right: Tensor) -> Tensor:
    """Multiply a group's rows, ``[..., group, targets, n]``, by the matrix of their KV head."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """Probabilities; 0 for a target that sees nothing."""
    return (logits - lse.masked_fill(lse == -torch.inf, 0)).exp()


def reduce_group(shares: Tensor, reduce: str) -> Tensor:
    """Combine ``[batch, num_kv_heads, group, ...]`` over the heads of each group.

    Gives ``[batch, num_kv_heads, ...]``, or ``[batch, num_heads, ...]`` if nothing is combined.
    """
    if reduce == "none":
        return shares.flatten(1, 2)
    if reduce == "max":
        return shares.amax(dim=2)
    return shares.sum(dim=2) if reduce == "sum" else shares.mean(dim=2)
