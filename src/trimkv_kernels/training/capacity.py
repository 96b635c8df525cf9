"""The capacity loss: what gates pay for remembering more than the budget.

``S_t = sum over j <= t of beta_j ** (t - j)`` is how many tokens a head is expected to hold at step
``t`` (:func:`trimkv_kernels.kernels.retention_sum`). With ``t`` counted from 0 and a budget of M::

    reference:  c_t = max(0, S_t - M) / max(t - M, 1),  loss = sum of c / number of c > 0
    paper:      c_t = max(0, S_t - M) / (t + 1),        loss = mean of c

The first is what the published gates were trained with, the second is the formula of
arXiv 2512.03324. The scope ``"global"`` (arXiv 2605.09649) puts the sums over all layers and heads
for ``S_t`` and multiplies ``M`` and ``t`` by their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_kernels.kernels import retention_sum
from trimkv_kernels.training.packing import Packing

SCOPES = ("head", "global")
NORMALIZATIONS = ("reference", "paper")


def capacity_loss(
    log_beta: Tensor,
    *,
    budget: int,
    scope: str = "head",
    position_ids: Tensor | None = None,
    valid: Tensor | None = None,
    normalization: str = "reference",
    impl: str = "auto",
) -> Tensor:
    """Charge for expected tokens above the budget.

    Args:
        log_beta: ``[batch, layers, num_kv_heads, seq]`` fp32, natural logarithms, at most 0.
        budget: Tokens that a head may hold.
        scope: ``"head"``: each head has that budget; ``"global"``: all layers and heads share the
            sum of theirs.
        position_ids: ``[batch, seq]`` integers, which go up by one within a document of a packed
            row; None means that a row is one document.
        valid: ``[batch, seq]``, false or 0 for padding; None when there is none.
        normalization: ``"reference"`` or ``"paper"``, see this module.
        impl: Of ``retention_sum``: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        A scalar, fp32; 0 where no budget is exceeded.

    Raises:
        ValueError: a shape, dtype or device disagrees, or an option is unknown.
    """
    if log_beta.dim() != 4:
        raise ValueError(
            f"log_beta must have shape [batch, layers, num_kv_heads, seq], "
            f"got {list(log_beta.shape)}"
        )
    batch, _, _, seq = log_beta.shape
    packing = Packing.of((batch, seq), log_beta.device, position_ids=position_ids, valid=valid)
    held = retention_sum(log_beta.flatten(1, 2), document=packing.document, impl=impl)
    return excess(held, packing, budget=budget, scope=scope, normalization=normalization)


def excess(
    held: Tensor, packing: Packing, *, budget: int, scope: str, normalization: str
) -> Tensor:
    """The loss of retention sums ``[batch, layers * num_kv_heads, seq]``, 0 at padding."""
    check_choice("scope", scope, SCOPES)
    check_choice("normalization", normalization, NORMALIZATIONS)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be an integer >= 1 (tokens per head), got {budget!r}")
    heads = 1
    if scope == "global":
        heads = held.shape[1]
        held = held.sum(dim=1, keepdim=True)
    over = (held - budget * heads).clamp(min=0)
    position = packing.position[:, None].to(held.dtype)
    if normalization == "paper":
        share = over / (heads * (position + 1))
        return share.sum() / (packing.valid.sum() * held.shape[1]).clamp(min=1)
    share = over / (heads * (position - budget)).clamp(min=1)
    return share.sum() / torch.count_nonzero(share).clamp(min=1)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
