"""SnapKV: worked examples, both variants written out in float64, and what must not matter."""

import itertools
import math

import pytest
import torch
from attention_cases import HEAD0, HEAD1, ragged_window, rows_of, window_slots, worked_window

from trimkv_kernels.policies import SlotView, make_policy
from trimkv_kernels.policies.snap_kv import SnapKV, pool_slots

pytestmark = pytest.mark.numeric


def softmax(logits: dict[int, float]) -> dict[int, float]:
    top = max(logits.values(), default=0.0)
    total = sum(math.exp(x - top) for x in logits.values())
    return {slot: math.exp(x - top) / total for slot, x in logits.items()}


def reduced(values: list[float], how: str) -> float:
    return max(values) if how == "max" else math.fsum(values) / len(values)


def written_out(view: SlotView, row: int, head: int, policy: SnapKV) -> list[float]:
    """Scores of the valid slots of one head, one number at a time."""
    n = int(view.valid[row, head].sum())
    position = view.position[row, head, :n].tolist()
    key = view.key[row, head, :n].double()
    window = [
        (view.queries[row, :, i].double().unflatten(0, (view.key.shape[1], -1))[head], p)
        for i, p in enumerate(view.query_position[row].tolist())
        if p >= 0
    ]
    past = [s for s in range(n) if position[s] < int(view.t[row]) - policy.window]
    if not n:
        return []

    def logits(query: torch.Tensor) -> list[float]:
        return [float(key[s] @ query) / math.sqrt(key.shape[1]) for s in range(n)]

    group = window[0][0].shape[0]
    if policy.variant == "prompt":
        heads = []
        for g in range(group):
            attention = [
                softmax({s: x for s, x in enumerate(logits(q[g])) if position[s] <= p})
                for q, p in window
            ]
            heads.append(
                [reduced([a[s] for a in attention if s in a] or [0.0], "mean") for s in range(n)]
            )
        importance = [reduced([h[s] for h in heads], policy.group) for s in range(n)]
    else:
        attention = []
        for q, _ in window:
            heads = [logits(q[g]) for g in range(group)]
            attention.append(
                softmax({s: reduced([h[s] for h in heads], policy.group) for s in past})
            )
        importance = [
            reduced([a[s] for a in attention], "mean") if s in past else math.inf for s in range(n)
        ]
    scores, half = list(importance), policy.kernel_size // 2
    for s in past:
        near = [importance[i] if i in past else 0.0 for i in range(s - half, s + half + 1)]
        scores[s] = reduced(near, "max" if policy.pooling == "max" else "mean")
    return scores


@pytest.mark.parametrize(
    ("kernel_size", "expected"),
    [(1, [0.225, 0.275, 0.15]), (3, [0.166667, 0.216667, 0.141667])],
)
def test_worked_example(kernel_size: int, expected: list[float]) -> None:
    """kvpress, with a window of 2, gives the window's slots a maximum + 1.

    Here slots 3 and 4 have means over the two queries and the one that see them:
    (.4 + .1 + .2 + .2) / 4 and (.3 + .2) / 2.
    """
    view = worked_window([HEAD0[-2:], HEAD1[-2:]])
    scores = SnapKV(window=2, kernel_size=kernel_size).score(view)[0, 0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([*expected, 0.225, 0.25]), atol=2e-6, rtol=0)


def test_pooling_pads_with_zeros_that_count() -> None:
    ones, everywhere = torch.ones(1, 1, 6), torch.ones(1, 1, 6, dtype=torch.bool)
    pooled = pool_slots(ones, everywhere, 5, pooling="avg")
    torch.testing.assert_close(pooled[0, 0], torch.tensor([0.6, 0.8, 1, 1, 0.8, 0.6]))


def test_neighbours_are_neighbours_in_position() -> None:
    """Slots in the order of their scores would give [.5 .15 .5 .1 .2] instead, as in R-KV's code.

    The sixth slot is the window's; it draws nothing.
    """
    view = worked_window([[[0.5, 0.1, 0.2, 0.05, 0.15, 0.0]]])
    scores = SnapKV(window=1, kernel_size=3, pooling="max").score(view)[0, 0, :5]
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.5, 0.2, 0.2, 0.15]), atol=1e-6, rtol=0)
    assert SnapKV().needs.chronological


@pytest.mark.parametrize(
    ("kernel_size", "expected", "kept"),
    [
        (1, [0.123696, 0.250869, 0.123696, 0.250869, 0.250869], [1, 3, 4, 5]),
        (3, [0.250869] * 5, [2, 3, 4, 5]),  # all tie
    ],
)
def test_worked_example_of_the_decoding_variant(
    kernel_size: int, expected: list[float], kept: list[int]
) -> None:
    key = torch.tensor([[1, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 1], [0.9, 0]])[None, None]
    position = torch.arange(6)[None, None]
    view = window_slots(
        key,
        torch.tensor([[[[1.0, 0]], [[0, 2]]]]),
        t=torch.tensor([6]),
        position=position,
        valid=position >= 0,
        query_position=torch.tensor([[5]]),
    )
    policy = SnapKV(
        window=1, kernel_size=kernel_size, pooling="max", group="max", variant="decoding"
    )
    scores = policy.score(view)[0, 0]
    expected = torch.tensor([*expected, math.inf])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    best = sorted(range(6), key=lambda slot: (round(scores[slot].item(), 6), slot))[-4:]
    assert sorted(best) == kept  # of equals, the newer


@pytest.mark.parametrize(
    ("variant", "pooling", "group"),
    itertools.product(("prompt", "decoding"), ("avg", "max"), ("mean", "max")),
)
@pytest.mark.parametrize(("window", "kernel_size"), [(6, 5), (1, 1)])
def test_formula_in_float64(
    variant: str, pooling: str, group: str, window: int, kernel_size: int
) -> None:
    """Slots with holes, rows with fewer queries than the window, heads that are empty, NaN."""
    view = ragged_window(window=window)
    policy = make_policy(
        "snap_kv",
        window=window,
        kernel_size=kernel_size,
        pooling=pooling,
        group=group,
        variant=variant,
    )
    scores = policy.score(view)
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    for row, head in itertools.product(range(3), range(3)):
        expected = torch.tensor(written_out(view, row, head, policy))
        actual = scores[row, head][view.valid[row, head]]
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["prompt", "decoding"])
def test_rows_and_empty_slots_do_not_matter(variant: str) -> None:
    policy, view = SnapKV(window=6, variant=variant), ragged_window(window=6)
    together = policy.score(view)
    for row in range(3):
        for num_slots in (40, 57):
            alone = policy.score(rows_of(view, slice(row, row + 1), num_slots=num_slots))
            valid = view.valid[row]
            torch.testing.assert_close(
                alone[0, :, :40][valid], together[row][valid], atol=1e-6, rtol=0
            )


def test_low_precision_is_scored_in_float32() -> None:
    view = ragged_window(window=6, dtype=torch.bfloat16)
    wide = window_slots(
        view.key.float(),
        view.queries.float(),
        t=view.t,
        position=view.position,
        valid=view.valid,
        query_position=view.query_position,
    )
    assert torch.equal(SnapKV(window=6).score(view), SnapKV(window=6).score(wide))


def test_needs() -> None:
    needs = SnapKV(window=9).needs
    assert (needs.score, needs.query_window) == (("key",), 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"pooling": "sum"}, "pooling must be one of avg, max, got 'sum'"),
        ({"group": "sum"}, "group must be one of mean, max, got 'sum'"),
        ({"variant": "chat"}, "variant must be one of prompt, decoding, got 'chat'"),
    ],
)
def test_refuses_what_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**options)
