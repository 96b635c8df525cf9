"""The shared eviction in Triton against the share-out in float64."""

import pytest
import torch

import trimkv_kernels as tk
from test_shared_budgets import (
    HEADS,
    SHAPE,
    Aging,
    Oracle,
    Recomputed,
    Scored,
    check_pages,
    kept_sets,
    make_cache,
    score_of,
)
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.base import RetentionPolicy
from trimkv_kernels.testing import Tokens

CASES = [
    (Aging(), tk.GlobalTopK()),
    (Recomputed(), tk.GlobalTopK(5)),
    (Aging(), tk.AdaptiveHeads(0.3)),
    (Recomputed(), tk.HeadTable(((8, 1), (0, 7)))),
    (Scored(2), tk.GlobalTopK()),
    (Scored(2), tk.AdaptiveHeads(0.0)),
]


@pytest.mark.parametrize(
    ("policy", "allocation"),
    [
        (Scored(2), tk.GlobalTopK(2)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_kept_sets(policy: RetentionPolicy, allocation: Allocation) -> None:
    """Steps of a padded batch, whose rows are cut at different times."""
    total = 22
    batch = Tokens.random(SHAPE, total, (0, 5))
    cache = make_cache(policy, allocation, batch_size=2, budget=5, buffer=4, impl="triton")
    oracles = []
    for row in range(2):
        alone = batch.without_padding(row)
        has_ties = isinstance(policy, Scored)
        score = Scored.table(policy, batch, row) if has_ties else score_of(policy, alone)
        oracles.append(Oracle(score, allocation, 5, 4))
    for start in range(total):
        batch.feed(cache, start, start + 1)
        check_pages(cache)
        for row, oracle in enumerate(oracles):
            if batch.real[row, start]:
                oracle.call(1)
            assert kept_sets(cache, row) == oracle.kept, (start, row)
    keys = batch.inputs["key"]
    for row, head in ((0, 0), (1, HEADS - 1)):  # what was kept is what it says
        position = cache.positions(1)[row, head]
        held = cache.keys(1)[row, head][position >= 0]
        column = position[position >= 0].long() + (0, 5)[row]
        assert torch.equal(held, keys[1, row, head, column])
