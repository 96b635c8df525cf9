"""Tokens taken back leave no trace; rows that are copied, saved and loaded are the same."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimkv_kernels import BoundedKVCache
from trimkv_kernels.policies import example_policy, make_policy
from trimkv_kernels.testing import Tokens, example_shape

pytestmark = pytest.mark.numeric

SHAPE = example_shape()
# affine, recomputed, accumulated, observed, with a window, with moments
NAMES = (
    "random",
    "streaming_llm",
    "key_diff",
    "h2o",
    "scissorhands",
    "snap_kv",
    "expected_attention",
)


def make_cache(name: str, **changes: object) -> BoundedKVCache:
    options = {
        "num_layers": SHAPE.num_layers,
        "num_heads": SHAPE.num_heads,
        "num_kv_heads": SHAPE.num_kv_heads,
        "head_dim": SHAPE.head_dim,
        "batch_size": 3,
        "budget": 14,
        "buffer": 4,
        "sinks": 1,
        "recent": 2,
        "dtype": torch.float32,
        "device": "cpu",
        "impl": "torch",
        **changes,
    }
    return BoundedKVCache(example_policy(name, SHAPE).bind(SHAPE), **options)


def kept(cache: BoundedKVCache) -> list[list[int]]:
    return [
        sorted(p for p in head if p >= 0)
        for layer in range(cache.num_layers)
        for row in cache.positions(layer).tolist()
        for head in row
    ]


def spliced(tokens: Tokens, first: int, wrong: Tokens, count: int) -> Tokens:
    """``tokens`` with ``count`` wrong columns put in at ``first``."""

    def splice(right: Tensor, other: Tensor, dim: int) -> Tensor:
        head, tail = right.split([first, right.shape[dim] - first], dim=dim)
        return torch.cat((head, other.narrow(dim, first, count), tail), dim=dim)

    inputs = {name: splice(x, wrong.inputs[name], x.dim() - 2) for name, x in tokens.inputs.items()}
    return Tokens(splice(tokens.real, wrong.real, 1), inputs)


@pytest.mark.parametrize("padding", [(0, 0, 0), (6, 0, 2)], ids=["full", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_rejected_drafts_leave_no_trace(name: str, padding: tuple[int, ...]) -> None:
    tokens = Tokens.random(SHAPE, 50, padding)
    wrong = Tokens.random(SHAPE, 60, seed=7)
    plain, drafted = make_cache(name), make_cache(name)
    drafted.hold()
    start = 0
    # confirmed tokens of each call, and how many more were drafted in vain
    for accepted, rejected in ((20, 0), (3, 2), (1, 5), (5, 0), (1, 0), (4, 9), (6, 1), (10, 3)):
        outputs = plain_outputs = tokens.feed(plain, start, start + accepted)
        draft = spliced(tokens, start + accepted, wrong, rejected)
        outputs = draft.feed(drafted, start, start + accepted + rejected)
        real = tokens.real[:, None, start : start + accepted, None]
        torch.testing.assert_close(
            outputs[..., :accepted, :] * real, plain_outputs * real, atol=2e-6, rtol=1e-5
        )
        drafted.crop(rejected)
        start += accepted
        assert kept(plain) == kept(drafted)
        assert torch.equal(plain.t, drafted.t)
        assert plain.seen.item() == drafted.seen.item()
    assert plain.stats().evictions.min() > 0


def test_drafts_of_several_calls_see_each_other() -> None:
    """As a draft model's own: single steps, then some of them are taken back."""
    tokens, wrong = Tokens.random(SHAPE, 40), Tokens.random(SHAPE, 50, seed=7)
    plain, drafted = make_cache("random"), make_cache("random")
    for cache in (plain, drafted):
        tokens.feed(cache, 0, 20)
    drafted.hold()
    draft = spliced(tokens, 23, wrong, 3)
    outputs = torch.cat([draft.feed(drafted, i, i + 1) for i in range(20, 26)], dim=3)
    expected = tokens.feed(plain, 20, 23)
    torch.testing.assert_close(outputs[..., :3, :], expected, atol=2e-6, rtol=1e-5)
    drafted.crop(3)
    assert kept(plain) == kept(drafted)
    drafted.release()
    for cache in (plain, drafted):
        for i in range(23, 40):
            tokens.feed(cache, i, i + 1)
    assert kept(plain) == kept(drafted)


def test_crop_inside_the_buffer_is_exact() -> None:
    tokens, wrong = Tokens.random(SHAPE, 40), Tokens.random(SHAPE, 50, seed=7)
    for name in ("random", "key_norm", "loc_ret"):
        plain, cropped = make_cache(name), make_cache(name)
        for cache in (plain, cropped):
            tokens.feed(cache, 0, 20)  # 14 stay, 4 more fit
        draft = spliced(tokens, 21, wrong, 2)
        for i in range(20, 23):
            draft.feed(cropped, i, i + 1)
        cropped.crop(2)
        tokens.feed(plain, 20, 21)
        for i in range(21, 40):
            for cache in (plain, cropped):
                tokens.feed(cache, i, i + 1)
            assert kept(plain) == kept(cropped)
        for a, b in zip(
            plain.storages[0].fields.values(), cropped.storages[0].fields.values(), strict=True
        ):
            assert torch.equal(a, b)


def test_what_cannot_be_taken_back_raises_and_changes_nothing() -> None:
    tokens = Tokens.random(SHAPE, 40)
    cache = make_cache("random")
    tokens.feed(cache, 0, 20)
    with pytest.raises(
        ValueError, match=r"count must lie in \[0, 0\].*since the last eviction.*hold"
    ):
        cache.crop(1)
    for i in range(20, 23):
        tokens.feed(cache, i, i + 1)
    before = kept(cache)
    with pytest.raises(ValueError, match=r"count must lie in \[0, 3\], .* got 4"):
        cache.crop(4)
    tokens.feed(cache, 23, 24)  # evicts
    with pytest.raises(ValueError, match=r"\[0, 0\]"):
        cache.crop(1)
    assert cache.t.tolist() == [24] * 3
    assert before != kept(cache)
    for name in ("h2o", "snap_kv", "expected_attention"):
        observed = make_cache(name)
        tokens.feed(observed, 0, 5)
        with pytest.raises(ValueError, match=f"policy '{name}' has observed the last 2 tokens"):
            observed.crop(2)
    cache.hold()
    tokens.feed(cache, 24, 27)
    with pytest.raises(ValueError, match=r"drop must lie in \[0, 3\], the tokens that wait, got 4"):
        cache.crop(4)
    for method in (
        lambda: cache.reorder([0, 1, 2]),
        lambda: cache.select([0]),
        lambda: cache.fork(2),
    ):
        with pytest.raises(ValueError, match="must not meet unconfirmed tokens: call settle"):
            method()
    cache.crop(0)
    assert cache.t.tolist() == [27] * 3


@pytest.mark.parametrize("name", NAMES)
def test_forks_go_their_own_way(name: str) -> None:
    """Two rows a sequence from one prompt: as if each had been read alone."""
    tokens = Tokens.random(SHAPE, 40, (6, 0, 2))
    index = [0, 0, 1, 1, 2, 2]
    own = Tokens.random(SHAPE, 40, (0,) * 6, seed=3)
    both = tokens.rows(index)
    later = Tokens(
        both.real,
        {
            n: torch.cat((x[..., :25, :], own.inputs[n][..., 25:, :]), -2)
            for n, x in both.inputs.items()
        },
    )
    trunk, straight = make_cache(name), make_cache(name, batch_size=6)
    tokens.feed(trunk, 0, 25)
    fork = trunk.fork(2)
    later.feed(straight, 0, 25)
    for i in range(25, 40):
        later.feed(fork, i, i + 1)
        later.feed(straight, i, i + 1)
    assert kept(fork) == kept(straight)
    assert trunk.batch_size == 3
    assert trunk.t.tolist() == [19, 25, 23]
    untouched = make_cache(name)
    tokens.feed(untouched, 0, 25)
    assert kept(trunk) == kept(untouched)
    trunk.select([2, 0])
    assert trunk.t.tolist() == [23, 19]
    assert trunk.positions(0).shape[0] == 2


def test_saved_slots_refuse_another_kind_of_cache(tmp_path: Path) -> None:
    tokens = Tokens.random(SHAPE, 40)
    cache = make_cache("random")
    cache.pin([[(3, 5)], [], []])
    tokens.feed(cache, 0, 25)
    cache.save(tmp_path / "slots", model="a")
    assert [x.name for x in tmp_path.iterdir()] == ["slots"]
    for other, message in (
        (make_cache("random", budget=15), r"budgets must be \(15, 15\), got \(14, 14\)"),
        (make_cache("key_norm"), "policy must be key_norm-.*, got random-"),
        (
            make_cache("random", dtype=torch.float16),
            "dtype must be torch.float16, got torch.float32",
        ),
        (make_cache("random", batch_size=2), "batch_size must be 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path / "slots", model="a")
        assert other.seen.item() == 0
    with pytest.raises(ValueError, match="model must be b, got a"):
        make_cache("random").load(tmp_path / "slots", model="b")
    loaded = make_cache("random")
    loaded.load(tmp_path / "slots", model="a")
    assert loaded._state.pins.spans == [[(3, 5)], [], []]
    for i in range(25, 40):
        for each in (cache, loaded):
            tokens.feed(each, i, i + 1)
    assert kept(cache) == kept(loaded)


def test_seeded_policies_have_their_own_fingerprint() -> None:
    from trimkv_kernels.policies.base import policy_fingerprint

    prints = {policy_fingerprint(make_policy("random", seed=seed)) for seed in range(3)}
    assert len(prints) == 3
    assert policy_fingerprint(make_policy("random", seed=1)) in prints
    gates = [example_policy("trimkv", SHAPE) for _ in range(2)]
    with torch.no_grad():
        next(gates[1].gates.parameters()).add_(1)
    assert policy_fingerprint(gates[0]) != policy_fingerprint(gates[1])


def waiting(name: str = "random", **changes: object) -> tuple[BoundedKVCache, Tokens]:
    """A cache with five tokens in its slots, and three that wait."""
    tokens = Tokens.random(SHAPE, 40)
    cache = make_cache(name, **changes)
    tokens.feed(cache, 0, 5)
    cache.hold()
    tokens.feed(cache, 5, 8)
    return cache, tokens


def state(cache: BoundedKVCache) -> tuple[object, ...]:
    stats = cache.stats()
    return kept(cache), cache.t.tolist(), cache.seen.item(), stats.evictions.tolist()


def test_freeing_a_row_drops_its_waiting_tokens_and_no_others() -> None:
    cache, tokens = waiting()
    cache.reset(rows=[1])
    assert cache.t.tolist() == [8, 0, 8]
    assert cache.stats().evictions.eq(0).all()
    assert cache.stats().slots_used[:, 1].eq(0).all()
    cache.release()
    plain = make_cache("random")
    tokens.feed(plain, 0, 8)
    plain.reset(rows=[1])
    assert state(cache) == state(plain)
    for start, stop in ((8, 9), (9, 20), *((i, i + 1) for i in range(20, 40))):
        for each in (cache, plain):
            tokens.feed(each, start, stop)
    assert state(cache) == state(plain)


def test_a_reset_that_raises_changes_nothing() -> None:
    cache, _ = waiting()
    before = state(cache)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 3\), got 9 to 9"):
        cache.reset(rows=[9])
    assert state(cache) == before
    cache.settle(drop=1)  # the three still wait
    assert cache.t.tolist() == [7, 7, 7]


def test_reset_ends_holding() -> None:
    cache, tokens = waiting()
    cache.reset()
    assert not cache.is_holding
    tokens.feed(cache, 0, 5)
    assert cache.stats().slots_used.eq(5).all()


def test_waiting_tokens_were_not_evicted() -> None:
    cache, _ = waiting(strict=True)
    with pytest.raises(RuntimeError, match="never had to evict"):
        cache.stats()
    cache.strict = False
    assert cache.stats().evictions.eq(0).all()
    assert not cache.stats().budget_reached


def test_each_layer_may_have_a_scale_of_its_own_unless_tokens_wait() -> None:
    """Twice the query has the scores of twice the scale, to the bit."""
    tokens = Tokens.random(SHAPE, 24, (0, 0, 0))
    outputs: list[list[Tensor]] = [[], []]
    for other, found in enumerate(outputs):
        cache = make_cache("key_diff")
        for start, stop in ((0, 21), (21, 22), (22, 24)):
            for layer in range(cache.num_layers):
                query, key, value = (
                    tokens.inputs[name][layer][:, :, start:stop]
                    for name in ("query", "key", "value")
                )
                scale = 0.25 if other else 0.25 * 2**layer
                found.append(
                    cache.attend(layer, query * 2 ** (layer * other), key, value, scale=scale)
                )
            cache.evict()
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    cache.hold()
    cache.attend(0, query, key, value, scale=0.25)
    with pytest.raises(
        ValueError, match=r"scale must be .* while tokens wait, 0\.25, got 0\.5: call"
    ):
        cache.attend(1, query, key, value, scale=0.5)
    for layer in range(1, cache.num_layers):
        cache.attend(layer, query, key, value, scale=0.25)
    with pytest.raises(ValueError, match=r"scale must be .* got None"):
        cache.attend(0, query, key, value)
    assert cache.t.tolist() == [26] * 3


def test_save_refuses_waiting_tokens(tmp_path: Path) -> None:
    cache, _ = waiting()
    with pytest.raises(ValueError, match=r"save\(\) must not meet unconfirmed tokens: call settle"):
        cache.save(tmp_path / "slots")
    assert not any(tmp_path.iterdir())
    cache.settle(drop=3)  # they still wait
    assert cache.t.tolist() == [5, 5, 5]


def test_freeing_a_row_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host knows what a freed row holds, and what the others do."""
    tokens = Tokens.random(SHAPE, 40)
    cache = make_cache("random")
    tokens.feed(cache, 0, 10)
    cache.reset(rows=[0])
    counts = cache.storages[0].slots.num_valid
    monkeypatch.setattr(type(counts), "tolist", _no_read_back)
    tokens.feed(cache, 10, 20)


def _no_read_back(tensor: Tensor) -> list[object]:
    raise AssertionError("a tensor was read back")
