"""How many slots each layer and head gets. A policy scores, an allocation shares the budget out.

An allocation of fixed budgets (:class:`Uniform`, :class:`PerLayer`, :class:`Pyramid`) gives every
head of a layer the same. With :class:`GlobalTopK`, :class:`AdaptiveHeads`, :class:`Threshold`,
:class:`HeadTable` and :class:`LayerPreference`, the heads of a *scope*, a layer or the whole model,
share one budget, and their slots are in pages. :meth:`Allocation.counts` is their rule, a pure
function of the scores; only :class:`LayerPreference` decides by attention. The highest scores of
each head stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trimkv_kernels.policies._options import check_fraction, check_integer
from trimkv_kernels.policies._ranking import best_first
from trimkv_kernels.policies.shares import Preference, Shares


class Allocation:
    """Shares a budget out over the layers and heads.

    Attributes:
        shares: How heads share a budget; None if all heads of a layer have the same budget.
    """

    shares: Shares | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether all heads of a layer have the same budget, known before the first token."""
        return self.shares is None

    def check(self, budget: int, num_layers: int, num_kv_heads: int) -> None:
        """Check that a budget of a model of this shape can be shared out like this.

        Raises:
            ValueError: it cannot; names what does not fit.
        """

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Slots that each head of each layer keeps.

        Args:
            budget: Mean number of slots per layer and KV head.
            num_layers: Layers of the model.

        Raises:
            ValueError: the budget cannot be shared out like this.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define budgets()")

    def counts(self, scores: Tensor, budget: int, position: Tensor | None = None) -> Tensor:
        """Slots that each head keeps, given the scores of what it holds.

        Rows are independent of each other. If equal scores compete for the last slots, the newer
        token wins, then the lower layer, then the lower head.

        Args:
            scores: ``[layers, batch, num_kv_heads, slots]`` float32; -inf for empty slots,
                +inf for protected ones; NaN counts as empty.
            budget: Mean number of slots per layer and KV head.
            position: Like ``scores``, integers, the position of each slot's token. None means that
                every head holds the same tokens, in the order of its slots.

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
        self.check(budget, scores.shape[0], scores.shape[2])
        if position is None:
            position = torch.arange(scores.shape[3], device=scores.device).expand(scores.shape)
        elif position.shape != scores.shape:
            raise ValueError(
                f"position must have the shape of scores, {list(scores.shape)}, "
                f"got {list(position.shape)}"
            )
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        filled = (scores > -torch.inf).sum(-1)
        return torch.minimum(self._wanted(scores, position, budget), filled)

    def _wanted(self, scores: Tensor, position: Tensor, budget: int) -> Tensor:
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

    Every layer has the window. The slots outside it decrease evenly from the first to the last
    layer, whose numbers are those of :func:`pyramid_budgets` for a long prompt. The authors' code
    rounds the step between layers down. It thus holds more than the budget, and with small budgets
    in deep models the pyramid is flat. Here each layer is rounded, and the mean is ``budget``.

    Args:
        beta: The last layer gets about ``1 / beta`` of the mean budget outside the window.
        window: Slots that every layer has, but at most half of the budget.

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
    more than ``first`` tokens before the window, ``first`` is this number of tokens, and ``last``
    is ``2 * mean - first``. If it has less than ``2 * mean`` tokens, every layer gets ``mean``. If
    it has less than ``budget`` tokens, nothing is cut.

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
    """One top-k over all layers and heads of a row (DBTrimKV, Bui et al., arXiv 2605.09649).

    A head gets a slot for each of its own scores among the ``layers * num_kv_heads * (budget -
    min_per_head)`` highest, and ``min_per_head`` more. Slots that a head cannot fill are not given
    to others. Scores are compared as they are. Tied gates are made for this; other scores may not
    be comparable between layers or heads.

    Args:
        min_per_head: Slots that each head gets in addition to its share.

    Raises:
        TypeError: ``min_per_head`` is not an integer.
        ValueError: it is negative.
    """

    min_per_head: int = 0

    def __post_init__(self) -> None:
        check_integer("min_per_head", self.min_per_head, minimum=0)

    @property
    def shares(self) -> Shares:  # type: ignore[override]
        return Shares("model", min_per_head=self.min_per_head)

    def check(self, budget: int, num_layers: int, num_kv_heads: int) -> None:
        _check_floor(budget, self.min_per_head)

    def _wanted(self, scores: Tensor, position: Tensor, budget: int) -> Tensor:
        layers, _, heads, _ = scores.shape
        share = layers * heads * (budget - self.min_per_head)
        best = best_first(_rows(scores), _rows(position))
        return _layers(best.counts(best.filled & (best.rank < share)), layers) + self.min_per_head


@dataclass(frozen=True)
class AdaptiveHeads(Allocation):
    """One top-k over the heads of each layer, mixed with equal shares (AdaKV, arXiv 2407.11550).

    If a head has ``c`` of its layer's ``num_kv_heads * budget`` highest scores, it gets
    ``(1 - floor) * c + floor * budget`` slots. This is rounded down, and the slots left over go to
    the heads with the largest remainders, so the layer's total is kept. The authors round
    ``floor * budget`` down and then each head, and lose some of the total.

    Args:
        floor: Fraction of its budget that every head gets in any case, 0 to 1.

    Raises:
        ValueError: ``floor`` is out of range.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        check_fraction("floor", self.floor)

    @property
    def shares(self) -> Shares:  # type: ignore[override]
        return Shares("layer", equal=self.floor)

    def _wanted(self, scores: Tensor, position: Tensor, budget: int) -> Tensor:
        best = best_first(scores, position)
        top = best.counts(best.filled & (best.rank < scores.shape[2] * budget))
        exact = (1 - self.floor) * top.double() + self.floor * budget
        down = exact.floor()
        left = (exact.sum(-1, keepdim=True) - down.sum(-1, keepdim=True)).round()
        order = (exact - down).argsort(dim=-1, descending=True, stable=True)
        return (down + (order.argsort(dim=-1) < left)).long()


@dataclass(frozen=True)
class Threshold(Allocation):
    """Keep every slot whose score is at least a threshold, within the budget.

    This is DBTrimKV's ``threshold`` strategy (arXiv 2605.09649) with ``log_threshold = ln(alpha)``,
    and DMS (arXiv 2506.05345) with +inf for the slots of its window. If more slots pass than the
    model's budget, each head keeps its best ``min_per_head``, and the others compete for the rest.

    Args:
        log_threshold: Lowest score that stays, in the unit of the scores.
        min_per_head: Slots that each head keeps even below the threshold.

    Raises:
        TypeError: ``min_per_head`` is not an integer.
        ValueError: it is negative, or ``log_threshold`` is not finite.
    """

    log_threshold: float
    min_per_head: int = 0

    def __post_init__(self) -> None:
        check_integer("min_per_head", self.min_per_head, minimum=0)
        if not math.isfinite(self.log_threshold):
            raise ValueError(f"log_threshold must be finite, got {self.log_threshold}")

    @property
    def shares(self) -> Shares:  # type: ignore[override]
        return Shares("model", min_per_head=self.min_per_head, threshold=float(self.log_threshold))

    def check(self, budget: int, num_layers: int, num_kv_heads: int) -> None:
        _check_floor(budget, self.min_per_head)

    def _wanted(self, scores: Tensor, position: Tensor, budget: int) -> Tensor:
        layers, _, heads, _ = scores.shape
        best = best_first(_rows(scores), _rows(position))
        sure = best.filled & (best.rank_in_head < self.min_per_head)
        passes = best.filled & ~sure & (best.score >= self.log_threshold)
        room = layers * heads * budget - sure.sum(-1, keepdim=True)
        passes = passes & (passes.cumsum(-1) <= room)
        return _layers(best.counts(sure | passes), layers)


@dataclass(frozen=True)
class HeadTable(Allocation):
    """A table of slots, one for each head (HeadKV, Fu et al., arXiv 2410.19258).

    Args:
        table: Slots of each head, ``[layers][num_kv_heads]``, at least 0. Their mean may not exceed
            the budget.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: the table is empty, has rows of different lengths, or a negative entry.
    """

    table: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        table = tuple(tuple(layer) for layer in self.table)
        object.__setattr__(self, "table", table)
        if not table or not table[0] or len({len(layer) for layer in table}) > 1:
            raise ValueError(
                f"table must have a row of slots for each layer, all of one length, got {table}"
            )
        for layer in table:
            for slots in layer:
                check_integer("table", slots, minimum=0)

    @classmethod
    def read(cls, path: str | Path) -> HeadTable:
        """Read a table from a JSON file: a list of layers, each a list of slots of its heads.

        Raises:
            ValueError: the file holds no such table.
        """
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tuple(tuple(row) for row in rows))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} must hold a table of slots, [[4, 60], ...]: {error}"
            ) from None

    @classmethod
    def from_importance(
        cls, importance: Sequence[Sequence[float]], budget: int, *, share: float = 0.5
    ) -> HeadTable:
        """HeadKV's table: one part of the budget in equal shares, the other by importance.

        A head gets ``budget * (1 - share)``. The rest of all heads' budgets is shared out in
        proportion to importance. Numbers are rounded down, and the slots left over go to the
        largest remainders, so that the total is kept.

        Args:
            importance: Of each head, ``[layers][num_kv_heads]``, not negative.
            budget: Mean slots of a head.
            share: Fraction of the budget that is shared by importance; ``1 / beta`` in the paper.

        Raises:
            ValueError: ``importance`` is no such table or all 0, or a number is out of range.
        """
        check_integer("budget", budget, minimum=1)
        check_fraction("share", share)
        try:
            weight = torch.tensor(importance, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"importance must be a table of numbers: {error}") from None
        if weight.dim() != 2 or not bool((weight >= 0).all()) or not float(weight.sum()) > 0:
            raise ValueError("importance must be [layers][heads], not negative and not all 0")
        pool = budget * weight.numel() * share
        exact = (budget * (1 - share) + pool * weight / weight.sum()).flatten()
        down = exact.floor()
        left = budget * exact.numel() - int(down.sum())
        more = (exact - down).argsort(descending=True, stable=True)[:left]
        slots = down.long().scatter_add(0, more, torch.ones_like(more))
        return cls(tuple(map(tuple, slots.view_as(weight).tolist())))

    @property
    def shares(self) -> Shares:  # type: ignore[override]
        return Shares("model", table=self.table)

    def check(self, budget: int, num_layers: int, num_kv_heads: int) -> None:
        shape = (len(self.table), len(self.table[0]))
        if shape != (num_layers, num_kv_heads):
            raise ValueError(
                f"table must have {num_layers} layers of {num_kv_heads} heads, "
                f"got {shape[0]} of {shape[1]}"
            )
        total = sum(map(sum, self.table))
        if total > budget * num_layers * num_kv_heads:
            raise ValueError(
                f"budget must be at least the mean of the table, "
                f"{total / (num_layers * num_kv_heads):.1f} slots per head, got {budget}"
            )

    def _wanted(self, scores: Tensor, position: Tensor, budget: int) -> Tensor:
        return torch.tensor(self.table, device=scores.device)[:, None]


@dataclass(frozen=True)
class LayerPreference(Allocation):
    """More for layers whose attention is spread out and shifts (CAKE, arXiv 2503.12491).

    A layer's preference is ``entropy ** (1 / tau_entropy) * variance ** (1 / tau_variance)`` of the
    attention that the last ``window`` queries of a prompt give to the tokens before them. Every
    head of a layer gets ``min_per_head``, and the layer's part of what is left of the budget, which
    is shared out in proportion to the preferences, rounded down.

    A call of several tokens that cuts a row decides for this row. Steps keep to what was decided
    last, and before that all heads get the same, as in the authors' code. There, slots that a
    short prompt cannot fill go to other layers; here the layer fills them later.

    Args:
        window: Last queries of each head that are asked, at least 2.
        tau_entropy: Temperature of the entropy; the larger, the less it counts. The authors choose
            it for each model, from 0.4 to 1.9.
        tau_variance: Temperature of the variance; theirs is from 0.4 to 2.3.
        min_per_head: Slots that each head gets in addition to its share; protected pairs must be
            fewer. None is ``window``, which the authors keep, but at most half of the budget.

    Raises:
        TypeError: ``window`` or ``min_per_head`` is not an integer.
        ValueError: a number is out of range.
    """

    window: int = 32
    tau_entropy: float = 1.0
    tau_variance: float = 1.0
    min_per_head: int | None = None

    def __post_init__(self) -> None:
        check_integer("window", self.window, minimum=2)
        for name in ("tau_entropy", "tau_variance"):
            tau = getattr(self, name)
            if not (math.isfinite(tau) and tau > 0):
                raise ValueError(f"{name} must be above 0 and finite, got {tau}")
        if self.min_per_head is not None:
            check_integer("min_per_head", self.min_per_head, minimum=1)

    @property
    def preference(self) -> Preference:
        """The rule: how a layer's preference and its slots are computed."""
        return Preference(self.window, self.tau_entropy, self.tau_variance, self.min_per_head)

    @property
    def shares(self) -> Shares:  # type: ignore[override]
        return Shares("model", preference=self.preference)

    def check(self, budget: int, num_layers: int, num_kv_heads: int) -> None:
        _check_floor(budget, self.min_per_head or 0)

    def _wanted(self, scores: Tensor, position: Tensor, budget: int) -> Tensor:
        """What holds until a prompt has told the layers' preferences."""
        return torch.tensor(budget, device=scores.device)


def _check_floor(budget: int, min_per_head: int) -> None:
    if budget < min_per_head:
        raise ValueError(f"budget must be at least min_per_head={min_per_head}, got {budget}")


def _rows(tensor: Tensor) -> Tensor:
    """``[layers, batch, heads, slots]`` as ``[batch, layers * heads, slots]``."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _layers(counts: Tensor, layers: int) -> Tensor:
    """``[batch, layers * heads]`` as ``[layers, batch, heads]``."""
    return counts.unflatten(1, (layers, -1)).transpose(0, 1)
