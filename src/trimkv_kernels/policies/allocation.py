"""How many slots each layer and head gets. A policy scores, an allocation shares the budget out.

An allocation of fixed budgets (:class:`Uniform`, :class:`PerLayer`, :class:`Pyramid`) is what
:class:`~trimkv_kernels.cache.BoundedKVCache` takes: its slots are allocated once. Budgets that
follow the scores (:class:`GlobalTopK`, :class:`AdaptiveHeads`, :class:`Threshold`) need slots in
pages; their :meth:`Allocation.counts` is a pure function of the scores, for analysis. As the
highest scores of a head stay, counts say which slots do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimkv_kernels.policies._options import check_fraction, check_integer


class Allocation:
    """Shares a budget out over the layers.

    Attributes:
        is_fixed: Whether the budgets are known before the first token, as the cache needs them.
    """

    is_fixed: ClassVar[bool] = True

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Slots that each head of each layer keeps.

        Args:
            budget: Mean number of slots per layer and KV head.
            num_layers: Layers of the model.

        Raises:
            ValueError: the budget cannot be shared out like this.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define budgets()")

    def counts(self, scores: Tensor, budget: int) -> Tensor:
        """Slots that each head keeps, given the scores of what it holds.

        Rows are independent of each other. Where equal scores compete for the last slots, the lower
        layer wins, then the lower head.

        Args:
            scores: ``[layers, batch, num_kv_heads, slots]`` float32; -inf where a slot is empty,
                +inf where it is protected; NaN counts as empty.
            budget: Mean number of slots per layer and KV head.

        Returns:
            int64 ``[layers, batch, num_kv_heads]``, at most the filled slots of a head.

        Raises:
            ValueError: ``scores`` has another shape or dtype, or the budget cannot be shared out.
            TypeError: ``budget`` is not an integer.
        """
        check_integer("budget", budget, minimum=1)
        if scores.ndim != 4 or scores.dtype != torch.float32:
            raise ValueError(
                "scores must be float32 [layers, batch, num_kv_heads, slots], "
                f"got {scores.dtype} {list(scores.shape)}"
            )
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        filled = (scores > -torch.inf).sum(-1)
        return torch.minimum(self._wanted(scores, budget), filled)

    def _wanted(self, scores: Tensor, budget: int) -> Tensor:
        """What each head would get if it held enough; broadcasts to the counts."""
        table = torch.tensor(self.budgets(budget, scores.shape[0]), device=scores.device)
        return table[:, None, None]


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every layer and head."""

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        return (budget,) * num_layers


@dataclass(frozen=True)
class PerLayer(Allocation):
    """A table of budgets, one for each layer.

    Args:
        table: Slots per head of each layer, each at least 1.

    Raises:
        ValueError: a budget is below 1.
    """

    table: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", tuple(self.table))
        if not self.table or min(self.table) < 1:
            raise ValueError(f"table must hold budgets of at least 1, got {self.table}")

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        if len(self.table) != num_layers:
            raise ValueError(
                f"table must have one budget for each of {num_layers} layers, got {len(self.table)}"
            )
        return self.table


@dataclass(frozen=True)
class Pyramid(Allocation):
    """More slots in low layers than in high ones (PyramidKV, Cai et al., arXiv 2406.02069).

    Every layer has the window; outside it, slots fall evenly between the ends that
    :func:`pyramid_budgets` has for a long prompt. The authors' code rounds the step from layer to
    layer down, so that it holds more than the budget, and of small budgets in deep models makes no
    pyramid at all. Here each layer is rounded instead, and the mean is exactly ``budget``.

    Args:
        beta: The last layer gets about ``1 / beta`` of the mean budget outside the window.
        window: Slots that every layer has; of small budgets, at most half.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a number is below 1.
    """

    beta: int = 20
    window: int = 32

    def __post_init__(self) -> None:
        check_integer("beta", self.beta, minimum=1)
        check_integer("window", self.window, minimum=1)

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        check_integer("budget", budget, minimum=1)
        window = min(self.window, max(budget // 2, 1))
        mean, gaps = budget - window, num_layers - 1
        if gaps == 0:
            return (budget,)
        first, last = _pyramid_ends(mean, self.beta)
        shares = [(first * gaps - layer * (first - last)) // gaps for layer in range(num_layers)]
        rest = mean * num_layers - sum(shares)  # rounded off between the ends, less than 1 each
        return tuple(window + share + (0 < layer <= rest) for layer, share in enumerate(shares))


def pyramid_budgets(
    budget: int, num_layers: int, *, beta: int, window: int, prompt_length: int | None = None
) -> tuple[int, ...]:
    """PyramidKV's budgets to the integer, as its authors' code has them.

    With ``mean = budget - window`` they fall by ``(first - last) // (num_layers - 1)`` from layer
    to layer, from ``first = 2 * mean - last`` to about ``last = mean // beta``. If a prompt has no
    more than ``first`` tokens before the window, that number is the first, and the last is
    ``2 * mean`` less it. If it has less than ``2 * mean`` tokens every layer gets ``mean``, and if
    less than ``budget`` nothing is cut.

    Args:
        budget: Mean number of slots per layer, window included.
        num_layers: Layers of the model, at least 2.
        beta: Ratio of the mean to the last budget.
        window: Last tokens, kept in every layer.
        prompt_length: Tokens of the prompt; None is a long one.

    Returns:
        Slots of each layer outside the window.
    """
    mean = budget - window
    first, last = _pyramid_ends(mean, beta)
    if prompt_length is not None:
        past = prompt_length - window
        if prompt_length < budget:
            return (past,) * num_layers
        if prompt_length < 2 * mean:
            return (mean,) * num_layers
        if first >= past:
            first, last = past, 2 * mean - past
    step = (first - last) // (num_layers - 1)
    return tuple(first - layer * step for layer in range(num_layers))


def _pyramid_ends(mean: int, beta: int) -> tuple[int, int]:
    """Slots outside the window of the first and of the last layer; their mean is ``mean``."""
    last = mean // beta
    return 2 * mean - last, last


@dataclass(frozen=True)
class GlobalTopK(Allocation):
    """One top-k over all layers and heads of a row (Bui et al., arXiv 2605.09649).

    Of ``layers * num_kv_heads * (budget - min_per_head)`` highest scores, a head gets those that
    are its own, and ``min_per_head`` on top. What a head cannot fill is not given to others. Scores
    must be comparable across layers, as those of tied gates are.

    Args:
        min_per_head: Slots that each head gets beside its share.

    Raises:
        TypeError: ``min_per_head`` is not an integer.
        ValueError: it is negative.
    """

    min_per_head: int = 0

    is_fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("min_per_head", self.min_per_head, minimum=0)

    def _wanted(self, scores: Tensor, budget: int) -> Tensor:
        if budget < self.min_per_head:
            raise ValueError(
                f"budget must be at least min_per_head={self.min_per_head}, got {budget}"
            )
        layers, _, heads, _ = scores.shape
        share = layers * heads * (budget - self.min_per_head)
        rows = scores.transpose(0, 1).flatten(1, 2)  # [batch, layers * heads, slots]
        counts = _top_counts(rows, share).unflatten(1, (layers, heads)).transpose(0, 1)
        return counts + self.min_per_head


@dataclass(frozen=True)
class AdaptiveHeads(Allocation):
    """One top-k over the heads of each layer, mixed with equal shares (AdaKV, arXiv 2407.11550).

    Of a layer's ``num_kv_heads * budget`` highest scores, let ``c`` be those of a head. It gets
    ``(1 - floor) * c + floor * budget``, rounded so that the layer's total is kept: the heads with
    the largest remainders get the slots that rounding down leaves over. The authors round each head
    by itself, after rounding ``floor * budget`` down, and lose some of the total.

    Args:
        floor: Fraction of the budget that every head has for sure, 0 to 1.

    Raises:
        ValueError: ``floor`` is out of range.
    """

    floor: float = 0.2

    is_fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction("floor", self.floor)

    def _wanted(self, scores: Tensor, budget: int) -> Tensor:
        top = _top_counts(scores, scores.shape[2] * budget)
        exact = (1 - self.floor) * top.double() + self.floor * budget
        down = exact.floor()
        left = (exact.sum(-1, keepdim=True) - down.sum(-1, keepdim=True)).round()
        order = (exact - down).argsort(dim=-1, descending=True, stable=True)
        return (down + (order.argsort(dim=-1) < left)).long()


@dataclass(frozen=True)
class Threshold(Allocation):
    """Every slot that scores at least so much; the budget bounds nothing.

    DBTrimKV's ``threshold`` strategy (arXiv 2605.09649) with ``log_threshold = ln(alpha)``, and
    DMS (arXiv 2506.05345) with +inf for the slots of its window.

    Args:
        log_threshold: Lowest score that stays, in the unit of the scores.
        min_per_head: Slots that each head keeps whatever they score.

    Raises:
        TypeError: ``min_per_head`` is not an integer.
        ValueError: it is negative, or ``log_threshold`` is not finite.
    """

    log_threshold: float
    min_per_head: int = 0

    is_fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("min_per_head", self.min_per_head, minimum=0)
        if not math.isfinite(self.log_threshold):
            raise ValueError(f"log_threshold must be finite, got {self.log_threshold}")

    def _wanted(self, scores: Tensor, budget: int) -> Tensor:
        return (scores >= self.log_threshold).sum(-1).clamp(min=self.min_per_head)


def _top_counts(scores: Tensor, k: int) -> Tensor:
    """How many of a group's ``k`` highest scores each head has.

    Args:
        scores: ``[*groups, heads, slots]``, -inf where a slot is empty.
        k: Slots that the heads of a group share.

    Returns:
        int64 ``[*groups, heads]``. Equal scores are taken in the order of heads.
    """
    value, index = scores.flatten(-2).sort(dim=-1, descending=True, stable=True)
    head, filled = index[..., :k] // scores.shape[-1], value[..., :k] > -torch.inf
    zeros = torch.zeros(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    return zeros.scatter_add_(-1, head, filled.long())
