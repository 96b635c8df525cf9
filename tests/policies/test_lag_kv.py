"""LagKV: worked examples, the authors' incremental procedure, and a plain float64 loop."""

import math

import pytest
import torch

from trimkv_kernels.policies import SlotView
from trimkv_kernels.policies.lag_kv import LagKV, partition_scores

pytestmark = pytest.mark.numeric

KEYS = torch.tensor(
    [[9.0, 9.0], [0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [0.0, 0.0], [1.0, 3.0], [4.0, 4.0]]
)
VALUES = torch.tensor(
    [[9.0, 9.0], [0.0, 0.0], [2.0, 0.0], [2.0, 4.0], [0.0, 0.0], [7.0, 7.0], [8.0, 8.0]]
)


class OneSink(LagKV):
    sinks = 1


def slots(
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> SlotView:
    shape = key.shape[:3]
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else valid
    position = torch.arange(shape[2]).expand(shape) if position is None else position
    t = position.amax(dim=(1, 2)) + 1
    given = {"key": key, "value": value}
    return SlotView("lag_kv", 0, t, position.int(), valid, given=given)


def random_slots(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
    )


def pair_scores(states: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """The formula for one partition and its reference, with Python numbers."""
    deviations = []
    for state in states.double():
        scaled = []
        for channel, x in enumerate(state.tolist()):
            column = reference[:, channel].double()
            low, high = column.min().item(), column.max().item()
            scaled.append((x - low) / (high - low) if high > low else 0.0)
        mean = math.fsum(scaled) / len(scaled)
        variance = math.fsum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1)
        deviations.append(math.sqrt(variance))
    total = math.fsum(math.exp(x) for x in deviations)
    return [math.exp(x) / total for x in deviations]


def test_worked_example_of_partition_scores() -> None:
    for states, expected in (
        (KEYS, [[0.5, 0.5], [0.280333, 0.719667]]),
        (VALUES, [[0.330238, 0.669762], [0.80443, 0.19557]]),
    ):
        actual = partition_scores(states[1:].unflatten(0, (3, 2)))
        torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)


def test_worked_example_of_scores() -> None:
    view = slots(KEYS[None, None], VALUES[None, None])
    expected = torch.tensor([[[1, 0, 0.5, 0.5, 0, 1, 1]]])
    torch.testing.assert_close(OneSink(partition=2).score(view), expected)
    crossed = torch.tensor([[[1, 0.415119, 0.584881, 0.542382, 0.457619, 1, 1]]])
    scores = OneSink(partition=2, cross_scoring=True).score(view)
    torch.testing.assert_close(scores, crossed, atol=1e-6, rtol=0)


def test_the_authors_incremental_procedure() -> None:
    """Fed one by one, ratio 0.5, one sink, partitions of 2: frozen tokens are never scored again.

    The cache scores all it holds at each eviction instead; the partition's formula is the same.
    """
    size, frozen, stored = 2, 1, []
    lengths, frozen_after = [], []
    for token in range(7):
        stored.append(token)
        if len(stored) >= frozen + 2 * size:
            window = stored[frozen : frozen + 2 * size]
            key, value = (
                partition_scores(x[window].unflatten(0, (2, size))) for x in (KEYS, VALUES)
            )
            best = (key + value)[0].topk(size // 2).indices.tolist()
            stored[frozen : frozen + size] = [window[i] for i in best]
            frozen += size // 2
        lengths.append(len(stored))
        frozen_after.append(frozen)
    assert lengths == [1, 2, 3, 4, 4, 5, 5]
    assert frozen_after == [1, 1, 1, 1, 2, 2, 3]
    assert sorted(stored) == [0, 2, 3, 5, 6]


@pytest.mark.parametrize("cross_scoring", [False, True])
def test_rows_and_heads_of_different_length(cross_scoring: bool) -> None:
    """Each head against a loop: its own sinks, its own number of slots, garbage where empty."""
    policy = LagKV(partition=5, cross_scoring=cross_scoring)
    key, value = random_slots(0, 2, 2, 37, 8)
    lengths = torch.tensor([[37, 20], [9, 0]])
    valid = torch.arange(37) < lengths[..., None]
    # heads have lost 0, 1, 2 or all 4 of their sinks
    position = torch.arange(37) + torch.tensor([[0, 1], [2, 4]])[..., None]
    key = key.masked_fill(~valid[..., None], math.nan)
    value = value.masked_fill(~valid[..., None], math.inf)
    scores = policy.score(slots(key, value, valid, position.masked_fill(~valid, -1)))
    for row in range(2):
        for head in range(2):
            length = int(lengths[row, head])
            first = int((position[row, head, :length] < 4).sum())
            expected = [1.0] * length
            for start in range(first, length - 9, 5):
                own, after = slice(start, start + 5), slice(start + 5, start + 10)
                parts = [pair_scores(x[row, head, own], x[row, head, after]) for x in (key, value)]
                raw = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
                ranks = [sum(y < x for y in raw) / 5 for x in raw]
                expected[own] = raw if cross_scoring else ranks
            actual = scores[row, head, :length]
            torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("size", [2, 5, 16])
def test_sinks_the_last_partition_and_the_remainder_are_kept(size: int) -> None:
    num_slots = 71
    key, value = random_slots(1, 1, 1, num_slots, 4)
    scores = LagKV(partition=size).score(slots(key, value))[0, 0]
    num_full = (num_slots - 4) // size
    always = torch.ones(num_slots, dtype=torch.bool)
    always[4 : 4 + (num_full - 1) * size] = False
    assert torch.equal(scores == 1, always)
    assert scores.max() == 1


def test_constant_channels_count_as_zero() -> None:
    key = torch.ones(1, 1, 12, 4)
    key[..., 0] = torch.arange(12)
    actual = partition_scores(key[0, 0].unflatten(0, (3, 4)))
    expected = [
        pair_scores(key[0, 0, :4], key[0, 0, 4:8]),
        pair_scores(key[0, 0, 4:8], key[0, 0, 8:]),
    ]
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)
    # nothing to compare at all: ties, so the newer of a partition ranks higher
    same = torch.ones(1, 1, 10, 4)
    scores = LagKV(partition=2).score(slots(same, same))
    assert torch.equal(scores, torch.tensor([[[1, 1, 1, 1, 0, 0.5, 0, 0.5, 1, 1]]]))


def test_batch_and_empty_slots_do_not_matter() -> None:
    key, value = random_slots(2, 2, 2, 40, 4)
    scores = LagKV(partition=6).score(slots(key, value))
    longer = [torch.cat((x, torch.zeros(2, 2, 11, 4)), dim=2) for x in (key, value)]
    valid = (torch.arange(51) < 40).expand(2, 2, 51)
    position = torch.arange(51).expand(2, 2, 51).masked_fill(~valid, -1)
    padded = LagKV(partition=6).score(slots(*longer, valid, position))
    assert torch.equal(padded[..., :40], scores)
    assert torch.equal(LagKV(partition=6).score(slots(key[1:], value[1:])), scores[1:])


def test_partition_must_hold_two_slots() -> None:
    with pytest.raises(ValueError, match="partition must be at least 2, got 1"):
        LagKV(partition=1)
