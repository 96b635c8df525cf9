"""Functions that several torch ops share."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # targets, or queries of a call, that are taken at a time
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


def call_logits(
    query: Tensor,
    new_key: Tensor,
    key: Tensor,
    num_valid: Tensor | None,
    valid: Tensor | None,
    scale: float,
    begin: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries, from ``begin`` on, and their logits; -inf for tokens they do not see.

    Yields the block and ``[batch, num_kv_heads, group, queries, slots + tokens up to its end]``.
    """
    slots, q_len = key.shape[2], query.shape[2]
    queries = grouped(query, new_key.shape[1])
    keys = torch.cat((key, new_key), dim=2).to(queries.dtype)
    column = torch.arange(slots + q_len, device=query.device) - slots
    hidden = torch.zeros(1, 1, 1, 1, slots + q_len, dtype=torch.bool, device=query.device)
    if num_valid is not None:
        hidden = (column < 0) & (column + slots >= num_valid[:, :, None, None, None])
    if valid is not None:
        hidden = hidden | F.pad(~valid, (slots, 0))[:, None, None, None]
    for index in range(begin, q_len, BLOCK):
        here = slice(index, min(index + BLOCK, q_len))
        seen = slots + here.stop
        token = torch.arange(here.start, here.stop, device=query.device)[:, None]
        logits = fold(queries[:, :, :, here], keys[:, :, :seen].mT) * scale
        yield here, logits.masked_fill(hidden[..., :seen] | (column[:seen] > token), -torch.inf)
