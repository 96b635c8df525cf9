"""What the cache tells policies of attention and queries, against the whole history in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from conftest import CACHE_IMPLS
from trimkv_kernels import (
    AttentionStat,
    BoundedKVCache,
    FieldSpec,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
)

pytestmark = pytest.mark.numeric

LAYERS, BATCH, HEADS, KV_HEADS, DIM = 2, 3, 4, 2, 16
GROUP = HEADS // KV_HEADS
PADDING = (0, 5, 2)
CALLS = (17, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 9, 1, 1)


class History:
    """Random tokens, fed to a cache call by call, and all attention ever given, in float64."""

    def __init__(self, padding: tuple[int, ...] = PADDING, device: str = "cpu") -> None:
        self.total = sum(CALLS)
        generator = torch.Generator().manual_seed(3)

        def draw(heads: int) -> Tensor:
            shape = (LAYERS, len(padding), heads, self.total, DIM)
            return (2 * torch.randn(shape, generator=generator)).to(device)

        self.query, self.key, self.value = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
        self.nope = draw(HEADS)
        self.real = (torch.arange(self.total) >= torch.tensor(padding)[:, None]).to(device)
        self.position = self.real.long().cumsum(1) - 1

    def feed(self, cache: BoundedKVCache) -> Iterator[tuple[int, int, Tensor]]:
        """Make each call; yields its span and ``[layers, batch, heads, new, stop]`` attention."""
        for start, stop in pairwise(accumulate((0, *CALLS))):
            given = torch.stack([self.attention(cache, n, start, stop) for n in range(LAYERS)])
            part = slice(start, stop)
            real = self.real[:, part]
            for layer in range(LAYERS):
                cache.attend(
                    layer,
                    self.query[layer, :, :, part],
                    self.key[layer, :, :, part],
                    self.value[layer, :, :, part],
                    query_nope=self.nope[layer, :, :, part],
                    valid=None if real.all() else real,
                )
            yield start, stop, given
            cache.evict()

    def attention(self, cache: BoundedKVCache, layer: int, start: int, stop: int) -> Tensor:
        kept, new = cache.positions(layer), stop - start
        position = self.position[:, None, None, :start]
        old = ((kept[..., None] == position) & self.real[:, None, None, :start]).any(2)
        own = torch.ones(new, new, dtype=torch.bool, device=kept.device).tril()
        own = own & self.real[:, None, None, start:stop]
        visible = torch.cat(
            (old[:, :, None].expand(-1, -1, new, -1), own.expand(-1, KV_HEADS, -1, -1)), 3
        ).repeat_interleave(GROUP, 1)
        query = self.query[layer, :, :, start:stop].double()
        key = self.key[layer, :, :, :stop].double().repeat_interleave(GROUP, 1)
        score = (query @ key.mT * DIM**-0.5).masked_fill(~visible, -torch.inf)
        return score.softmax(-1).nan_to_num() * self.real[:, None, start:stop, None]

    def column(self, row: int, position: Tensor) -> Tensor:
        return self.real[row].nonzero()[:, 0][position.long()]


def make_cache(policy: RetentionPolicy, **changes: object) -> BoundedKVCache:
    options = {
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "batch_size": BATCH,
        "budget": 10,
        "buffer": 3,
        "sinks": 2,
        "recent": 1,
        "dtype": torch.float32,
        "device": "cpu",
        **changes,
    }
    return BoundedKVCache(policy, **options)


def value_score(slots: SlotView) -> Tensor:
    """Something spread, which decides what stays."""
    return slots.value.float().sum(-1)


class Summed(RetentionPolicy):
    """The kernel itself adds up attention."""

    fields = {"mass": FieldSpec(fill=0.5)}  # noqa: RUF012

    def __init__(self, stat: AttentionStat) -> None:
        self.needs = Needs(score=("value",), attention=stat)

    def score(self, slots: SlotView) -> Tensor:
        return value_score(slots)


@pytest.mark.parametrize("impl", CACHE_IMPLS)
@pytest.mark.parametrize("group", ["mean", "max"])
def test_attention_adds_up_in_the_field(group: str, impl: str, device: str) -> None:
    history = History(device=device)
    cache = make_cache(Summed(AttentionStat(group=group, into="mass")), impl=impl, device=device)
    shape = (LAYERS, BATCH, KV_HEADS, history.total)
    expected = torch.full(shape, 0.5, dtype=torch.float64, device=device)
    for _, stop, given in history.feed(cache):
        heads = given.sum(3).unflatten(2, (KV_HEADS, GROUP))
        expected[..., :stop] += heads.mean(3) if group == "mean" else heads.amax(3)
        check_field(cache, history, "mass", expected)


@pytest.mark.parametrize("queries", [1, 4])
def test_the_latest_attention_stands_in_the_field(queries: int) -> None:
    history = History()
    cache = make_cache(Summed(AttentionStat(queries=queries, into="mass")))
    for _, stop, given in history.feed(cache):
        heads = given[..., -queries:, :].sum(3).unflatten(2, (KV_HEADS, GROUP)).mean(3)
        expected = torch.nn.functional.pad(heads, (0, history.total - stop))
        check_field(cache, history, "mass", expected)


def check_field(
    cache: BoundedKVCache, history: History, name: str, expected: Tensor, atol: float = 2e-6
) -> None:
    """Compare a field of every filled slot with ``expected [layers, batch, heads, total, ...]``."""
    for layer in range(LAYERS):
        position = cache.positions(layer)
        for row in range(BATCH):
            for head in range(KV_HEADS):
                held = position[row, head][position[row, head] >= 0]
                got = cache.storages[0].fields[name][layer, row, head, : len(held)].double()
                want = expected[layer, row, head, history.column(row, held)]
                torch.testing.assert_close(got, want.double(), atol=atol, rtol=1e-5)


class Observer(RetentionPolicy):
    """Adds up what it is shown, and counts the queries."""

    def __init__(self, stat: AttentionStat) -> None:
        self.needs = Needs(score=("value",), attention=stat)
        per = "query_head" if stat.group == "none" else "kv_head"
        self.fields = {"total": FieldSpec(per=per), "queries": FieldSpec(dtype=torch.int32)}

    def observe(self, seen: ObservationView) -> None:
        seen.fields["total"].add_(seen.attention)
        seen.fields["queries"].add_(seen.num_queries[:, None, None])

    def score(self, slots: SlotView) -> Tensor:
        return value_score(slots)


@pytest.mark.parametrize(
    ("group", "reduce", "impl"),
    [
        ("mean", "sum", "torch"),
        ("none", "sum", "torch"),
        ("mean", "count_below", "torch"),
        ("none", "count_below", "triton"),
        pytest.param("mean", "count_below", "triton", marks=pytest.mark.slow),
    ],
)
def test_observed_attention(group: str, reduce: str, impl: str, device: str) -> None:
    history = History(device=device)
    stat = AttentionStat(reduce=reduce, group=group, queries=3)
    cache = make_cache(Observer(stat), impl=impl, device=device)
    total = torch.zeros(LAYERS, BATCH, KV_HEADS, history.total, dtype=torch.float64, device=device)
    if group == "none":
        total = total[..., None].repeat(1, 1, 1, 1, GROUP)
    for _, stop, given in history.feed(cache):
        heads = given[..., -3:, :].unflatten(2, (KV_HEADS, GROUP))
        heads = heads if group == "none" else heads.mean(3, keepdim=True)
        if reduce == "count_below":
            visible = heads > 0
            heads = ((heads < 1 / visible.sum(-1, keepdim=True)) & visible).double()
        stats = heads.sum(4).movedim(3, 4)  # [layers, batch, kv_heads, stop, group or 1]
        total[:, :, :, :stop] += stats if group == "none" else stats[..., 0]
        check_field(cache, history, "total", total)


def test_all_heads_see_one_mean() -> None:
    class Shared(Observer):
        def score(self, slots: SlotView) -> Tensor:
            return slots.fields["total"]  # the same in every head, so the slots stay aligned

    history = History()
    cache = make_cache(Shared(AttentionStat(group="all_heads")))
    total = torch.zeros(LAYERS, BATCH, KV_HEADS, history.total, dtype=torch.float64)
    for _, stop, given in history.feed(cache):
        total[..., :stop] += given.sum(3).mean(2, keepdim=True)
        check_field(cache, history, "total", total)
        for layer in range(LAYERS):
            position = cache.positions(layer)
            assert torch.equal(position, position[:, :1].expand_as(position))


def test_observation_counts_real_queries() -> None:
    history = History()
    cache = make_cache(Observer(AttentionStat(queries=5)))
    expected = torch.zeros(LAYERS, BATCH, KV_HEADS, history.total)
    for start, stop, _ in history.feed(cache):
        real = history.real[:, max(start, stop - 5) : stop].sum(1)
        expected[..., :stop] += real[:, None, None]
        check_field(cache, history, "queries", expected)


@dataclass
class Witness(RetentionPolicy):
    """Keeps copies of what it is given at scoring."""

    seen: list[SlotView] = field(default_factory=list)
    needs = Needs(score=("value",), query_window=5, query_moments=True, chronological=True)

    def score(self, slots: SlotView) -> Tensor:
        given = {name: tensor.clone() for name, tensor in slots.given.items()}
        fields = dict(slots.fields)
        self.seen.append(
            SlotView("", slots.layer, slots.t.clone(), slots.position.clone(), slots.valid.clone(),
                     fields, given, slots.budget)
        )  # fmt: skip
        return value_score(slots)


def test_queries_moments_and_order_at_scoring() -> None:
    history = History()
    policy = Witness()
    for _ in history.feed(make_cache(policy)):
        pass
    assert len(policy.seen) > 3 * LAYERS
    for view in policy.seen:
        assert view.budget == 10
        for row in range(BATCH):
            t = int(view.t[row])
            check_queries(history, view, row, t)
            for head in range(KV_HEADS):
                valid = view.valid[row, head]
                n = int(valid.sum())
                assert valid[:n].all()
                held = view.position[row, head, :n]
                assert (held.diff() > 0).all()
                want = history.value[view.layer, row, head, history.column(row, held)]
                assert torch.equal(view.value[row, head, :n], want)


def check_queries(history: History, view: SlotView, row: int, t: int) -> None:
    expected = torch.arange(max(t - 5, 0), t)
    position = view.query_position[row]
    assert torch.equal(position[position >= 0].sort().values, expected.int())
    for place, p in enumerate(position.tolist()):
        if p >= 0:
            column = history.column(row, torch.tensor(p))
            assert torch.equal(
                view.queries[row, :, place], history.query[view.layer, row, :, column]
            )
    if t > 2:  # all but the two sinks
        columns = history.column(row, torch.arange(2, t))
        queries = history.nope[view.layer, row][:, columns].double()
        mean = queries.mean(1)
        centred = queries - mean[:, None]
        torch.testing.assert_close(view.query_mean[row].double(), mean, atol=1e-6, rtol=1e-5)
        covariance = centred.mT @ centred / len(columns)
        torch.testing.assert_close(
            view.query_covariance[row].double(), covariance, atol=1e-5, rtol=1e-5
        )


def test_slot_order_means_nothing_to_a_chronological_policy() -> None:
    class Latest(RetentionPolicy):
        """Scores by place: only in chronological order does it keep the last."""

        needs = Needs(chronological=True)

        def score(self, slots: SlotView) -> Tensor:
            return torch.arange(slots.valid.shape[2]).float().expand(slots.valid.shape)

    history = History()
    cache = make_cache(Latest())
    for _ in history.feed(cache):
        pass
    for row in range(BATCH):
        t = int(cache.t[row])
        held = cache.positions(0)[row, 0]
        held = held[held >= 0].sort().values.tolist()
        assert held == [0, 1, *range(t - len(held) + 2, t)]


def test_reset_rows_forget_queries_and_moments() -> None:
    policy = Witness()
    history, cache = History((0, 0, 0)), make_cache(policy)
    for _ in history.feed(cache):
        pass
    cache.reset(rows=[0, 1, 2])
    policy.seen.clear()
    for _ in history.feed(cache):
        pass
    for view in policy.seen:
        for row in range(BATCH):
            check_queries(history, view, row, int(view.t[row]))


def test_undeclared_observation_names_the_need() -> None:
    class Curious(RetentionPolicy):
        needs = Needs(score=("value",))

        def score(self, slots: SlotView) -> Tensor:
            return slots.queries.sum(-1)

    with pytest.raises(AttributeError, match=r"'Curious' reads 'queries'.*add Needs\(query_window"):
        for _ in History().feed(make_cache(Curious())):
            pass


def test_recomputed_scores_run_only_when_eviction_is_due() -> None:
    policy = Witness()
    cache = make_cache(policy, budget=30, buffer=8)
    for _, stop, _ in History((0, 0, 0)).feed(cache):
        if stop < 38:
            assert not policy.seen
    assert len(policy.seen) == LAYERS
