"""The base losses: gates must preserve the teacher's predictions, predict the text, or both.

With ``p`` the teacher's and ``q`` the student's distribution at a position that predicts a labelled
token, and ``y`` that token::

    fwkl:  sum_v p_v (ln p_v - ln q_v)      rvkl:  sum_v q_v (ln q_v - ln p_v)      ntp:  -ln q_y

each averaged over those positions. Several losses, as in ``"fwkl_ntp"``, are averaged, as in the
training of the published gates. Logits exist for a chunk of positions at a time. The backward pass
computes them again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimkv_kernels.training.packing import IGNORED

_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _forward_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum()


def _reverse_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum()


def _next_token(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(student, target, reduction="sum")


# From log probabilities [positions, vocab] and targets [positions] to a sum over positions.
_LOSSES: dict[str, _Loss] = {"fwkl": _forward_kl, "rvkl": _reverse_kl, "ntp": _next_token}


ATTENTION = "attention"  # cannot be combined: it needs no predictions, see `training.local`


def parse_base_loss(base_loss: str) -> tuple[str, ...]:
    """Split ``"fwkl_ntp"`` into its names.

    Raises:
        ValueError: a name is unknown or comes twice.
    """
    if base_loss == ATTENTION:
        return (ATTENTION,)
    names = tuple(base_loss.split("_"))
    if len(set(names)) != len(names) or not set(names) <= set(_LOSSES):
        raise ValueError(
            f"base_loss must be one of {', '.join(map(repr, _LOSSES))}, or different ones joined "
            f"by '_' as in 'fwkl_ntp', or 'attention', got {base_loss!r}"
        )
    return names


def needs_teacher(base_loss: str) -> bool:
    """Whether a base loss compares with the teacher."""
    return parse_base_loss(base_loss) != ("ntp",)


def base_losses(
    student: Tensor,
    teacher: Tensor | None,
    head: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    base_loss: str = "fwkl_ntp",
    chunk: int = 512,
) -> dict[str, Tensor]:
    """Compare the student with its teacher and with the text.

    Args:
        student: ``[batch, seq, hidden_size]``, the last hidden states, after the final norm.
        teacher: The teacher's hidden states; None if no loss needs them.
        head: From hidden states ``[positions, hidden_size]`` to logits ``[positions, vocab]``.
        target: ``[batch, seq]`` int64, the token that each position has to predict, or -100 if the
            position does not count in any loss.
        base_loss: ``"fwkl"``, ``"rvkl"``, ``"ntp"``, or several joined by ``_``.
        chunk: Positions whose logits exist at a time.

    Returns:
        The mean of each loss over the positions that count, fp32 scalars by name; 0 if none does.

    Raises:
        ValueError: ``base_loss`` is unknown, a shape disagrees, or the teacher is missing.
    """
    names = parse_base_loss(base_loss)
    if teacher is None:
        if needs_teacher(base_loss):
            raise ValueError(f"teacher must be given: base_loss {base_loss!r} compares with it")
        teacher = student.detach()
    for name, shape, expected in (
        ("teacher", teacher.shape, student.shape),
        ("target", target.shape, student.shape[:2]),
    ):
        if shape != expected:
            raise ValueError(f"{name} must have shape {list(expected)}, got {list(shape)}")
    counts = target != IGNORED
    target, student, teacher = target[counts], student[counts], teacher[counts].detach()

    def sums(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        log_q = head(student).float().log_softmax(-1)
        with torch.no_grad():
            log_p = head(teacher).float().log_softmax(-1) if needs_teacher(base_loss) else log_q
        return torch.stack([_LOSSES[name](log_q, log_p, target) for name in names])

    # Keeps the graph connected if no position counts, so that every process has gradients.
    total = student.float().sum() * 0 + student.new_zeros(len(names), dtype=torch.float32)
    for part in zip(student.split(chunk), teacher.split(chunk), target.split(chunk), strict=True):
        if len(part[0]):
            total = total + checkpoint(sums, *part, use_reentrant=False)
    means = total / max(len(target), 1)
    return dict(zip(names, means.unbind(), strict=True))
