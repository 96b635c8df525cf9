"""The capacity loss, which penalises gates that remember more than the budget.

``S_t = sum over j <= t of beta_j ** (t - j)`` is how many tokens a head is expected to hold at step
``t`` (:func:`trimkv_kernels.kernels.retention_sum`). With ``t`` counted from 0 and a budget of M::

    reference:  c_t = max(0, S_t - M) / max(t - M, 1),  loss = sum of c / number of c > 0
    paper:      c_t = max(0, S_t - M) / (t + 1),        loss = mean of c

The published gates were trained with the first; the second is the formula of arXiv 2512.03324. If
recent positions are protected, a token only fades after ``recent`` steps:
``beta_j ** max(t - j - recent, 0)``. With the scope ``"global"`` (arXiv 2605.09649), ``S_t`` is the
sum over all layers and heads, and ``M`` and ``t`` are multiplied by their number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels import retention_sum
from trimkv_kernels.training.packing import Packing, documents_before

SCOPES = ("head", "global")
NORMALIZATIONS = ("reference", "paper")


def capacity_loss(
    log_beta: Tensor,
    *,
    budget: int,
    recent: int = 0,
    scope: str = "head",
    position_ids: Tensor | None = None,
    valid: Tensor | None = None,
    normalization: str = "reference",
    impl: str = "auto",
) -> Tensor:
    """Penalise the expected number of tokens above the budget.

    Args:
        log_beta: ``[batch, layers, num_kv_heads, seq]`` fp32, natural logarithms, at most 0.
        budget: Tokens that a head may hold.
        recent: Positions for which a token is held in full.
        scope: ``"head"``: each head has this budget; ``"global"``: all layers and heads share the
            sum of their budgets.
        position_ids: ``[batch, seq]`` integers that grow by one within a document of a packed
            row; None means that a row is one document.
        valid: ``[batch, seq]``, false or 0 for padding; None when there is none.
        normalization: ``"reference"`` or ``"paper"``, see this module.
        impl: Of ``retention_sum``: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        A scalar, fp32; 0 if no budget is exceeded.

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
    held = expected_tokens(log_beta.flatten(1, 2), packing, recent=recent, impl=impl)
    return excess(held, packing, budget=budget, scope=scope, normalization=normalization)


def expected_tokens(log_beta: Tensor, packing: Packing, *, recent: int, impl: str) -> Tensor:
    """How many tokens a head is expected to hold after each token: ``S_t`` of this module.

    Args:
        log_beta: ``[batch, heads, seq]`` fp32.
        packing: The documents.
        recent: Positions for which a token is held in full.
        impl: Of ``retention_sum``.

    Returns:
        ``[batch, heads, seq]`` fp32.
    """
    if not recent:
        return retention_sum(log_beta, document=packing.document, impl=impl)
    whole = (packing.position + 1).clamp(max=recent)[:, None].to(log_beta.dtype)
    if log_beta.shape[2] <= recent:
        return whole + 0 * log_beta  # keeps the graph, so that such a row has gradients too
    # a token begins to fade at the age `recent`
    document = documents_before(packing.document, recent)
    faded = retention_sum(log_beta[..., :-recent], document=document, impl=impl)
    return whole + F.pad(faded, (recent, 0))


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


def check_protection(budget: int, sinks: int, recent: int) -> None:
    """Check that there are fewer protected positions than the budget.

    Raises:
        ValueError: names the wrong number.
    """
    for name, value in (("sinks", sinks), ("recent", recent)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    if sinks + recent >= budget:
        raise ValueError(
            f"budget must exceed the protected positions, got budget {budget} with sinks {sinks} "
            f"and recent {recent}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
