"""The slots of heads that share a budget, the best first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """The slots of each scope, the best first; every tensor is ``[*scopes, heads * slots]``.

    Attributes:
        score, head, filled: Of each slot.
        rank: How many slots of the scope are better.
        rank_in_head: How many slots of the same head are better.
        num_heads: Heads of a scope.
    """

    score: Tensor
    head: Tensor
    filled: Tensor
    rank: Tensor
    rank_in_head: Tensor
    num_heads: int

    def counts(self, chosen: Tensor) -> Tensor:
        """``[*scopes, heads]`` int64, the chosen slots of each head."""
        size = (*chosen.shape[:-1], self.num_heads)
        zeros = torch.zeros(size, dtype=torch.int64, device=chosen.device)
        return zeros.scatter_add_(-1, self.head, chosen.long())


def best_first(scores: Tensor, position: Tensor) -> Ranking:
    """Sort ``[*scopes, heads, slots]`` by score; of equals the newer token, then the lower head."""
    heads, slots = scores.shape[-2:]
    # the last of several stable sorts decides first; heads are in order at the start
    newest = position.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    score, order = scores.flatten(-2).gather(-1, newest).sort(dim=-1, descending=True, stable=True)
    head = newest.gather(-1, order) // slots
    rank = torch.arange(heads * slots, device=scores.device).expand_as(head)
    before = torch.zeros_like(head)
    for index in range(heads):
        own = head == index
        before = torch.where(own, own.cumsum(-1) - 1, before)
    return Ranking(score, head, score > -torch.inf, rank, before, heads)
