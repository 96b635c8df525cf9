"""PyramidKV: the authors' budgets to the integer, ours to the budget, SnapKV's scores."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from attention_cases import ragged_window

from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.allocation import Pyramid, pyramid_budgets
from trimkv_kernels.policies.pyramid_kv import PyramidKV
from trimkv_kernels.policies.snap_kv import SnapKV


@pytest.mark.parametrize(
    ("prompt_length", "expected"),
    [
        (None, (500, 338, 176, 14)),
        (4096, (500, 338, 176, 14)),
        (560, (496, 336, 176, 16)),  # the first layer cannot have more than there is
        (400, (256,) * 4),
        (300, (236,) * 4),  # nothing is cut
    ],
)
def test_budgets_of_the_authors(prompt_length: int | None, expected: tuple[int, ...]) -> None:
    assert pyramid_budgets(320, 4, beta=20, window=64, prompt_length=prompt_length) == expected


def test_budgets_of_the_authors_in_a_deep_model() -> None:
    budgets = pyramid_budgets(1024, 36, beta=20, window=32, prompt_length=4096)
    assert (budgets[:2], budgets[-1], sum(budgets)) == ((1935, 1882), 80, 36270)
    assert {a - b for a, b in pairwise(budgets)} == {53}


def test_kvpress_rounds_each_layer() -> None:
    """kvpress has 8192 slots per layer, window inside, and fractions until the end.

    Given 8192 outside the window ours are within one slot of its numbers. At a mean of 256 it falls
    back to uniform, as the last layer would be smaller than its window of 64; ours never is.
    """
    theirs = (15974, 10786, 5598, 410)
    ours = [slots - 64 for slots in Pyramid(beta=20, window=64).budgets(8192 + 64, 4)]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1
    assert min(Pyramid(beta=20, window=64).budgets(256, 4)) >= 64


@pytest.mark.parametrize("num_layers", [2, 3, 4, 28, 36])
@pytest.mark.parametrize("budget", [1, 2, 3, 16, 33, 64, 100, 1024])
def test_budgets_are_a_line_with_the_mean_asked_for(budget: int, num_layers: int) -> None:
    budgets = Pyramid().budgets(budget, num_layers)
    assert sum(budgets) == budget * num_layers
    assert min(budgets) >= 1
    assert list(budgets) == sorted(budgets, reverse=True)
    window = max(min(32, budget // 2), 1)
    last = (budget - window) // 20
    first = 2 * (budget - window) - last
    for layer, slots in enumerate(budgets):
        line = window + first - Fraction(layer * (first - last), num_layers - 1)
        assert abs(slots - line) <= 1
    assert (budgets[0], budgets[-1]) == (window + first, window + last)


def test_one_layer_has_the_budget() -> None:
    assert Pyramid().budgets(100, 1) == (100,)


@pytest.mark.parametrize("variant", ["prompt", "decoding"])
def test_scores_are_those_of_snap_kv(variant: str) -> None:
    view = ragged_window(window=6)
    policy = make_policy("pyramid_kv", window=6, variant=variant, beta=10)
    assert torch.equal(policy.score(view), SnapKV(window=6, variant=variant).score(view))
    assert policy.needs == SnapKV(window=6).needs
    assert policy.name == "pyramid_kv"


def test_allocation_follows_the_options() -> None:
    assert PyramidKV().allocation == Pyramid(beta=20, window=32)
    assert PyramidKV(beta=10, window=8).allocation == Pyramid(beta=10, window=8)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="beta must be at least 1, got 0"):
        PyramidKV(beta=0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Pyramid(window=0)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        Pyramid().budgets(0, 4)
