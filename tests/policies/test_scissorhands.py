"""Scissorhands: the worked example, and the ring of counters against a list of queries."""

from itertools import pairwise

import pytest
import torch
from attention_cases import HEAD0, attention_rows, seen, slots

from trimkv_kernels.policies import AttentionStat, make_policy
from trimkv_kernels.policies.scissorhands import Scissorhands

ROWS = attention_rows([*HEAD0, [0.3, 0.05, 0.2, 0.05, 0.1, 0.3]])


def low_queries(attention: torch.Tensor) -> torch.Tensor:
    """Which queries give a slot that they see less than 1 / n; ``[queries, slots]``."""
    query, slot = torch.meshgrid(*map(torch.arange, attention.shape), indexing="ij")
    return ((attention < 1 / (query + 1)) & (slot <= query)).float()


def random_low(num_queries: int) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.rand(num_queries, num_queries) < 0.5).float().tril()


def watch(policy: Scissorhands, low: torch.Tensor, ends: list[int]) -> dict[int, torch.Tensor]:
    """Scores ``[slots]`` after each of the calls that end before query ``ends[i]``."""
    counters = torch.zeros(1, 1, low.shape[1], policy.blocks)
    scores = {}
    for start, end in pairwise([0, *ends]):
        covered = low[max(start, end - policy.window) : end]
        policy.observe(
            seen(
                {"low": counters},
                covered.sum(0)[None, None],
                t=[end],
                num_queries=[len(covered)],
            )
        )
        scores[end] = policy.score(slots({"low": counters}, t=[end]))[0, 0]
    return scores


def test_worked_example() -> None:
    scores = watch(Scissorhands(window=3, blocks=3), low_queries(ROWS), list(range(1, 7)))[6]
    assert scores.dtype == torch.float32
    assert torch.equal(3 - scores, torch.tensor([0.0, 3, 1, 2, 1, 0]))
    assert scores.argsort(stable=True)[:2].tolist() == [1, 3]


@pytest.mark.parametrize("ends", [[1, 2, 3, 4], [4]])
def test_counts_where_others_average(ends: list[int]) -> None:
    """Cold-compress drops slot 2, the lowest mean of [.625 .2333 .2 .4]; three counts drop 1."""
    rows = attention_rows(HEAD0[:4])
    averages = rows.sum(0) / torch.arange(4, 0, -1)
    torch.testing.assert_close(averages, torch.tensor([0.625, 0.7 / 3, 0.2, 0.4]))
    scores = watch(Scissorhands(window=400, blocks=8), low_queries(rows), ends)[4]
    assert torch.equal(400 - scores, torch.tensor([0.0, 3, 2, 0]))


def test_needs() -> None:
    policy = make_policy("scissorhands")
    stat = AttentionStat(reduce="count_below", group="mean", queries=400)
    assert policy.needs.attention == stat
    assert policy.fields["low"].shape == (8,)
    assert Scissorhands(group="max").needs.attention.group == "max"


def test_one_counter_per_query_is_the_exact_window() -> None:
    low = random_low(40)
    scores = watch(Scissorhands(window=7, blocks=7), low, list(range(1, 41)))
    for t, actual in scores.items():
        assert torch.equal(actual, 7 - low[max(t - 7, 0) : t].sum(0))


def test_blocks_drop_whole() -> None:
    """Counters of 4 queries, 3 of them: the window starts at a multiple of 4, 9 to 12 long."""
    low = random_low(40)
    scores = watch(Scissorhands(window=12, blocks=3), low, list(range(1, 41)))
    for t, actual in scores.items():
        first = max((t - 1) // 4 - 2, 0) * 4
        assert t - first <= 12
        assert torch.equal(actual, 12 - low[first:t].sum(0))


def test_long_calls_spread_over_the_queries_that_saw_the_slot() -> None:
    low, window, size = random_low(70), 12, 4
    ends = [30, 31, 37, 38, 39, 40, 41, 55, 56, 70]
    scores = watch(Scissorhands(window=window, blocks=3), low, ends)
    spread = torch.zeros(70, 70)  # each query's share of its call's count
    for start, end in pairwise([0, *ends]):
        start = max(start, end - window)
        for slot in range(end):
            first = max(start, slot)
            spread[first:end, slot] = low[start:end, slot].sum() / (end - first)
    for t, actual in scores.items():
        first = max((t - 1) // size - 2, 0) * size
        torch.testing.assert_close(actual, window - spread[first:t].sum(0), atol=1e-5, rtol=0)
        assert actual.min() >= 0
        assert actual.max() <= window


def test_rows_have_clocks_of_their_own() -> None:
    """A batch of rows at different t, one of them with no token in the call, one empty."""
    torch.manual_seed(0)
    policy = Scissorhands(window=8, blocks=4)
    before, attention = torch.rand(4, 2, 5, 4), torch.rand(4, 2, 5)
    position = torch.stack([torch.randperm(11)[:5] for _ in range(8)]).view(4, 2, 5)
    t, num_queries = [11, 30, 23, 0], [3, 8, 0, 0]
    attention[2:] = 0
    together = before.clone()
    policy.observe(
        seen({"low": together}, attention, t=t, num_queries=num_queries, position=position)
    )
    for row in range(4):
        alone = before[row : row + 1].clone()
        view = seen(
            {"low": alone},
            attention[row : row + 1],
            t=t[row : row + 1],
            num_queries=num_queries[row : row + 1],
            position=position[row : row + 1],
        )
        policy.observe(view)
        assert torch.equal(together[row], alone[0])
    assert torch.equal(together[2:], before[2:])
    assert not torch.equal(together[:2], before[:2])
    assert together.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 10, "blocks": 4}, "blocks must divide window=10, got 4"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"group": "sum"}, "group must be one of mean, max, got 'sum'"),
    ],
)
def test_refuses_what_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scissorhands(**options)


def test_refuses_a_fraction() -> None:
    with pytest.raises(TypeError, match="window must be an integer, got 0.5"):
        Scissorhands(window=0.5)
