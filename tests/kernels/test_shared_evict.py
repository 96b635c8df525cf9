"""The shared eviction in Triton against the share-out in float64."""

import itertools

import pytest
import torch

import trimkv_kernels as tk
from test_shared_budgets import (
    HEADS,
    LAYERS,
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
from trimkv_kernels import kernels
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.base import RetentionPolicy
from trimkv_kernels.testing import Tokens

STEPS = [1] * 22
TURNS = [7, 1, 1, 14, 1, 1, 1, 3, 2, 1]
CASES = [
    (Scored(2), tk.AdaptiveHeads(0.0), STEPS),
    (Scored(2), tk.Threshold(-1.0, 2), STEPS),
    (Aging(), tk.GlobalTopK(), TURNS),
    (Recomputed(), tk.AdaptiveHeads(0.3), TURNS),
    (Scored(2), tk.HeadTable(((8, 1), (0, 7))), TURNS),
    (Recomputed(), tk.GlobalTopK(5), [25, 1, 1, 12]),
]


@pytest.mark.parametrize(
    ("policy", "allocation", "calls"),
    [
        (Scored(2), tk.GlobalTopK(2), STEPS),
        (Recomputed(), tk.Threshold(-9.0, 1), [14, 1, 9]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_kept_sets(policy: RetentionPolicy, allocation: Allocation, calls: list[int]) -> None:
    """Calls of a padded batch, whose rows are cut at different times."""
    total = sum(calls)
    batch = Tokens.random(SHAPE, total, (0, 5))
    cache = make_cache(policy, allocation, batch_size=2, budget=5, buffer=4, impl="triton")
    oracles = []
    for row in range(2):
        alone = batch.without_padding(row)
        has_ties = isinstance(policy, Scored)
        score = Scored.table(policy, batch, row) if has_ties else score_of(policy, alone)
        oracles.append(Oracle(score, allocation, 5, 4))
    start = 0
    for new in calls:
        batch.feed(cache, start, start + new)
        check_pages(cache)
        for row, oracle in enumerate(oracles):
            real = int(batch.real[row, start : start + new].sum())
            if real:
                oracle.call(real)
            assert kept_sets(cache, row) == oracle.kept, (start, row)
        start += new
    for row, layer, head in itertools.product(range(2), range(LAYERS), range(HEADS)):
        position = cache.positions(layer)[row, head]  # what was kept is what it says
        column = position[position >= 0].long() + (0, 5)[row]
        for name, held in (("key", cache.keys(layer)), ("value", cache.values(layer))):
            expected = batch.inputs[name][layer, row, head, column]
            assert torch.equal(held[row, head][position >= 0], expected)


def test_errors_of_a_longer_call() -> None:
    pages = kernels.Pages.zeros(1, 1, 4, 8, 4, 16)
    t = torch.tensor([3], dtype=torch.int32)
    new, term = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3)
    given = {
        "new_key": [new],
        "new_value": [new],
        "new_position": torch.arange(3, dtype=torch.int32)[None],
        "pages": pages,
        "t": t,
        "stored": t - 3,
        "first_head": 2,
        "budget": 8,
        "buffer": 4,
        "new_slope": [term],
        "new_offset": [term],
    }
    for change, message in (
        ({"pages": kernels.Pages.zeros(2, 1, 4, 8, 4, 16)}, "pages must be of one scope, got 2"),
        ({"new_key": []}, "new_key must have the keys of at least one layer, got none"),
        ({"first_head": 3}, "first_head must be between 0 and 2, got 3"),
        ({"budget": 16}, "pages must have 9 pages of 16 slots"),
        ({"new_value": [new, new]}, "new_value must have 1 tensors, got 2"),
        ({"new_slope": ()}, "new_slope must have 1 tensors, got 0"),
        ({"new_offset": [term[..., :2]]}, r"new_offset\[0\] must have shape \[1, 2, 3\]"),
        ({"new_fields": [term]}, "new_fields must have 0 tensors, 0 for each layer, got 1"),
        ({"new_key": [new.mT.contiguous().mT]}, r"new_key\[0\] must have stride 1"),
        ({"new_scores": [term]}, "new_scores must have 0 tensors, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.fill_pages(**given | change)
    kernels.fill_pages(**given)
    assert pages.num_valid(t).tolist() == [[[3, 3, 3, 3]]]
    assert pages.position[0, 0, 2 * 16 : 2 * 16 + 3].tolist() == [0, 1, 2]
