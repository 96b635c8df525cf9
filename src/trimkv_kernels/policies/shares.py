"""How the heads of a scope share its budget, as numbers for a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimkv_kernels.policies._attention import softmax_over, window_logits


@dataclass(frozen=True)
class Preference:
    """How much of a shared budget each layer deserves, by the attention of its last queries.

    Attributes:
        window: Last queries of each head that are asked.
        tau_entropy, tau_variance: Temperatures; the larger, the less the term counts.
        min_per_head: Slots that each head gets in addition to its share; None is ``window``, but at
            most half of the budget.
    """

    window: int
    tau_entropy: float
    tau_variance: float
    min_per_head: int | None

    def least(self, budget: int) -> int:
        """Slots that each head gets whatever the preferences."""
        return min(self.window, budget // 2) if self.min_per_head is None else self.min_per_head

    def of_layer(
        self,
        queries: Tensor,
        query_position: Tensor,
        key: Tensor,
        position: Tensor,
        valid: Tensor,
        t: Tensor,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """A layer's preference: ``entropy ** (1 / tau_entropy) * variance ** (1 / tau_variance)``.

        The attention of the window's queries to the candidates before the window is taken, after a
        softmax over all candidates that a query sees. Its entropy is summed over heads, queries and
        candidates, its variance over the queries is summed over heads and candidates.

        Args:
            queries: ``[batch, num_heads, window, head_dim]`` after RoPE, in any order.
            query_position: ``[batch, window]``, -1 for none.
            key: ``[batch, num_kv_heads, candidates, head_dim]`` after RoPE.
            position: ``[batch, num_kv_heads, candidates]``.
            valid: Like ``position``, bool.
            t: ``[batch]``, tokens seen.
            scale: Softmax scale; None is ``head_dim ** -0.5``.

        Returns:
            fp64 ``[batch]``, finite and at least 0; 0 if nothing is before the window.
        """
        visible = position[:, :, None] <= query_position[:, None, :, None]
        visible = visible & valid[:, :, None]  # [batch, num_kv_heads, window, candidates]
        attention = softmax_over(window_logits(queries, key, scale), visible[:, :, None])
        past = valid & (position < (t - self.window)[:, None, None])
        attention = attention.masked_fill_(~past[:, :, None, None], 0.0).double()
        entropy = torch.special.entr(attention).flatten(1).sum(dim=1)
        variance = attention.var(dim=3).flatten(1).sum(dim=1)
        wanted = entropy ** (1 / self.tau_entropy) * variance ** (1 / self.tau_variance)
        return torch.where(wanted.isfinite(), wanted, 0.0)

    def slots(self, preference: Tensor, budget: int, num_layers: int) -> Tensor:
        """Slots of each head of some first layers of a model.

        With more layers the slots of the first ones become fewer, never more. So what is dropped
        while later layers are still to come would be dropped in the end too.

        Args:
            preference: fp64 ``[batch, layers]``, of :meth:`of_layer`. Rows of zeros share equally.
            budget: Mean slots of a head of all layers.
            num_layers: Layers of the model.

        Returns:
            int32 ``[batch, layers]``, rounded down.
        """
        total = preference.sum(dim=-1, keepdim=True)
        share = torch.where(total > 0, preference / total, 1 / preference.shape[1])
        least = self.least(budget)
        exact = share * (num_layers * (budget - least))
        # what rounding takes from a whole number is given back
        return least + (exact + 1e-6).floor().to(torch.int32)


@dataclass(frozen=True)
class Shares:
    """How the heads of a scope share its budget, as numbers for a cache.

    Attributes:
        scope: The heads that share a budget: of a ``"layer"``, or of the whole ``"model"``.
        min_per_head: Slots that each head gets in addition to its share.
        equal: Fraction of the budget that is shared out equally.
        threshold: The lowest score that stays; None if the budget alone decides.
        table: Slots of each head, ``[layers][heads]``; None if scores decide.
        preference: How the layers' slots follow from attention; None if scores or a table decide.
    """

    scope: Literal["layer", "model"]
    min_per_head: int = 0
    equal: float = 0.0
    threshold: float | None = None
    table: tuple[tuple[int, ...], ...] | None = None
    preference: Preference | None = None

    @property
    def fills_budget(self) -> bool:
        """Whether an eviction always leaves exactly the budget."""
        own = self.min_per_head == 0 and self.equal == 0 and self.preference is None
        return own and self.threshold is None and self.table is None

    def least(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Slots of each layer's heads that protected pairs may count on."""
        if self.table is not None:
            return tuple(map(min, self.table))
        least = budget if self.preference is None else self.preference.least(budget)
        return (least,) * num_layers
