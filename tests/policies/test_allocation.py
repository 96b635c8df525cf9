"""Allocations that follow the scores: worked numbers, and counts by brute force."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from trimkv_kernels.policies.allocation import (
    AdaptiveHeads,
    Allocation,
    GlobalTopK,
    HeadTable,
    LayerPreference,
    PerLayer,
    Pyramid,
    Threshold,
    Uniform,
)

# two layers of two heads with three slots each, seen by the query after the newest
BETA = torch.tensor([[[0.9] * 3, [0.5] * 3], [[0.99, 0.3, 0.99], [0.7, 0.8, 0.6]]])
SCORES = (BETA.log() * torch.tensor([4, 3, 2]))[:, None]  # [layers, batch, heads, slots]
HALF = Threshold(math.log(0.5))


def kept_slots(scores: Tensor, counts: Tensor) -> list[list[int]]:
    """Slots of each head of row 0 that its count keeps."""
    heads, sizes = scores[:, 0].flatten(0, 1), counts[:, 0].flatten().tolist()
    return [
        sorted(head.topk(size).indices.tolist()) for head, size in zip(heads, sizes, strict=True)
    ]


class TestWorkedNumbers:
    def test_scores(self) -> None:
        expected = [
            [-0.4214, -0.3161, -0.2107],
            [-2.7726, -2.0794, -1.3863],
            [-0.0402, -3.6119, -0.0201],
            [-1.4267, -0.6694, -1.0217],
        ]
        torch.testing.assert_close(
            SCORES[:, 0].flatten(0, 1), torch.tensor(expected), atol=5e-5, rtol=0
        )

    @pytest.mark.parametrize(
        ("allocation", "kept"),
        [
            (GlobalTopK(), [[0, 1, 2], [2], [0, 2], [1, 2]]),
            (HALF, [[0, 1, 2], [], [0, 2], [1]]),
            (Threshold(math.log(0.5), min_per_head=1), [[0, 1, 2], [2], [0, 2], [1]]),
        ],
    )
    def test_kept_of_dbtrimkv(self, allocation: Allocation, kept: list[list[int]]) -> None:
        assert kept_slots(SCORES, allocation.counts(SCORES, 2)) == kept

    def test_min_per_head_comes_on_top(self) -> None:
        """As in the paged cache of trimkv; the flat one counts [3, 2, 2, 1] by mistake."""
        counts = GlobalTopK(min_per_head=1).counts(SCORES, 2)
        assert counts.flatten().tolist() == [3, 1, 3, 1]
        assert counts.shape == (2, 1, 2)
        assert counts.dtype == torch.int64

    def test_surplus_is_not_given_to_others(self) -> None:
        counts = GlobalTopK(min_per_head=2).counts(SCORES, 3)
        # hist of the top 4 is [2, 0, 2, 0], and two more each; a head has three slots
        assert counts.flatten().tolist() == [3, 2, 3, 2]

    @pytest.mark.parametrize(
        ("floor", "expected"),
        [(0.0, [5, 1]), (0.2, [5, 1]), (0.5, [4, 2]), (0.7, [4, 2]), (1.0, [3, 3])],
    )
    def test_adaptive_heads(self, floor: float, expected: list[int]) -> None:
        """kvpress, which protects each head's best instead of mixing, evicts just as many; the
        authors' code rounds ``[4.6, 1.4]`` of floor .2 to ``[4, 1]``, one less than the total."""
        scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.3, 0.2, 0.05, 0.04, 0.01]])
        counts = AdaptiveHeads(floor).counts(scores[None, None], 3)
        assert counts.flatten().tolist() == expected

    def test_adaptive_heads_keep_the_total(self) -> None:
        """Where the authors' rounding gives [2, 2] for [3, 3], and 399 for 8 heads of 50."""
        even = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
        assert AdaptiveHeads(0.2).counts(even[None, None], 3).flatten().tolist() == [3, 3]
        torch.manual_seed(0)
        for floor in (0.1, 0.2, 1 / 3, 0.5, 0.77):
            counts = AdaptiveHeads(floor).counts(torch.randn(3, 2, 8, 200), 50)
            assert (counts.sum(-1) == 400).all()
            assert (counts >= int(floor * 50)).all()

    def test_threshold_with_a_window(self) -> None:
        """DMS: what leaves the window of 2 stays if it scores -4."""
        scores = torch.tensor([-5.0, -1.0, -4.5, -3.0, -6.0])
        scores[-2:] = torch.inf
        scores = scores[None, None, None]
        counts = Threshold(-4.0).counts(scores, budget=3)
        assert kept_slots(scores, counts) == [[1, 3, 4]]

    def test_a_score_at_the_threshold_stays(self) -> None:
        scores = torch.tensor([-4.0, -4.5, -3.5])[None, None, None]
        assert Threshold(-4.0).counts(scores, budget=2).item() == 2

    def test_the_budget_caps_a_threshold(self) -> None:
        """Each head keeps its best, and the others compete for what the budget has left."""
        scores = torch.tensor([[3.0, 2.0, 1.0, 0.5], [0.2, 0.1, -5.0, -6.0]])[None, None]
        counts = [Threshold(0.0, least).counts(scores, 2).tolist() for least in (0, 1, 2)]
        assert counts == [[[[4, 0]]], [[[3, 1]]], [[[2, 2]]]]
        assert Threshold(0.0).counts(scores, 3).tolist() == [[[4, 2]]]

    def test_head_table(self) -> None:
        """HeadKV: counts are given; by importance half of the budget is shared out."""
        table = HeadTable(((3, 1), (0, 2)))
        assert table.counts(SCORES, 2).flatten().tolist() == [3, 1, 0, 2]
        assert HeadTable(((9, 1), (0, 0))).counts(SCORES, 3).flatten().tolist() == [3, 1, 0, 0]
        shared = HeadTable.from_importance([[3.0, 1.0], [0.0, 0.0]], 8)
        assert shared.table == ((16, 8), (4, 4))
        thirds = HeadTable.from_importance([[1.0, 1.0, 1.0]], 5, share=0.5)
        assert thirds.table == ((5, 5, 5),)


class TestLayerPreference:
    """CAKE: entropy and variance of what the last queries give to the tokens before them."""

    def of_equal_logits(self, heads: int, **options: float) -> float:
        """Two queries at 2 and 3, which see three and four keys alike; two are before them."""
        rule = LayerPreference(window=2, **options).preference
        position = torch.arange(4)[None, None]
        found = rule.of_layer(
            torch.ones(1, heads, 2, 8),
            torch.tensor([[3, 2]]),
            torch.zeros(1, 1, 4, 8),
            position,
            torch.ones_like(position, dtype=torch.bool),
            torch.tensor([4]),
        )
        assert found.dtype == torch.float64
        return found.item()

    def test_preference(self) -> None:
        """Each query gives a third, then a quarter, to each of two keys."""
        entropy = 2 / 3 * math.log(3) + 2 / 4 * math.log(4)  # 1.425555
        variance = 2 * (1 / 3 - 1 / 4) ** 2 / 2  # 1 / 144
        close = {"rel": 1e-5}  # attention is in float32
        assert self.of_equal_logits(1) == pytest.approx(0.00989969, **close)
        assert self.of_equal_logits(1) == pytest.approx(entropy * variance, **close)
        assert self.of_equal_logits(2) == pytest.approx(4 * entropy * variance, **close)
        milder = self.of_equal_logits(1, tau_entropy=2.0, tau_variance=0.5)
        assert milder == pytest.approx(entropy**0.5 * variance**2, **close)

    def test_slots(self) -> None:
        """Six slots of each head are shared out as 1 to 3, and two more are given to each."""
        rule = LayerPreference(min_per_head=2).preference

        def slots(*preference: float) -> list[int]:
            wanted = torch.tensor([preference], dtype=torch.float64)
            return rule.slots(wanted, budget=8, num_layers=len(preference))[0].tolist()

        assert slots(1, 3) == [5, 11]
        assert slots(0, 3) == [2, 14]
        assert slots(0, 0) == [8, 8]
        assert slots(0.1, 0.1, 0.1) == [8, 8, 8]
        assert slots(1, 1, 5) == [4, 4, 14]  # 18 sevenths, rounded down
        assert LayerPreference(window=32).preference.least(1024) == 32
        assert LayerPreference(window=32).preference.least(8) == 4

    def test_slots_only_fall_while_layers_come_in(self) -> None:
        """So that what is dropped layer by layer would be dropped in the end too."""
        generator = torch.Generator().manual_seed(0)
        wanted = torch.rand(200, 6, generator=generator, dtype=torch.float64) ** 4
        rule = LayerPreference(min_per_head=1).preference
        before = torch.empty(200, 0)
        for layers in range(1, 7):
            slots = rule.slots(wanted[:, :layers], budget=12, num_layers=6)
            assert (slots[:, : layers - 1] <= before[:, : layers - 1]).all()
            assert (slots.sum(dim=1) <= 6 * 12).all()
            before = slots
        assert (slots.sum(dim=1) > 6 * 12 - 6).all()

    def test_without_a_prompt_all_heads_have_the_same(self) -> None:
        assert LayerPreference().counts(SCORES, 2).tolist() == [[[2, 2]], [[2, 2]]]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"window": 1}, ValueError, "window must be at least 2, got 1"),
            ({"window": 2.5}, TypeError, "window must be an integer"),
            ({"tau_entropy": 0.0}, ValueError, "tau_entropy must be above 0 and finite, got 0.0"),
            ({"tau_variance": math.nan}, ValueError, "tau_variance must be above 0 and finite"),
            ({"min_per_head": 0}, ValueError, "min_per_head must be at least 1, got 0"),
        ],
    )
    def test_bad_options(self, options: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            LayerPreference(**options)
        with pytest.raises(ValueError, match="budget must be at least min_per_head=9, got 8"):
            LayerPreference(min_per_head=9).check(8, 2, 2)


class Simulation:
    """trimkv's paged cache on lists: heads of unequal length, cut together."""

    def __init__(self, beta: list[list[float]], buffer: int) -> None:
        self.log_beta = [[math.log(x) for x in head] for head in beta]
        self.kept: list[list[int]] = [[] for _ in beta]
        self.seen, self.buffer = 0, buffer

    def step(self, new: int) -> None:
        for head in self.kept:
            head.extend(range(self.seen, self.seen + new))
        self.seen += new

    def cut(self, allocation: Allocation, budget: int) -> None:
        scores = [
            [log_beta[p] * (self.seen + 1 - p) for p in kept]
            for log_beta, kept in zip(self.log_beta, self.kept, strict=True)
        ]
        slots = max(map(len, scores))
        padded = torch.tensor([head + [-math.inf] * (slots - len(head)) for head in scores])
        counts = allocation.counts(padded[None, None], budget).flatten().tolist()
        for head, (kept, count) in enumerate(zip(self.kept, counts, strict=True)):
            order = sorted(range(len(kept)), key=lambda slot: -scores[head][slot])
            self.kept[head] = sorted(kept[slot] for slot in order[:count])


def test_trace_of_a_shared_budget() -> None:
    """A head really empties."""
    sharp = [0.999, 0.6, 0.95, 0.7, 0.9, 0.5, 0.99, 0.8]
    cache = Simulation([sharp, [0.9] * 4 + [0.4] * 4], buffer=1)
    trace = []
    for new in (3, 1, 1, 1, 1, 1):
        cache.step(new)
        if sum(map(len, cache.kept)) >= 2 * (2 + cache.buffer):
            cache.cut(GlobalTopK(), budget=2)
        trace.append([list(head) for head in cache.kept])
    assert trace == [
        [[0, 2], [1, 2]],
        [[0, 2], [2, 3]],
        [[0, 2, 4], [3]],
        [[0, 2, 4], [3]],
        [[0, 2, 4, 6], []],
        [[0, 2, 6, 7], []],
    ]


class TestFixed:
    @pytest.mark.parametrize(
        ("allocation", "expected"),
        [(Uniform(), (4, 4, 4)), (PerLayer((1, 3, 8)), (1, 3, 8)), (Pyramid(window=2), None)],
    )
    def test_counts_are_the_budgets(
        self, allocation: Allocation, expected: tuple[int, ...] | None
    ) -> None:
        expected = expected or allocation.budgets(4, 3)
        counts = allocation.counts(torch.zeros(3, 2, 2, 20), 4)
        assert counts.dtype == torch.int64
        assert counts.tolist() == [[[budget] * 2] * 2 for budget in expected]

    def test_no_more_than_the_filled_slots(self) -> None:
        scores = torch.full((1, 1, 3, 5), -torch.inf)
        scores[..., 0, :2], scores[..., 1, :4] = 1.0, torch.nan
        scores[..., 2, :] = torch.inf
        assert Uniform().counts(scores, 4).tolist() == [[[2, 0, 4]]]

    def test_is_fixed(self) -> None:
        assert all(x.is_fixed for x in (Uniform(), PerLayer((1,)), Pyramid()))
        assert not any(x.is_fixed for x in (GlobalTopK(), AdaptiveHeads(), Threshold(0.0)))


class TestByBruteForce:
    """Random scores with empty, protected and NaN slots, two rows, against Python loops."""

    def make(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(3, 2, 4, 11, generator=generator)
        kind = torch.rand(scores.shape, generator=generator)
        scores = scores.masked_fill(kind < 0.2, -torch.inf)
        scores = scores.masked_fill(kind > 0.97, torch.nan)
        return scores.masked_fill((kind > 0.9) & (kind < 0.93), torch.inf)

    def entries(self, scores: Tensor, layers: list[int], row: int) -> list[tuple[float, int, int]]:
        """(score, layer, head) of the filled slots, best first."""
        found = [
            (value, layer, head)
            for layer in layers
            for head in range(4)
            for value in scores[layer, row, head].tolist()
            if value > -math.inf
        ]
        return sorted(found, key=lambda entry: -entry[0])

    @pytest.mark.parametrize("least", [0, 2])
    @pytest.mark.parametrize("budget", [2, 5, 11])
    def test_global_top_k(self, budget: int, least: int) -> None:
        scores = self.make(0)
        counts = GlobalTopK(least).counts(scores, budget)
        for row in range(2):
            best = self.entries(scores, [0, 1, 2], row)[: 12 * (budget - least)]
            for layer, head in itertools.product(range(3), range(4)):
                filled = int((scores[layer, row, head] > -math.inf).sum())
                own = sum((entry[1], entry[2]) == (layer, head) for entry in best)
                assert counts[layer, row, head] == min(own + least, filled)

    @pytest.mark.parametrize("budget", [1, 5, 11])
    def test_adaptive_heads_without_floor(self, budget: int) -> None:
        scores = self.make(1)
        counts = AdaptiveHeads(0.0).counts(scores, budget)
        for row, layer in itertools.product(range(2), range(3)):
            best = self.entries(scores, [layer], row)[: 4 * budget]
            own = [sum(entry[2] == head for entry in best) for head in range(4)]
            assert counts[layer, row].tolist() == own

    def test_ties_go_to_the_newer_token_then_to_the_lower_head(self) -> None:
        scores = torch.zeros(2, 1, 2, 3)
        assert GlobalTopK().counts(scores, 1).flatten().tolist() == [1, 1, 1, 1]
        assert GlobalTopK(1).counts(scores, 2).flatten().tolist() == [2, 2, 2, 2]
        assert AdaptiveHeads(0.0).counts(scores, 2).tolist() == [[[2, 2]], [[2, 2]]]
        position = torch.tensor([[[5, 1, 0], [2, 4, 3]], [[5, 4, 2], [1, 3, 0]]])[:, None]
        assert GlobalTopK().counts(scores, 1, position).flatten().tolist() == [1, 1, 2, 0]
        assert AdaptiveHeads(0.0).counts(scores, 1, position).tolist() == [[[1, 1]], [[2, 0]]]
        assert Threshold(0.0).counts(scores, 1, position).flatten().tolist() == [1, 1, 2, 0]

    def test_rows_are_independent(self) -> None:
        scores = self.make(2)
        for allocation in (GlobalTopK(1), AdaptiveHeads(), HALF, Uniform()):
            whole = allocation.counts(scores, 3)
            assert torch.equal(whole[:, 1:], allocation.counts(scores[:, 1:], 3))

    def test_a_larger_budget_takes_nothing_away(self) -> None:
        scores = self.make(3)
        for allocation in (GlobalTopK(), GlobalTopK(1), AdaptiveHeads(0.0)):
            counts = [allocation.counts(scores, budget) for budget in range(1, 12)]
            assert all((b >= a).all() for a, b in itertools.pairwise(counts))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GlobalTopK(-1), ValueError, "min_per_head must be at least 0, got -1"),
        (lambda: GlobalTopK(0.5), TypeError, "min_per_head must be an integer, got 0.5"),
        (lambda: GlobalTopK(3).counts(SCORES, 2), ValueError, "at least min_per_head=3, got 2"),
        (lambda: AdaptiveHeads(1.5), ValueError, r"floor must lie in \[0, 1\], got 1.5"),
        (lambda: Threshold(math.nan), ValueError, "log_threshold must be finite, got nan"),
        (lambda: Threshold(0.0, True), TypeError, "min_per_head must be an integer, got True"),
        (lambda: HALF.counts(SCORES, 0), ValueError, "budget must be at least 1, got 0"),
        (lambda: HALF.counts(SCORES[0], 2), ValueError, r"scores must be .*\[1, 2, 3\]"),
        (lambda: HALF.counts(SCORES.double(), 2), ValueError, "scores must be float32 .*float64"),
        (lambda: HALF.budgets(2, 2), NotImplementedError, "Threshold does not define budgets"),
        (lambda: HALF.counts(SCORES, 2, SCORES[0]), ValueError, "position must have the shape"),
        (lambda: HeadTable(((1, 2), (3,))), ValueError, "all of one length"),
        (lambda: HeadTable(((1, -2),)), ValueError, "table must be at least 0, got -2"),
        (lambda: HeadTable(((1, 0.5),)), TypeError, "table must be an integer, got 0.5"),
        (lambda: HeadTable(((1, 2),)).counts(SCORES, 2), ValueError, "2 layers of 2 heads"),
        (
            lambda: HeadTable(((4, 4), (1, 0))).counts(SCORES, 2),
            ValueError,
            "budget must be at least the mean of the table, 2.2 slots per head, got 2",
        ),
        (lambda: HeadTable.read("nowhere.json"), ValueError, "must hold a table of slots"),
        (lambda: HeadTable.from_importance([[0.0]], 2), ValueError, "not all 0"),
    ],
)
def test_bad_options(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
