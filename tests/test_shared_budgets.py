"""Heads that share a budget: pages, kept sets by a share-out in float64, attention, rows, files."""

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import trimkv_kernels as tk
from test_patch import batch, trimkv
from trimkv_kernels import BoundedKVCache, RetentionPolicy, SlotView, TokenView
from trimkv_kernels.checks import check_shared
from trimkv_kernels.integrations.discovery import find_parts
from trimkv_kernels.kernels.pages import PAGE
from trimkv_kernels.policies import example_policy, make_policy
from trimkv_kernels.policies.allocation import Allocation, Uniform
from trimkv_kernels.testing import Tokens, example_shape, masked_reference

SHAPE = example_shape()
LAYERS, HEADS = SHAPE.num_layers, SHAPE.num_kv_heads
TABLE = tk.HeadTable(((24, 2), (10, 12)))
ALLOCATIONS = {
    "global": tk.GlobalTopK(),
    "floor": tk.GlobalTopK(min_per_head=4),
    "adaptive": tk.AdaptiveHeads(0.2),
    "threshold": tk.Threshold(-9.0, min_per_head=1),
    "table": TABLE,
    "preference": tk.LayerPreference(4, tau_entropy=0.5, tau_variance=0.4, min_per_head=3),
}


@dataclass(frozen=True)
class Aging(RetentionPolicy):
    """Affine: every head forgets at rates of its own, so that heads end up with unequal shares."""

    sinks = 0
    recent = 0
    needs = tk.Needs(insert=("value",))

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        value = tokens.value.float()
        rate = torch.tensor([0.2, 2.0]) * (1 + tokens.layer)
        return -value[..., 0].abs() * rate[:, None], value[..., 1]


class Recomputed(RetentionPolicy):
    """Not affine, with a field and keys: as :class:`Aging`, but scored when it is due."""

    sinks = 0
    recent = 0
    needs = tk.Needs(insert=("value",), score=("key",))
    fields = {"rate": tk.FieldSpec()}  # noqa: RUF012

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        rate = torch.tensor([0.2, 2.0]) * (1 + tokens.layer)
        return {"rate": -tokens.value.float()[..., 0].abs() * rate[:, None]}

    def score(self, slots: SlotView) -> Tensor:
        age = slots.t[:, None, None] - slots.position
        return slots.fields["rate"] * age + 0.1 * slots.key.float().norm(dim=-1)


def make_cache(
    policy: RetentionPolicy, allocation: Allocation, **changes: object
) -> BoundedKVCache:
    options = {
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_dim": SHAPE.head_dim,
        "num_heads": SHAPE.num_heads,
        "batch_size": 3,
        "budget": 12,
        "buffer": 5,
        "dtype": torch.float32,
        "device": "cpu",
        "impl": "torch",
        **changes,
    }
    return BoundedKVCache(policy, allocation=allocation, **options)


def kept_sets(cache: BoundedKVCache, row: int) -> list[list[list[int]]]:
    """Positions by layer and head."""
    return [
        [sorted(p for p in head if p >= 0) for head in cache.positions(layer)[row].tolist()]
        for layer in range(cache.num_layers)
    ]


def check_pages(cache: BoundedKVCache) -> None:
    """Every page of a row has one place in the table, and heads have room until the next cut."""
    (storage,) = cache.storages
    pages, n = storage.pages, storage.pages.num_heads
    total = pages.page.shape[2]
    assert total == n * (cache.budget + cache.buffer + PAGE) // PAGE
    assert (pages.page.sort(dim=-1).values == torch.arange(total)).all()
    bounds = pages.first_page
    assert (bounds[..., 0] == 0).all()
    assert (bounds[..., -1] <= total).all()
    held = pages.num_valid(cache.t)
    assert (held >= 0).all()
    assert (held <= bounds.diff(dim=-1) * PAGE).all()
    assert (held.sum(-1) < n * (cache.budget + cache.buffer)).all()


class Oracle:
    """Lists of positions, cut by a share-out in float64 and Python: one row without padding."""

    def __init__(
        self,
        score,
        allocation: Allocation,
        budget: int,
        buffer: int,
        tokens: Tokens | None = None,
    ) -> None:
        self.score, self.allocation = score, allocation  # score(layer, head, position, t)
        self.budget, self.buffer, self.tokens = budget, buffer, tokens
        self.slots = [budget] * LAYERS  # of each layer's heads, by a layer preference
        self.kept = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
        self.t = 0

    def call(self, new: int) -> None:
        for head in itertools.chain(*self.kept):
            head.extend(range(self.t, self.t + new))
        self.t += new
        if isinstance(self.allocation, tk.AdaptiveHeads):
            scopes = [[(layer, head) for head in range(HEADS)] for layer in range(LAYERS)]
        else:
            scopes = [list(itertools.product(range(LAYERS), range(HEADS)))]
        for scope in scopes:
            held = sum(len(self.kept[layer][head]) for layer, head in scope)
            if held >= len(scope) * (self.budget + self.buffer):
                self._cut(scope, new)

    def _cut(self, scope: list[tuple[int, int]], new: int) -> None:
        if isinstance(self.allocation, tk.LayerPreference) and new > 1:
            self.slots = self.preferred()
        pairs = [
            (self.score(layer, head, p, self.t), p, (layer, head))
            for layer, head in scope
            for p in self.kept[layer][head]
        ]
        if isinstance(self.allocation, tk.LayerPreference):
            counts = {(layer, head): self.slots[layer] for layer, head in scope}
        else:
            counts = share_out(pairs, scope, self.allocation, self.budget)
        for layer, head in scope:
            own = sorted((pair for pair in pairs if pair[2] == (layer, head)), reverse=True)
            self.kept[layer][head] = sorted(p for _, p, _ in own[: counts[layer, head]])

    def preferred(self) -> list[int]:
        """CAKE's slots of each layer's heads, from the definitions."""
        rule = self.allocation
        wanted = []
        for layer in range(LAYERS):
            entropy = variance = 0.0
            for head in range(SHAPE.num_heads):
                held = sorted(self.kept[layer][head // (SHAPE.num_heads // HEADS)])
                rows = [self.attention(layer, head, self.t - i, held) for i in range(1, 5)]
                for place, position in enumerate(held):
                    if position < self.t - rule.window:
                        column = [row[place] for row in rows]
                        entropy -= sum(a * math.log(a) for a in column)
                        variance += statistics.variance(column)
            wanted.append(entropy ** (1 / rule.tau_entropy) * variance ** (1 / rule.tau_variance))
        exact = [x / sum(wanted) * LAYERS * (self.budget - rule.min_per_head) for x in wanted]
        assert all(1e-4 < x % 1 < 1 - 1e-4 for x in exact), "rounding must not decide"
        return [rule.min_per_head + math.floor(x) for x in exact]

    def attention(self, layer: int, head: int, at: int, held: list[int]) -> list[float]:
        """What a query gives to each of the held positions; 0 to later ones."""
        query = self.tokens.inputs["query"][layer, 0, head, at].double()
        keys = self.tokens.inputs["key"][layer, 0, head // (SHAPE.num_heads // HEADS), held]
        logits = (keys.double() @ query / SHAPE.head_dim**0.5).tolist()
        shares = [math.exp(x) * (p <= at) for x, p in zip(logits, held, strict=True)]
        return [x / sum(shares) for x in shares]


def share_out(
    pairs: list[tuple[float, int, tuple[int, int]]],
    scope: list[tuple[int, int]],
    allocation: Allocation,
    budget: int,
) -> dict[tuple[int, int], int]:
    """What each head keeps: higher scores first, the newer token, the lower layer, the lower head.

    Args:
        pairs: Score, position, and layer and head.
    """
    filled = {head: sum(pair[2] == head for pair in pairs) for head in scope}
    best = sorted(pairs, key=lambda pair: (-pair[0], -pair[1], pair[2]))
    if isinstance(allocation, tk.HeadTable):
        return {
            (layer, head): min(filled[layer, head], allocation.table[layer][head])
            for layer, head in scope
        }
    if isinstance(allocation, tk.Threshold):
        counts = {head: min(filled[head], allocation.min_per_head) for head in scope}
        seen = dict.fromkeys(scope, 0)
        for score, _, head in best:
            seen[head] += 1
            passes = score >= allocation.log_threshold and seen[head] > allocation.min_per_head
            if passes and sum(counts.values()) < len(scope) * budget:
                counts[head] += 1
        return counts
    least = allocation.min_per_head if isinstance(allocation, tk.GlobalTopK) else 0
    top = dict.fromkeys(scope, 0)
    for _, _, head in best[: len(scope) * (budget - least)]:
        top[head] += 1
    if isinstance(allocation, tk.AdaptiveHeads):
        exact = {h: (1 - allocation.floor) * c + allocation.floor * budget for h, c in top.items()}
        total = round(sum(exact.values()))
        top = {head: math.floor(x) for head, x in exact.items()}
        order = sorted(scope, key=lambda head: (-(exact[head] - top[head]), head))
        for head in order[: total - sum(top.values())]:
            top[head] += 1
    return {head: min(filled[head], count + least) for head, count in top.items()}


def score_of(policy: RetentionPolicy, tokens: Tokens):
    """A row's scores in float64, from the inputs."""
    value, key = tokens.inputs["value"][:, 0].double(), tokens.inputs["key"][:, 0].double()

    def score(layer: int, head: int, position: int, t: int) -> float:
        first, second = value[layer, head, position, :2].tolist()
        slope = -abs(first) * (0.2, 2.0)[head] * (1 + layer)
        if isinstance(policy, Recomputed):
            second = 0.1 * key[layer, head, position].norm().item()
        return slope * (t - position) + second

    return score


CALLS = {
    "steps": [1] * 60,
    "prompt": [40, *[1] * 20],
    "turns": [7, 1, 1, 23, *[1] * 7, 3, 2, *[1] * 6],
    "chunks": [13, 13, 13, 13, 1, 1],
}


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("policy", [Aging(), Recomputed()], ids=["affine", "recomputed"])
def test_kept_sets_are_those_of_the_oracle(policy: RetentionPolicy, name: str, calls: str) -> None:
    """In a padded batch: every row keeps what it would keep alone."""
    total, padding = sum(CALLS[calls]), (0, 9, 4)
    batch = Tokens.random(SHAPE, total, padding)
    cache = make_cache(policy, ALLOCATIONS[name])
    alone = [batch.without_padding(row) for row in range(3)]
    oracles = [Oracle(score_of(policy, x), ALLOCATIONS[name], 12, 5, x) for x in alone]
    start, shared = 0, False
    for new in CALLS[calls]:
        batch.feed(cache, start, start + new)
        check_pages(cache)
        for row, oracle in enumerate(oracles):
            real = int(batch.real[row, start : start + new].sum())
            if real:
                oracle.call(real)
            assert kept_sets(cache, row) == oracle.kept, (start, row)
            sizes = {len(head) for head in itertools.chain(*oracle.kept)}
            shared |= len(sizes) > 1
        start += new
    has_told = name != "preference" or calls != "steps"  # only calls of several tokens decide
    assert shared == has_told, "no head had more than another"


def test_1000_random_share_outs() -> None:
    """Random lengths, scores with ties, floors, rows of several scopes, against float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(250):
        budget, buffer = draw(2, 6), draw(1, 4)
        floor = draw(0, budget)
        choice = (
            tk.GlobalTopK(floor),
            tk.AdaptiveHeads(floor / budget),
            tk.Threshold(-1.0, floor),
            tk.HeadTable(
                tuple(tuple(draw(0, budget) for _ in range(HEADS)) for _ in range(LAYERS))
            ),
        )[draw(0, 3)]
        cache = make_cache(
            Scored(draw(1, 4)),
            choice,
            batch_size=4,
            budget=budget,
            buffer=buffer,
            sinks=0,
            recent=0,
        )
        total = draw(1, 3 * (budget + buffer))
        batch = Tokens.random(SHAPE, total, (0, draw(0, total - 1), 0, draw(0, total - 1)))
        oracles = [
            Oracle(Scored.table(cache.policy, batch, row), choice, budget, buffer)
            for row in range(4)
        ]
        start = 0
        while start < total:
            new = min(draw(1, 7), total - start)
            batch.feed(cache, start, start + new)
            check_pages(cache)
            for row, oracle in enumerate(oracles):
                real = int(batch.real[row, start : start + new].sum())
                if real:
                    oracle.call(real)
                assert kept_sets(cache, row) == oracle.kept, (choice, start, row)
            start += new


@dataclass(frozen=True)
class Scored(RetentionPolicy):
    """One of a few whole numbers for each token, so that many are equal."""

    levels: int = 3

    sinks = 0
    recent = 0
    needs = tk.Needs(insert=("value",))

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        score = (tokens.value.float()[..., 0] * self.levels).floor()
        return torch.zeros_like(score), score

    @staticmethod
    def table(policy: "Scored", batch: Tokens, row: int):
        value = batch.without_padding(row).inputs["value"][:, 0, :, :, 0]
        levels = (value * policy.levels).floor().tolist()
        return lambda layer, head, position, t: levels[layer][head][position]


@pytest.mark.parametrize("name", ["global", "adaptive"])
def test_protected_positions_stay_in_every_head(name: str) -> None:
    batch = Tokens.random(SHAPE, 60, (0, 9, 4))
    cache = make_cache(Aging(), ALLOCATIONS[name], sinks=2, recent=3, protect=[(5, 8)])
    batch.feed(cache, 0, 30)
    for start in range(30, 60):
        batch.feed(cache, start, start + 1)
        for row in range(3):
            t = int(cache.t[row])
            for head in itertools.chain(*kept_sets(cache, row)):
                assert {0, 1, 5, 6, 7, t - 3, t - 2, t - 1} <= set(head)
    with pytest.raises(ValueError, match="budget must exceed the protected slots: budget=12"):
        make_cache(Aging(), ALLOCATIONS[name], protect=[(0, 12)])
    with pytest.raises(ValueError, match="budget must exceed the protected slots: budget=2"):
        make_cache(Aging(), TABLE, sinks=2)


def test_equal_scores_keep_the_newer_token_then_the_lower_layer_and_head() -> None:
    cache = make_cache(Scored(0), tk.GlobalTopK(), batch_size=1, budget=2, buffer=3)
    Tokens.random(SHAPE, 5, (0,)).feed(cache, 0, 5)
    assert kept_sets(cache, 0) == [[[3, 4], [3, 4]], [[3, 4], [3, 4]]]
    cache = make_cache(Scored(0), tk.Threshold(-1.0, 1), batch_size=1, budget=2, buffer=3)
    Tokens.random(SHAPE, 5, (0,)).feed(cache, 0, 5)
    assert kept_sets(cache, 0) == [[[3, 4], [3, 4]], [[3, 4], [3, 4]]]


def test_nan_scores_lose_and_are_told() -> None:
    @dataclass(frozen=True)
    class Broken(Aging):
        def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
            slope, offset = super().affine(tokens)
            return slope, offset.masked_fill(tokens.position[:, None] < 4, math.nan)

    cache = make_cache(Broken(), tk.GlobalTopK())
    batch = Tokens.random(SHAPE, 20, (0, 0, 0))
    batch.feed(cache, 0, 10)
    assert cache.stats().nan_layers == []
    batch.feed(cache, 10, 20)
    assert cache.stats().nan_layers == [0, 1]
    assert all(min(head) >= 4 for head in itertools.chain(*kept_sets(cache, 0)) if head)


def prepared(policy: RetentionPolicy, allocation: Allocation, total: int) -> tuple:
    batch = Tokens.random(SHAPE, total, (0, 9, 4))
    cache = make_cache(policy, allocation)
    batch.feed(cache, 0, 25)
    for start in range(25, 40):
        batch.feed(cache, start, start + 1)
    return batch, cache


@pytest.mark.parametrize("policy", [Aging(), Recomputed()], ids=["affine", "recomputed"])
@pytest.mark.parametrize("name", ["floor", "adaptive", "table", "preference"])
class TestRows:
    def go_on(self, batch: Tokens, cache: BoundedKVCache) -> Tensor:
        outputs = [batch.feed(cache, start, start + 1) for start in range(40, 50)]
        return torch.cat([*outputs, batch.feed(cache, 50, 60)], dim=3)

    def test_save_load_fork_reorder(
        self, policy: RetentionPolicy, name: str, tmp_path: Path
    ) -> None:
        allocation = ALLOCATIONS[name]
        batch, cache = prepared(policy, allocation, 60)
        cache.save(tmp_path / "slots.safetensors")
        twin, loaded = cache.fork(2), make_cache(policy, allocation)
        loaded.load(tmp_path / "slots.safetensors")
        with pytest.raises(ValueError, match="storages|budgets"):
            make_cache(policy, Uniform()).load(tmp_path / "slots.safetensors")
        expected = self.go_on(batch, cache)
        assert torch.equal(self.go_on(batch, loaded), expected)
        rows = [0, 0, 1, 1, 2, 2]
        close = {"atol": 1e-5, "rtol": 0}  # rows of other lengths beside a row change its sums
        torch.testing.assert_close(self.go_on(batch.rows(rows), twin), expected[:, rows], **close)
        _, turned = prepared(policy, allocation, 60)
        turned.reorder([2, 0, 0])
        check_pages(turned)
        rows = [2, 0, 0]
        torch.testing.assert_close(self.go_on(batch.rows(rows), turned), expected[:, rows], **close)
        assert [kept_sets(turned, i) for i in range(3)] == [kept_sets(cache, i) for i in rows]

    def test_a_freed_row_starts_anew(self, policy: RetentionPolicy, name: str) -> None:
        _, cache = prepared(policy, ALLOCATIONS[name], 60)
        cache.reset([1])
        check_pages(cache)
        assert kept_sets(cache, 1) == [[[], []], [[], []]]
        fresh = make_cache(policy, ALLOCATIONS[name])
        other = Tokens.random(SHAPE, 60, (0, 0, 0), seed=3)
        outputs = [
            [other.feed(each, start, stop) for start, stop in ((0, 30), (30, 31), (31, 60))]
            for each in (cache, fresh)
        ]
        for got, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(got[:, 1], expected[:, 1], atol=1e-5, rtol=0)
        assert kept_sets(cache, 1) == kept_sets(fresh, 1)
        cache.reset()
        assert cache.is_empty
        other.feed(cache, 0, 60)
        fresh.reset()
        other.feed(fresh, 0, 60)
        assert [kept_sets(cache, i) for i in range(3)] == [kept_sets(fresh, i) for i in range(3)]

    def test_drafts_leave_no_trace(self, policy: RetentionPolicy, name: str) -> None:
        batch, cache = prepared(policy, ALLOCATIONS[name], 60)
        _, plain = prepared(policy, ALLOCATIONS[name], 60)
        cache.hold()
        for start in (40, 44, 48, 52):
            before = [kept_sets(cache, row) for row in range(3)]
            batch.feed(cache, start, start + 3)
            batch.feed(cache, start + 3, start + 6)
            assert [kept_sets(cache, row) for row in range(3)] == before
            cache.settle(drop=2)
            batch.feed(plain, start, start + 4)
            check_pages(cache)
            assert [kept_sets(cache, row) for row in range(3)] == [
                kept_sets(plain, row) for row in range(3)
            ]

    def test_a_failed_call_is_cleared(self, policy: RetentionPolicy, name: str) -> None:
        batch, cache = prepared(policy, ALLOCATIONS[name], 60)
        part = {key: x[0][..., 40:60, :] for key, x in batch.inputs.items()}
        cache.attend(0, **part)
        with pytest.raises(ValueError, match="did not finish"):
            cache.attend(0, **part)
        cache.reset()
        check_pages(cache)
        fresh = make_cache(policy, ALLOCATIONS[name])
        for each in (cache, fresh):
            batch.feed(each, 0, 40)
        assert [kept_sets(cache, i) for i in range(3)] == [kept_sets(fresh, i) for i in range(3)]


def test_tokens_can_be_taken_back_until_an_eviction() -> None:
    batch = Tokens.random(SHAPE, 60, (0, 0, 0))
    cache, plain = (make_cache(Aging(), tk.GlobalTopK()) for _ in range(2))
    for each in (cache, plain):
        batch.feed(each, 0, 12)
    batch.feed(cache, 12, 15)
    cache.crop(3)
    for each in (cache, plain):
        for start in range(12, 30):
            batch.feed(each, start, start + 1)
        assert each.stats().budget_reached
    assert [kept_sets(cache, i) for i in range(3)] == [kept_sets(plain, i) for i in range(3)]
    with pytest.raises(ValueError, match="the tokens since the last eviction"):
        cache.crop(20)


def test_stats_say_who_got_what() -> None:
    batch, cache = prepared(Aging(), tk.GlobalTopK(), 60)
    del batch
    stats = cache.stats()
    used = torch.tensor([[len(h) for h in layer] for layer in kept_sets(cache, 0)])
    assert torch.equal(stats.slots_used[:, 0].long(), used)
    assert (stats.evictions.sum(dim=(0, 2)) == 4 * cache.t - stats.slots_used.sum(dim=(0, 2))).all()
    pages = 4 * (12 + 5 + PAGE) // PAGE
    slot = 2 * 4 * SHAPE.head_dim + 12  # key, value; position, slope, offset
    tables = 4 * (pages + 5 + 4 + 1) + 4  # pages, bounds, kept, cut; the clock
    assert stats.bytes_held == 3 * (pages * PAGE * slot + tables) + 4 * 4 + 8
    assert "heads hold" in str(stats)


def test_long_run_without_drift() -> None:
    """Every pair that is held is the token it says; 1,000 steps, of which many evict."""
    batch = Tokens.random(SHAPE, 250, (0, 9, 4))
    cache = make_cache(Aging(), tk.GlobalTopK(1), buffer=3)
    for start in itertools.chain.from_iterable(itertools.repeat(range(250), 4)):
        batch.feed(cache, start, start + 1)
    check_pages(cache)
    assert cache.t.tolist() == [1000, 4 * 241, 4 * 246]
    for layer, row in itertools.product(range(LAYERS), range(3)):
        position = cache.positions(layer)[row]
        real = 250 - (0, 9, 4)[row]
        column = position % real + (0, 9, 4)[row]
        for head in range(HEADS):
            valid = position[head] >= 0
            expected = batch.inputs["key"][layer, row, head, column[head][valid].long()]
            assert torch.equal(cache.keys(layer)[row, head][valid], expected)


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(
    "policy", [Aging(), make_policy("snap_kv", window=4), make_policy("key_diff")]
)
def test_masked_reference(
    qwen3: Qwen3ForCausalLM,
    stock: Qwen3ForCausalLM,
    policy: RetentionPolicy,
    padding: int,
    name: str,
) -> None:
    """Logits are those of the full cache, masked to what is kept."""
    allocation = ALLOCATIONS[name]
    if name == "table":
        allocation = tk.HeadTable(((20, 4), (6, 12), (13, 9)))
    handle = tk.patch(
        qwen3, policy, budget=12, buffer=4, sinks=1, recent=1, allocation=allocation, impl="torch"
    )
    ids = torch.randint(3, 96, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache = handle.new_cache()
    got, expected = masked_reference(
        qwen3, stock, ids, calls=[30, *[1] * 12, 16, *[1] * 12], cache=cache, attention_mask=mask
    )
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    sizes = cache.stats().slots_used
    assert sizes.min() < sizes.max()


@pytest.mark.parametrize("allocation", [tk.GlobalTopK(2), tk.AdaptiveHeads()], ids=str)
@pytest.mark.parametrize("name", sorted(x for x in tk.available_policies() if x != "full"))
def test_masked_reference_of_every_policy(
    name: str, allocation: Allocation, qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    """Every registered policy in a padded batch, or the reason why its heads cannot share."""
    check_masked_reference(name, allocation, "torch", qwen3, stock)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trimkv", "snap_kv"])
def test_masked_reference_on_triton(
    name: str, qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    check_masked_reference(name, tk.GlobalTopK(2), "triton", qwen3, stock)


def check_masked_reference(
    name: str,
    allocation: Allocation,
    impl: str,
    qwen3: Qwen3ForCausalLM,
    stock: Qwen3ForCausalLM,
) -> None:
    policy = trimkv(qwen3) if name == "trimkv" else example_policy(name, find_parts(qwen3).shape())
    options = {"budget": 12, "buffer": 4, "sinks": 1, "recent": 1, "impl": impl}
    if policy.needs.attention is not None:
        with pytest.raises(ValueError, match="needs the attention that each pair receives"):
            tk.patch(qwen3, policy, **options, allocation=allocation)
        return
    cache = tk.patch(qwen3, policy, **options, allocation=allocation).new_cache()
    ids, mask = batch((7, 0), 60)
    calls = [25, *[1] * 8, 15, *[1] * 12]
    got, expected = masked_reference(
        qwen3, stock, ids, calls=calls, cache=cache, attention_mask=mask
    )
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert cache.stats().evictions.sum() >= 2 * 3 * 2 * 25


def test_full_budget_is_bit_identical(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, Aging(), budget=80, buffer=4, allocation=tk.GlobalTopK(), impl="torch")
    ids = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(1))
    ours, theirs = None, None
    with torch.no_grad():
        for part in ids.split([20, 1, 1, 15, *[1] * 23], dim=1):
            got = qwen3(part, past_key_values=ours, use_cache=True)
            expected = stock(part, past_key_values=theirs, use_cache=True)
            ours, theirs = got.past_key_values, expected.past_key_values
            assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 8}])
def test_generate_gives_each_row_what_it_gets_alone(
    qwen3: Qwen3ForCausalLM, options: dict[str, int]
) -> None:
    tk.patch(qwen3, Aging(), budget=12, buffer=4, allocation=tk.GlobalTopK(min_per_head=2))
    ids = torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :8], ids[1, :8] = 0, 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **options}
    together = qwen3.generate(ids, attention_mask=mask, **options)
    for row, skip in enumerate((0, 8)):
        alone = qwen3.generate(ids[row : row + 1, skip:], **options)
        assert torch.equal(together[row, skip:], alone[0])


def test_decode_loop_and_drafts_give_what_generate_gives(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, Aging(), budget=12, buffer=4, allocation=tk.GlobalTopK(min_per_head=2))
    ids = torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = qwen3.generate(ids, **options)[0, 30:]
    looped = list(tk.decode_loop(qwen3, ids, max_new_tokens=12, eos_token_id=()))
    assert torch.equal(torch.cat(looped), expected)
    cache = qwen3.model._trimkv_handle.new_cache()
    assert not cache.is_compileable
    qwen3.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert not cache.slots.is_holding
    assert cache.stats().budget_reached


def test_a_picture_says_who_got_what(qwen3: Qwen3ForCausalLM) -> None:
    pytest.importorskip("matplotlib")
    from trimkv_kernels import inspection

    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    trace = inspection.trace(
        qwen3, ids, Aging(), budget=12, buffer=4, allocation=tk.GlobalTopK(), impl="torch"
    )
    held = trace.kept(39).sum(dim=-1)
    assert held.min() < held.max()
    assert held.sum() <= 6 * 16
    titles = [axes.get_title() for axes in inspection.kept_figure(trace).axes]
    assert titles[0] == f"layer 0, head 0: {int(held[0, 0])} held"


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("h2o", {}, "policy 'h2o' needs the attention that each pair receives"),
        ("key_norm", {"allocation": tk.GlobalTopK(20)}, "at least min_per_head=20, got 16"),
        ("key_norm", {"allocation": TABLE}, "table must have 3 layers of 2 heads, got 2 of 2"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_changed(
    qwen3: Qwen3ForCausalLM, policy: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tk.patch(qwen3, policy, **{"budget": 16, "allocation": tk.GlobalTopK(), **options})
    tk.patch(qwen3, "key_norm")


def test_a_layer_preference_needs_queries() -> None:
    preference = ALLOCATIONS["preference"]
    with pytest.raises(ValueError, match=r"LayerPreference.* keeps queries of each head: pass num"):
        make_cache(Aging(), preference, num_heads=None)
    with pytest.raises(ValueError, match="budget must exceed the protected slots: budget=3"):
        make_cache(Aging(), preference, sinks=3)


def test_what_a_prompt_decided_holds_until_the_row_is_freed() -> None:
    batch, cache = prepared(Aging(), ALLOCATIONS["preference"], 60)
    table = cache.storages[0]._preferred.table
    assert (table[0, [0, 2]] != 12).any(dim=-1).all()
    before = table.clone()
    for start in range(40, 46):
        batch.feed(cache, start, start + 1)
    batch.real[1:, 46::2] = False  # beside padding, a token is a step
    evicted = cache.stats().evictions.sum(dim=(0, 2))
    for start in range(46, 60, 2):
        batch.feed(cache, start, start + 2)
    assert (cache.stats().evictions.sum(dim=(0, 2)) > evicted).all()
    assert torch.equal(table[:, 1:], before[:, 1:])
    assert not torch.equal(table[:, 0], before[:, 0])
    cache.reset([2])
    assert (table[0, 2] == 12).all()
    assert torch.equal(table[0, 1], before[0, 1])


def test_a_layer_preference_knows_the_scale_of_attention() -> None:
    """Queries of half the size, and twice the scale, decide alike."""
    batch, tables = Tokens.random(SHAPE, 40, (0, 0, 0)), []
    for size, scale in ((1.0, None), (0.5, 2 * SHAPE.head_dim**-0.5), (1.0, 0.01)):
        cache = make_cache(Aging(), ALLOCATIONS["preference"])
        for layer in range(LAYERS):
            query, key, value = (batch.inputs[x][layer] for x in ("query", "key", "value"))
            cache.attend(layer, query * size, key, value, scale=scale)
        tables.append(cache.storages[0]._preferred.table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_heads_of_other_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="this process has only some of the KV heads"):
        check_shared(Aging(), tk.GlobalTopK(), [torch.device("cpu")], is_sharded=True)
    check_shared(Aging(), Uniform(), [torch.device("cpu")], is_sharded=True)


def test_pages_in_any_order_mean_the_same() -> None:
    """As Triton leaves them: the torch path attends to the same, and goes on alike."""
    batch, cache = prepared(Aging(), tk.GlobalTopK(), 60)
    _, other = prepared(Aging(), tk.GlobalTopK(), 60)
    pages = other.storages[0].pages
    order = torch.randperm(pages.page.shape[2], generator=torch.Generator().manual_seed(0))
    place = order.argsort()[pages.page.long()]
    for tensor in pages.tensors().values():
        if tensor.shape[:3] == pages.position.shape:
            tensor.copy_(tensor.unflatten(2, (-1, PAGE))[:, :, order].flatten(2, 3))
    pages.page.copy_(place)
    check_pages(other)
    for start in range(40, 60):
        got, expected = (batch.feed(each, start, start + 1) for each in (other, cache))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert kept_sets(other, 0) == kept_sets(cache, 0)


def test_layers_on_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="the layers are on cpu, meta, and scores are not"):
        make_cache(Aging(), tk.GlobalTopK(), device=["cpu", "meta"])
