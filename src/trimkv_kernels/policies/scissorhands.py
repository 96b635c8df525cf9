"""Scissorhands: drop the slots to which recent queries paid little attention.

The policy counts how often a slot got too little attention in the last ``window`` queries. An exact
sliding count needs one bit per query and slot. Here a slot has a ring of ``blocks`` counters, each
for ``window / blocks`` successive queries, and the oldest counter is dropped as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimkv_kernels.policies._options import check_choice, check_integer
from trimkv_kernels.policies.base import (
    AttentionStat,
    FieldSpec,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
)
from trimkv_kernels.policies.registry import register_policy


@register_policy("scissorhands")
@dataclass(frozen=True)
class Scissorhands(RetentionPolicy):
    """Persistence of importance (Liu et al., arXiv 2305.17118): score = ``window - count``.

    ``count`` is how many of the last ``window`` queries gave the slot less than ``1 / n``, where
    ``n`` is how many tokens the query saw. With ``blocks`` counters it covers the last ``window -
    window / blocks + 1`` to ``window`` queries; with ``blocks=window`` exactly ``window``. For a
    call with several queries only their total is known. It is spread evenly over the queries that
    could see the slot. Scores lie in ``[0, window]``. The paper also keeps the 10 most recent
    tokens: ``recent=10``.

    Args:
        window: Queries that count.
        blocks: Counters per slot; a divisor of ``window``.
        group: Reduction over the query heads that share a KV head, before the comparison.

    Raises:
        TypeError: ``window`` or ``blocks`` is not an integer.
        ValueError: a number is below 1, ``blocks`` does not divide ``window``, or ``group`` is not
            one of those named.
    """

    window: int = 400
    blocks: int = 8
    group: Literal["mean", "max"] = "mean"

    sinks = 0

    def __post_init__(self) -> None:
        check_integer("window", self.window, minimum=1)
        check_integer("blocks", self.blocks, minimum=1)
        check_choice("group", self.group, ("mean", "max"))
        if self.window % self.blocks:
            raise ValueError(
                f"blocks must divide window={self.window}, got {self.blocks}: "
                "each counter covers window / blocks queries"
            )

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        stat = AttentionStat(reduce="count_below", group=self.group, queries=self.window)
        return Needs(attention=stat)

    @property
    def fields(self) -> Mapping[str, FieldSpec]:  # type: ignore[override]
        return {"low": FieldSpec(shape=(self.blocks,))}

    def observe(self, seen: ObservationView) -> None:
        size = self.window // self.blocks
        t = seen.t[:, None, None, None]
        first = t - seen.num_queries[:, None, None, None]
        # first query of the block that each counter stands for at t
        ring = torch.arange(self.blocks, device=t.device)
        block = torch.div(t - 1, size, rounding_mode="floor")
        start = (block - (block - ring) % self.blocks) * size  # [batch, 1, 1, blocks]

        counted_from = torch.maximum(first, seen.position[..., None])
        share = torch.minimum(start + size, t) - torch.maximum(start, counted_from)
        share = share.clamp(min=0) / (t - counted_from).clamp(min=1)
        low = seen.fields["low"]
        low.masked_fill_(start >= first, 0.0)  # begun in this call: the old count expired
        low.add_(seen.attention[..., None] * share)

    def score(self, slots: SlotView) -> Tensor:
        return (self.window - slots.fields["low"].sum(dim=-1)).clamp(min=0.0)
