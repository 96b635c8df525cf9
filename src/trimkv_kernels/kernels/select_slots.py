"""Prompt selection: the best ``budget`` of many candidates, for calls of more than one token."""

import torch
from torch import Tensor

from trimkv_kernels.kernels import reference
from trimkv_kernels.kernels._dispatch import check_int, check_rank, check_tensor


def affine_scores(slope: Tensor, offset: Tensor, t: Tensor, position: Tensor) -> Tensor:
    """``slope * (t - position) + offset``, rounded after the product and after the sum.

    Args:
        slope: ``[..., batch, num_kv_heads, num_slots]`` fp32.
        offset: As ``slope``.
        t: ``[batch]`` int32, tokens each sequence has seen.
        position: As ``slope`` but int32.
    """
    return reference.affine_scores(slope, offset, t, position)


def select_slots(
    scores: Tensor,
    position: Tensor,
    valid: Tensor,
    t: Tensor,
    *,
    budget: int,
    num_slots: int,
    sinks: int = 0,
    recent: int = 0,
    nan_seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose among the candidates of one layer by the rule of :func:`evict`.

    A head with at least ``num_slots`` valid candidates keeps its ``budget`` highest scores, the
    others keep all. Torch on every device: shapes do not depend on the data, nothing is read back.

    Args:
        scores: ``[batch, num_kv_heads, candidates]`` fp32.
        position: As ``scores`` but int32, distinct among the valid candidates of a head.
        valid: As ``scores`` but bool.
        t: ``[batch]`` int32, tokens each sequence has seen.
        budget: Candidates that survive where there are too many.
        num_slots: What counts as too many, more than ``budget``.
        sinks: Protect ``position < sinks``.
        recent: Protect ``position >= t - recent``.
        nan_seen: int32 scalar, set to 1 where a valid candidate's score was NaN.

    Returns:
        ``index`` ``[batch, num_kv_heads, min(num_slots - 1, candidates)]`` int64, the kept
        candidates first, in their order; what follows them is arbitrary but in range.
        ``count`` ``[batch, num_kv_heads]`` int32, how many are kept.

    Raises:
        ValueError: A shape, dtype or device disagrees, or a number is out of range.
    """
    check_rank("scores", scores, "batch, num_kv_heads, candidates")
    check_tensor("scores", scores, scores.shape, (torch.float32,), scores.device)
    check_tensor("position", position, scores.shape, (torch.int32,), scores.device)
    check_tensor("valid", valid, scores.shape, (torch.bool,), scores.device)
    check_tensor("t", t, scores.shape[:1], (torch.int32,), scores.device)
    check_int("budget", budget, 1, num_slots - 1)
    check_int("sinks", sinks, 0)
    check_int("recent", recent, 0)
    return reference.select_slots(
        scores, position, valid, t, budget, num_slots, sinks, recent, nan_seen
    )
