"""The engine-free cache against an oracle that holds every key and value."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from conftest import CACHE_IMPLS
from trimkv_kernels import (
    AttentionStat,
    BoundedKVCache,
    FieldSpec,
    Needs,
    RetentionPolicy,
    SlotView,
    TokenView,
)
from trimkv_kernels.cache.counts import Counts
from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.allocation import Allocation, GlobalTopK, PerLayer
from trimkv_kernels.policies.trigger import WhenFull

pytestmark = pytest.mark.numeric

LAYERS, BATCH, HEADS, KV_HEADS, DIM = 2, 3, 4, 2, 16


@dataclass(frozen=True)
class ValueScore(RetentionPolicy):
    """Not affine, with two fields: scores what it wrote at insertion."""

    needs = Needs(insert=("value",))
    fields = {"mass": FieldSpec(), "pair": FieldSpec(shape=(2,), fill=3.0)}  # noqa: RUF012
    sinks = 1
    recent = 2

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        return {"mass": tokens.value.float().sum(-1)}

    def score(self, slots: SlotView) -> Tensor:
        return slots.fields["mass"] + slots.fields["pair"].sum(-1) - 6.0


class AffineAndScored(RetentionPolicy):
    """A slope and an offset from the value, to age slots at different rates."""

    needs = Needs(insert=("value",))
    sinks = 0
    recent = 0

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        value = tokens.value.float()
        return -value[..., 0].abs(), value[..., 1]


POLICIES = {
    "affine": AffineAndScored(),
    "fields": ValueScore(),
    **{name: make_policy(name) for name in ("key_norm", "random", "streaming_llm")},
}


def make_cache(policy: RetentionPolicy, **changes: object) -> BoundedKVCache:
    options = {
        "num_layers": LAYERS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "batch_size": BATCH,
        "budget": 16,
        "buffer": 4,
        "sinks": 2,
        "recent": 3,
        "dtype": torch.float32,
        "device": "cpu",
        "impl": "torch",
        **changes,
    }
    return BoundedKVCache(policy, **options)


class Stream:
    """Random tokens for every layer, and the whole history of them."""

    def __init__(
        self,
        total: int,
        padding: tuple[int, ...] = (0, 0, 0),
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> Tensor:
            shape = (LAYERS, len(padding), heads, total, DIM)
            return torch.randn(shape, generator=generator).to(device)

        self.query, self.key, self.value = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
        self.real = (torch.arange(total) >= torch.tensor(padding)[:, None]).to(device)
        self.position = self.real.long().cumsum(1) - 1

    def call(
        self, cache: BoundedKVCache, start: int, stop: int, *, evict: bool = True
    ) -> list[Tensor]:
        real = self.real[:, start:stop]
        outputs = []
        for layer in range(LAYERS):
            q, k, v = (x[layer, :, :, start:stop] for x in (self.query, self.key, self.value))
            outputs.append(cache.attend(layer, q, k, v, valid=None if real.all() else real))
        if evict:
            cache.evict()
        return outputs

    def expected(self, layer: int, kept: Tensor, start: int, stop: int) -> Tensor:
        """Attention in float64 over the whole history, masked to ``kept`` and the call itself."""
        batch, new = self.real.shape[0], stop - start
        position = self.position[:, None, None, :start]
        held = (kept[:, :, :, None] == position) & self.real[:, None, None, :start]
        old = held.any(2)[:, :, None].expand(-1, -1, new, -1)
        own = torch.ones(new, new, dtype=torch.bool, device=kept.device).tril()
        own = own & self.real[:, None, None, start:stop]
        visible = torch.cat((old, own.expand(batch, KV_HEADS, -1, -1)), 3)
        q = self.query[layer, :, :, start:stop].double()
        k, v = (
            x[layer, :, :, :stop].double().repeat_interleave(HEADS // KV_HEADS, 1)
            for x in (self.key, self.value)
        )
        score = (q @ k.mT) * DIM**-0.5
        score = score.masked_fill(~visible.repeat_interleave(HEADS // KV_HEADS, 1), -torch.inf)
        return score.softmax(-1).nan_to_num() @ v


def splits(total: int, *calls: int) -> list[tuple[int, int]]:
    edges = list(itertools.accumulate((0, *calls)))
    edges += range(edges[-1] + 1, total + 1)
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("impl", CACHE_IMPLS)
@pytest.mark.parametrize("padding", [(0, 0, 0), (9, 0, 4)], ids=["full", "padded"])
@pytest.mark.parametrize("name", POLICIES)
def test_attention_covers_exactly_the_kept_slots(
    name: str, padding: tuple[int, ...], impl: str, device: str
) -> None:
    total = 60 if impl == "torch" else 44  # the interpreter is slow
    stream = Stream(total, padding, device=device)
    cache = make_cache(POLICIES[name], impl=impl, device=device)
    # a prompt, single steps, a later turn over filled slots, single steps again
    calls = splits(total, 12, 1, 1, 1, 1, 1, 1, 1, 17)
    for start, stop in calls:
        kept = [cache.positions(layer) for layer in range(LAYERS)]
        for layer, output in enumerate(stream.call(cache, start, stop)):
            real = stream.real[:, None, start:stop, None]
            expected = stream.expected(layer, kept[layer], start, stop)
            torch.testing.assert_close(
                output.double() * real, expected * real, atol=2e-6, rtol=2e-6
            )
        check_slots(cache, stream, stop)


def check_slots(cache: BoundedKVCache, stream: Stream, stop: int) -> None:
    """Every slot holds the pair its position names; sizes and protection hold."""
    seen = stream.real[:, :stop].sum(1)
    assert cache.t.tolist() == seen.tolist()
    assert cache.seen.item() == stop
    for layer in range(LAYERS):
        position = cache.positions(layer)
        used = (position >= 0).sum(-1)
        assert torch.equal(used.int(), cache.storages[0].slots.num_valid[layer])
        assert used.max() < cache.num_slots
        for row in range(BATCH):
            columns = stream.real[row].nonzero()[:, 0]
            for head in range(KV_HEADS):
                n = int(used[row, head])
                held = position[row, head, :n].long()
                assert held.unique().numel() == n
                assert position[row, head, n:].eq(-1).all()
                column = columns[held]
                for state, history in (
                    (cache.storages[0].slots.key, stream.key),
                    (cache.storages[0].slots.value, stream.value),
                ):
                    assert torch.equal(
                        state[layer, row, head, :n], history[layer, row, head, column]
                    )
                if seen[row] >= cache.num_slots:
                    must = {*range(cache.sinks), *range(int(seen[row]) - cache.recent, seen[row])}
                    assert must <= set(held.tolist()), "a protected token was evicted"


def reference_kept(
    policy: RetentionPolicy,
    stream: Stream,
    row: int,
    layer: int,
    head: int,
    calls: list[tuple[int, int]],
    cache: BoundedKVCache,
) -> list[int]:
    """The kept positions by the rule, one token at a time in Python floats."""
    kept: list[int] = []
    pad = int((~stream.real[row]).sum())
    for _, stop in calls:
        t = max(stop - pad, 0)
        kept = kept + list(range((kept[-1] + 1) if kept else 0, t))
        if len(kept) < cache.num_slots:
            continue
        value = stream.value[layer, row, head, pad:].float()

        def score(p: int, t: int = t, value: Tensor = value) -> tuple[float, int]:
            if p < cache.sinks or p >= t - cache.recent:
                return (float("inf"), p)
            slope, offset = -value[p, 0].abs(), value[p, 1]
            return (float(slope * (t - p) + offset), p)

        kept = sorted(sorted(kept, key=score)[-cache.budget :])
    return kept


@pytest.mark.parametrize("impl", CACHE_IMPLS)
def test_kept_sets_follow_the_rule(impl: str, device: str) -> None:
    stream = Stream(70, (7, 0, 2), seed=5, device=device)
    cache = make_cache(POLICIES["affine"], impl=impl, device=device)
    calls = splits(70, 30, 1, 1, 1, 9)
    for start, stop in calls:
        stream.call(cache, start, stop)
    for layer, row, head in itertools.product(range(LAYERS), range(BATCH), range(KV_HEADS)):
        got = sorted(p for p in cache.positions(layer)[row, head].tolist() if p >= 0)
        assert got == reference_kept(POLICIES["affine"], stream, row, layer, head, calls, cache)


@pytest.mark.parametrize("name", POLICIES)
def test_a_padded_row_keeps_what_it_keeps_alone(name: str) -> None:
    padded = Stream(50, (8, 0, 3))
    cache = make_cache(POLICIES[name])
    for start, stop in splits(50, 20):
        padded.call(cache, start, stop)
    for row, pad in enumerate((8, 0, 3)):
        alone = make_cache(POLICIES[name], batch_size=1)
        for start, stop in splits(50 - pad, 20 - pad):
            for layer in range(LAYERS):
                part = slice(pad + start, pad + stop)
                alone.attend(
                    layer,
                    *(
                        x[layer, row : row + 1, :, part]
                        for x in (padded.query, padded.key, padded.value)
                    ),
                )
            alone.evict()
        for layer in range(LAYERS):
            assert same_sets(cache.positions(layer)[row], alone.positions(layer)[0])


def same_sets(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.sort(-1).values, b.sort(-1).values)


def test_a_prompt_keeps_the_same_in_any_chunking_until_the_budget_is_reached() -> None:
    stream = Stream(19)
    caches = [make_cache(POLICIES["affine"]) for _ in range(3)]
    for cache, calls in zip(caches, [(19,), (10, 9), (1,) * 19], strict=True):
        for start, stop in splits(19, *calls):
            stream.call(cache, start, stop)
    for layer in range(LAYERS):
        assert torch.equal(caches[0].positions(layer), caches[1].positions(layer))
        assert torch.equal(caches[0].positions(layer), caches[2].positions(layer))


def test_eviction_waits_until_budget_plus_buffer() -> None:
    stream = Stream(30)
    cache = make_cache(POLICIES["affine"])
    used = []
    for start, stop in splits(30, 15):
        stream.call(cache, start, stop)
        used.append(int(cache.storages[0].slots.num_valid.max()))
    assert used == [15, 16, 17, 18, 19, 16, 17, 18, 19, 16, 17, 18, 19, 16, 17, 18]


def test_ties_keep_the_newer_token() -> None:
    class Flat(RetentionPolicy):
        def score(self, slots: SlotView) -> Tensor:
            return torch.zeros_like(slots.position, dtype=torch.float32)

    stream = Stream(40)
    for first in (1, 24):
        cache = make_cache(Flat(), sinks=0, recent=0)
        for start, stop in splits(40, first):
            stream.call(cache, start, stop)
        t = cache.t.max().item()
        for layer in range(LAYERS):
            held = cache.positions(layer)[0, 0]
            held = held[held >= 0].sort().values
            assert torch.equal(held, torch.arange(t - len(held), t, dtype=torch.int32))


def test_nan_scores_go_first_and_set_the_flag() -> None:
    class Nan(RetentionPolicy):
        def score(self, slots: SlotView) -> Tensor:
            score = slots.position.float()
            return score.masked_fill(slots.position % 2 == 1, torch.nan)

    stream = Stream(24)
    cache = make_cache(Nan(), budget=12, sinks=0, recent=0)
    for start, stop in splits(24, 16):
        stream.call(cache, start, stop)
    held = cache.positions(0)[0, 0, : cache.storages[0].slots.num_valid[0, 0, 0]].tolist()
    assert {p for p in held if p < 20} == set(range(0, 20, 2))
    assert cache.stats().nan_layers == [0, 1]


def test_protected_spans_stay() -> None:
    stream = Stream(60)
    for name in ("affine", "key_norm"):
        cache = make_cache(POLICIES[name], protect=[(5, 8), (20, 22)])
        for start, stop in splits(60, 12):
            stream.call(cache, start, stop)
        for layer in range(LAYERS):
            for row in cache.positions(layer).flatten(0, 1).tolist():
                assert {5, 6, 7, 20, 21} <= set(row)


def test_fields_move_with_their_slots_and_are_filled_anew() -> None:
    stream = Stream(60, (4, 0, 0))
    cache = make_cache(POLICIES["fields"])
    for start, stop in splits(60, 25):
        stream.call(cache, start, stop)
    for layer, row, head in itertools.product(range(LAYERS), range(BATCH), range(KV_HEADS)):
        n = int(cache.storages[0].slots.num_valid[layer, row, head])
        columns = stream.real[row].nonzero()[:, 0]
        column = columns[cache.storages[0].slots.position[layer, row, head, :n].long()]
        mass = stream.value[layer, row, head, column].sum(-1)
        torch.testing.assert_close(cache.storages[0].fields["mass"][layer, row, head, :n], mass)
        assert cache.storages[0].fields["pair"][layer, row, head, :n].eq(3.0).all()


def test_reset_frees_rows_for_other_sequences() -> None:
    stream = Stream(40)
    cache = make_cache(POLICIES["fields"])
    for start, stop in splits(40, 20):
        stream.call(cache, start, stop)
    before = [cache.positions(layer)[[0, 2]] for layer in range(LAYERS)]
    cache.reset(rows=[1])
    assert cache.t.tolist() == [40, 0, 40]
    for layer in range(LAYERS):
        assert cache.positions(layer)[1].eq(-1).all()
        assert torch.equal(cache.positions(layer)[[0, 2]], before[layer])
    again = Stream(30, seed=9)
    addresses = [x.data_ptr() for _, x in cache.storages[0].named_state()]
    for start, stop in splits(30, 8):
        again.call(cache, start, stop)
    fresh = make_cache(POLICIES["fields"])
    for start, stop in splits(30, 8):
        again.call(fresh, start, stop)
    for layer in range(LAYERS):
        assert same_sets(cache.positions(layer)[1], fresh.positions(layer)[1])
    cache.reset()
    assert cache.t.tolist() == [0, 0, 0]
    assert cache.seen.item() == 0
    assert [x.data_ptr() for _, x in cache.storages[0].named_state()] == addresses


def test_reorder_moves_whole_rows() -> None:
    stream = Stream(40, (6, 0, 2))
    cache, mirror = make_cache(POLICIES["fields"]), make_cache(POLICIES["fields"])
    for each in (cache, mirror):
        for start, stop in splits(30, 18):
            stream.call(each, start, stop)
    index = torch.tensor([2, 2, 0])
    cache.reorder(index)
    for layer in range(LAYERS):
        assert torch.equal(cache.positions(layer), mirror.positions(layer)[index])
    shuffled = Stream(40, (2, 2, 6))
    for name in ("query", "key", "value"):
        setattr(shuffled, name, getattr(stream, name)[:, index])
    for start, stop in ((i, i + 1) for i in range(30, 40)):
        ours, theirs = shuffled.call(cache, start, stop), stream.call(mirror, start, stop)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b[index], atol=1e-6, rtol=1e-6)


def test_stats_count_bytes_and_evictions() -> None:
    stream = Stream(40, (5, 0, 0))
    cache = make_cache(POLICIES["affine"])
    for start, stop in splits(40, 30):
        stream.call(cache, start, stop)
    stats = cache.stats()
    assert stats.tokens_seen == [35, 40, 40]
    assert torch.equal(stats.slots_used, cache.storages[0].slots.num_valid)
    assert stats.evictions[0, 1, 0].item() == 40 - int(cache.storages[0].slots.num_valid[0, 1, 0])
    slots = LAYERS * BATCH * KV_HEADS * cache.num_slots
    heads = LAYERS * BATCH * KV_HEADS
    assert stats.bytes_held == slots * (2 * DIM * 4 + 3 * 4) + heads * (4 + 4) + (
        BATCH * 4 + 8 + LAYERS * 4
    )
    assert stats.bytes_full == 115 * LAYERS * KV_HEADS * DIM * 2 * 4
    assert stats.budget_reached
    assert "115" not in str(stats)
    assert "40 tokens seen" in str(stats)


def test_strict_raises_where_nothing_was_evicted_or_a_score_was_nan() -> None:
    stream = Stream(40)
    cache = make_cache(POLICIES["affine"], strict=True)
    stream.call(cache, 0, 10)
    with pytest.raises(RuntimeError, match="never had to evict: 10 tokens seen.*= 20"):
        cache.stats()
    stream.call(cache, 10, 40)
    assert cache.stats().budget_reached
    cache.storages[0].slots.nan_seen[1] = 1
    with pytest.raises(RuntimeError, match=r"NaN scores in layers \[1\]"):
        cache.stats()


def test_full_raises_before_it_would_lose_a_token() -> None:
    stream = Stream(40)
    cache = make_cache(make_policy("full"), sinks=0, recent=0)
    stream.call(cache, 0, 16)
    before = cache.positions(0)
    with pytest.raises(ValueError, match="'full' never evicts.*budget=16.*needs 17"):
        stream.call(cache, 16, 17)
    assert torch.equal(cache.positions(0), before)
    assert cache.t.tolist() == [16, 16, 16]
    padded = make_cache(make_policy("full"), sinks=0, recent=0)
    Stream(20, (4, 4, 5)).call(padded, 0, 20)  # padding takes no room
    assert padded.t.tolist() == [16, 16, 15]


@pytest.mark.parametrize("allocation", [None, GlobalTopK()], ids=["dense", "pages"])
def test_a_step_on_full_heads_is_refused_where_evict_was_left_out(
    allocation: Allocation | None,
) -> None:
    stream = Stream(60)
    cache = make_cache(make_policy("key_norm"), allocation=allocation, sinks=0, recent=0)
    for position in range(20):  # the buffer may be filled without an eviction
        stream.call(cache, position, position + 1, evict=False)
    before = [x.clone() for x in cache.tensors()]
    for forget in (False, True):
        if forget:
            cache.forget_counts()
        with pytest.raises(ValueError, match=r"a head is full.*call evict\(\) after every step"):
            stream.call(cache, 20, 21)
        assert all(map(torch.equal, cache.tensors(), before))
    cache.hold()  # a draft waits outside the slots
    stream.call(cache, 20, 21)
    cache.settle(drop=1)
    cache.release()
    cache.evict()
    stream.call(cache, 20, 21)
    assert cache.t.tolist() == [21] * BATCH


def test_unknown_counts_leave_room_for_one_step_between_evictions() -> None:
    counts = Counts([16], WhenFull(4), 2, exact=[True])
    counts.forget()
    assert not counts.may_be_full
    counts.add(None, 1, chosen=False)
    assert counts.may_be_full
    counts.add([30, 30], 30, chosen=True)  # a longer call evicts as it stores
    assert not counts.may_be_full


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_on_the_torch_backend(dtype: torch.dtype) -> None:
    stream = Stream(40, (3, 0, 0))
    for name in ("query", "key", "value"):
        setattr(stream, name, getattr(stream, name).to(dtype))
    cache = make_cache(POLICIES["affine"], dtype=dtype)
    error = 4 * torch.finfo(dtype).eps
    for start, stop in splits(40, 20, 1, 1, 1, 1, 1, 8):
        kept = [cache.positions(layer) for layer in range(LAYERS)]
        for layer, output in enumerate(stream.call(cache, start, stop)):
            real = stream.real[:, None, start:stop, None]
            expected = stream.expected(layer, kept[layer], start, stop)
            assert output.dtype == dtype
            torch.testing.assert_close(
                output.double() * real, expected * real, atol=error, rtol=error
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget must be an int of at least 1, got 0"),
        ({"budget": 2.5}, "budget must be an int of at least 1, got 2.5"),
        ({"buffer": 0}, "buffer must be an int of at least 1, got 0"),
        ({"sinks": -1}, "sinks must be an int of at least 0, got -1"),
        ({"sinks": 10, "recent": 6}, "budget=16, but sinks=10, recent=6 and 0 positions"),
        ({"protect": [(4, 20)]}, "budget=16, but sinks=2, recent=3 and 16 positions of protect="),
        ({"protect": [(4, 4)]}, r"protect must hold \(start, stop\) .* got \(4, 4\)"),
        ({"num_layers": 0}, "num_layers must be an int of at least 1, got 0"),
        ({"dtype": torch.float64}, "dtype must be one of .*got torch.float64"),
        ({"impl": "cuda"}, "impl must be one of .*got 'cuda'"),
    ],
)
def test_bad_options(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(POLICIES["affine"], **changes)


def test_bad_policies() -> None:
    with pytest.raises(TypeError, match="policy must be a RetentionPolicy, got str"):
        make_cache("random")  # type: ignore[arg-type]

    class Greedy(RetentionPolicy):
        needs = Needs(insert=("key_nope",), query_window=4)

    with pytest.raises(ValueError, match="'Greedy' keeps something for each query head: pass num_"):
        make_cache(Greedy())
    with pytest.raises(ValueError, match="'Greedy' needs key_nope: pass key_nope= to attend"):
        Stream(30).call(make_cache(Greedy(), num_heads=HEADS), 0, 30)

    class Into(RetentionPolicy):
        needs = Needs(attention=AttentionStat(into="mass"))
        fields = {"mass": FieldSpec(shape=(2,))}  # noqa: RUF012

    with pytest.raises(ValueError, match="'Into': AttentionStat.into='mass'. must name a scalar"):
        make_cache(Into())

    class Wrong(RetentionPolicy):
        def score(self, slots: SlotView) -> Tensor:
            return slots.position.double()

    with pytest.raises(ValueError, match="'Wrong': score must return float32.*got torch.float64"):
        Stream(30).call(make_cache(Wrong()), 0, 30)

    class Extra(ValueScore):
        def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
            return {"masss": tokens.value.float().sum(-1)}

    with pytest.raises(ValueError, match=r"'Extra' wrote undeclared fields \['masss'\]"):
        Stream(30).call(make_cache(Extra()), 0, 30)

    class Narrow(RetentionPolicy):
        def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
            return torch.zeros(7), torch.zeros(1)

    with pytest.raises(ValueError, match=r"'Narrow': affine must broadcast to .*got \[7\]"):
        Stream(30).call(make_cache(Narrow()), 0, 30)


def test_bad_calls_change_nothing() -> None:
    cache = make_cache(POLICIES["affine"])
    q, kv = torch.randn(BATCH, HEADS, 2, DIM), torch.randn(BATCH, KV_HEADS, 2, DIM)
    bad = [
        ((5, q, kv, kv), {}, r"layer must be in \[0, 2\), got 5"),
        ((1, q, kv, kv), {}, "layers must be called in order: expected layer 0"),
        ((0, q[0], kv, kv), {}, "query must have shape .*got"),
        ((0, q[:, :3], kv, kv), {}, "query must have a multiple of 2 heads, got 3"),
        ((0, q, kv[:, :1], kv), {}, r"key must have shape \[3, 2, 2, 16\], got \[3, 1, 2, 16\]"),
        ((0, q, kv, kv[..., :8]), {}, r"value must have shape \[3, 2, 2, 16\], got"),
        ((0, q.half(), kv, kv), {}, "query must have dtype torch.float32, got torch.float16"),
        ((0, q, kv.to("meta"), kv), {}, "key must be on cpu, got meta"),
        ((0, q, kv, kv), {"valid": torch.ones(3, 1) > 0}, r"valid must have shape \[3, 2\], got"),
        ((0, q, kv, kv), {"valid": torch.ones(3, 2)}, "valid must have dtype torch.bool, got"),
        ((0, q, kv.clone().requires_grad_(), kv), {}, "must not require grad.*no_grad"),
        ((0, q, kv, kv), {"hidden_states": torch.ones(3, 5, 8)}, r"hidden_states must have shape"),
    ]
    for args, kwargs, message in bad:
        with pytest.raises(ValueError, match=message):
            cache.attend(*args, **kwargs)
    assert cache.t.tolist() == [0, 0, 0]
    assert cache.seen.item() == 0
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 3\), got 0 to 3"):
        cache.reset(rows=[0, 3])
    with pytest.raises(ValueError, match="index must have 3 entries, got 2"):
        cache.reorder([0, 1])
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got 2"):
        cache.positions(2)


def test_a_missing_need_names_policy_and_argument() -> None:
    class Reader(RetentionPolicy):
        needs = Needs(insert=("hidden_states",))

    cache = make_cache(Reader())
    with pytest.raises(ValueError, match="'Reader' needs hidden_states: pass hidden_states="):
        Stream(4).call(cache, 0, 4)
    assert cache.t.tolist() == [0, 0, 0]


@pytest.mark.parametrize("impl", CACHE_IMPLS)
def test_each_layer_has_its_own_budget(impl: str, device: str) -> None:
    stream = Stream(60, (9, 0, 4), device=device)
    cache = make_cache(POLICIES["fields"], allocation=PerLayer((24, 8)), impl=impl, device=device)
    for start, stop in splits(60, 30, 1, 1, 1, 1, 7):
        kept = [cache.positions(layer) for layer in range(LAYERS)]
        assert [x.shape[2] for x in kept] == [28, 12]
        for layer, output in enumerate(stream.call(cache, start, stop)):
            real = stream.real[:, None, start:stop, None]
            expected = stream.expected(layer, kept[layer], start, stop)
            torch.testing.assert_close(output * real, (expected * real).float())
    used = cache.stats().slots_used.amax((1, 2)).tolist()
    assert 24 <= used[0] < 28
    assert 8 <= used[1] < 12
    # a layer keeps what it keeps under a uniform budget of its own
    uniform = make_cache(POLICIES["fields"], budget=8, impl=impl, device=device)
    for start, stop in splits(60, 30, 1, 1, 1, 1, 7):
        stream.call(uniform, start, stop)
    assert same_sets(cache.positions(1), uniform.positions(1))


def test_bad_allocations() -> None:
    policy = POLICIES["affine"]
    with pytest.raises(ValueError, match="table must have one budget for each of 2 layers, got 3"):
        make_cache(policy, allocation=PerLayer((8, 8, 8)))
    with pytest.raises(ValueError, match="budget must exceed the protected slots: budget=5"):
        make_cache(policy, allocation=PerLayer((8, 5)))
    with pytest.raises(ValueError, match="table must hold budgets of at least 1"):
        PerLayer((8, 0))


@pytest.mark.parametrize("name", ["affine", "fields"])
def test_pinned_spans_of_single_rows_stay(name: str) -> None:
    stream = Stream(60, (9, 0, 4))
    spans = [[(4, 8)], [], [(10, 12), (20, 23)]]
    cache = make_cache(POLICIES[name])
    cache.pin(spans)
    for start, stop in splits(40, 25):
        stream.call(cache, start, stop)
    check_pins(cache, spans)
    cache.reorder([2, 2, 0])
    stream.real, stream.position = stream.real[[2, 2, 0]], stream.position[[2, 2, 0]]
    for start, stop in splits(60, 40)[1:]:
        stream.call(cache, start, stop)
    check_pins(cache, [spans[2], spans[2], spans[0]])
    cache.pin([[], [(2, 3)], []])  # the others are still there
    assert cache._state.pins.spans == [spans[2], [(2, 3), *spans[2]], spans[0]]
    cache.reset()
    free = Stream(60)
    for start, stop in splits(60, 25):
        free.call(cache, start, stop)
    with pytest.raises(AssertionError):
        check_pins(cache, spans)


def check_pins(cache: BoundedKVCache, spans: list[list[tuple[int, int]]]) -> None:
    for layer in range(LAYERS):
        for row, pins in enumerate(spans):
            for head in cache.positions(layer)[row].tolist():
                assert {p for span in pins for p in range(*span)} <= set(head)


def test_bad_pins_change_nothing() -> None:
    cache = make_cache(POLICIES["affine"])
    with pytest.raises(ValueError, match="spans must have one list for each of 3 rows, got 1"):
        cache.pin([[(1, 2)]])
    with pytest.raises(ValueError, match="budget must exceed .* and 12 positions of protect="):
        cache.pin([[], [(2, 14)], []])
    with pytest.raises(ValueError, match="spans must hold"):
        cache.pin([[], [(4, 4)], []])
    assert cache._state.pins.table is None


class FailsOnce(AffineAndScored):
    """Raises at its first token of one layer."""

    def __init__(self, layer: int) -> None:
        self.layer, self.failed = layer, False

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        if tokens.layer == self.layer and tokens.position.shape[1] == 1 and not self.failed:
            self.failed = True
            raise RuntimeError("no score")
        return super().affine(tokens)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_after_a_call_that_failed_the_next_says_reset(layer: int) -> None:
    stream = Stream(30)
    cache, fresh = make_cache(FailsOnce(layer)), make_cache(POLICIES["affine"])
    stream.call(cache, 0, 12)
    with pytest.raises(RuntimeError, match="no score"):
        stream.call(cache, 12, 13)
    with pytest.raises(ValueError, match=r"the call before did not finish.*reset\(\) the cache"):
        stream.call(cache, 13, 14)
    with pytest.raises(ValueError, match=r"evict\(\) must come between calls"):
        cache.evict()
    cache.reset()
    for each in (cache, fresh):
        stream.call(each, 0, 30)
    assert torch.equal(cache.positions(0), fresh.positions(0))
