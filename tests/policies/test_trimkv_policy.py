"""TRIM-KV in the cache: worked numbers and traces of trimkv 0.1.5, and the key-norm variant."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimkv_kernels import BoundedKVCache, ModelShape, Needs, RetentionPolicy, TokenView, TrimKV
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.policies.allocation import GlobalTopK, Uniform
from trimkv_kernels.policies.trimkv import retention_affine

TRACE_BETA = (0.999, 0.6, 0.95, 0.7, 0.9, 0.5, 0.99, 0.8)


@dataclass(frozen=True)
class FixedBetas(RetentionPolicy):
    """TRIM-KV whose gate is a table: beta of each position, the same in every head."""

    beta: tuple[float, ...]
    age_offset: int = 1
    lookahead: int = 1

    sinks = 0
    recent = 0

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        log_beta = torch.tensor(self.beta).log()[tokens.position.long().clamp(min=0)][:, None]
        return retention_affine(log_beta, age_offset=self.age_offset, lookahead=self.lookahead)


def make_cache(policy: RetentionPolicy, **options: object) -> BoundedKVCache:
    sizes = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 8, "batch_size": 1, "buffer": 1}
    return BoundedKVCache(
        policy, **{**sizes, "dtype": torch.float32, "device": "cpu", "impl": "torch", **options}
    )


def feed(cache: BoundedKVCache, new: int, valid: Tensor | None = None) -> list[int]:
    """One call of ``new`` tokens; what the first head of row 0 keeps then."""
    token = torch.zeros(cache.batch_size, 2, new, 8)
    cache.attend(0, token, token, token, valid=valid)
    cache.evict()
    kept = cache.positions(0)[0]
    assert torch.equal(kept[0].sort().values, kept[1].sort().values)
    return sorted(p for p in kept[0].tolist() if p >= 0)


@pytest.mark.parametrize(
    ("buffer", "lookahead", "trace"),
    [
        (1, 1, [[0, 1, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4], [0, 2, 6], [0, 2, 6]]),
        (1, 8, [[0, 1, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4], [0, 2, 6], [0, 2, 6]]),
        (2, 1, [[0, 1, 2], [0, 1, 2, 3], [0, 2, 4], [0, 2, 4, 5], [0, 2, 6], [0, 2, 6, 7]]),
    ],
)
def test_trace(buffer: int, lookahead: int, trace: list[list[int]]) -> None:
    cache = make_cache(FixedBetas(TRACE_BETA, lookahead=lookahead), budget=3, buffer=buffer)
    assert [feed(cache, new) for new in (3, 1, 1, 1, 1, 1)] == trace


@pytest.mark.parametrize(
    ("last", "options", "recent", "kept"),
    [
        (0.8, {}, 0, [0, 2, 3]),  # the newest token is not protected
        (0.8, {"age_offset": 0}, 0, [0, 3, 4]),
        (0.8, {"age_offset": -1}, 0, [0, 3, 4]),
        (0.01, {}, 0, [0, 2, 3]),
        (0.01, {}, 1, [0, 3, 4]),
    ],
)
def test_what_stays_of_five(
    last: float, options: dict[str, int], recent: int, kept: list[int]
) -> None:
    policy = FixedBetas((0.99, 0.5, 0.9, 0.95, last), **options)
    assert feed(make_cache(policy, budget=3, buffer=2, recent=recent), 5) == kept


def test_padding_is_never_kept() -> None:
    """A left-padded row of 3 tokens fits a budget of 4; trimkv 0.1.5 keeps a pad beside them."""
    cache = make_cache(FixedBetas((0.9,) * 5), budget=4)
    assert feed(cache, 5, torch.tensor([[False, False, True, True, True]])) == [0, 1, 2]


def test_two_slots_change_places_once() -> None:
    """beta .99 at 0 and .9 at 80 cross where the query after the newest stands at 88.44."""
    slope, offset = retention_affine(torch.tensor([0.99, 0.9]).log())
    t = torch.arange(81, 200)
    scores = slope[:, None] * (t - torch.tensor([[0], [80]])) + offset[:, None]
    first_wins = scores[0] > scores[1]
    assert torch.equal(first_wins, t + 1 > 88.44)
    slope, offset = slope.double(), offset.double()
    crossing = (offset[0] - offset[1] + 80 * slope[1]) / (slope[1] - slope[0])
    assert crossing.item() + 1 == pytest.approx(88.44, abs=5e-3)


SHAPE = ModelShape(
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    dtype=torch.float32,
    device=torch.device("cpu"),
    num_heads=4,
    hidden_size=12,
)


def view(hidden_states: Tensor, **given: Tensor) -> TokenView:
    batch, new = hidden_states.shape[:2]
    position = torch.arange(new, dtype=torch.int32).expand(batch, -1)
    return TokenView(
        policy="trimkv",
        layer=1,
        t=torch.full((batch,), new, dtype=torch.int32),
        position=position,
        valid=torch.ones(batch, new, dtype=torch.bool),
        given={"hidden_states": hidden_states, **given},
        num_kv_heads=2,
    )


class TestKeyNorm:
    @pytest.mark.parametrize("lookahead", [1, 4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_adds_the_log_of_the_norm(self, dtype: torch.dtype, lookahead: int) -> None:
        torch.manual_seed(0)
        gates = TrimKV.example(SHAPE).gates
        hidden_states, key = torch.randn(3, 5, 12), torch.randn(3, 2, 5, 8).to(dtype)
        slope, offset = TrimKV(gates, lookahead=lookahead, key_norm=True).affine(
            view(hidden_states, key=key)
        )
        plain_slope, plain_offset = TrimKV(gates, lookahead=lookahead).affine(view(hidden_states))
        assert torch.equal(slope, plain_slope)
        assert offset.dtype == torch.float32
        expected = plain_offset.double() + 0.5 * key.double().square().sum(-1).log()
        torch.testing.assert_close(offset.double(), expected, atol=1e-6, rtol=1e-6)

    def test_formula(self) -> None:
        torch.manual_seed(1)
        policy = TrimKV(TrimKV.example(SHAPE).gates, key_norm=True)
        hidden_states, key = torch.randn(1, 6, 12), torch.randn(1, 2, 6, 8)
        slope, offset = policy.affine(view(hidden_states, key=key))
        log_beta = policy.gates(1, hidden_states).double()
        age = 9 - torch.arange(6)
        expected = log_beta * (age + 1) + torch.linalg.vector_norm(key.double(), dim=-1).log()
        torch.testing.assert_close((slope * age + offset).double(), expected, atol=1e-5, rtol=1e-6)

    def test_zero_key_is_finite(self) -> None:
        policy = TrimKV(TrimKV.example(SHAPE).gates, key_norm=True)
        offset = policy.affine(view(torch.zeros(1, 2, 12), key=torch.zeros(1, 2, 2, 8)))[1]
        plain = TrimKV(policy.gates).affine(view(torch.zeros(1, 2, 12)))[1]
        torch.testing.assert_close(offset - plain, torch.full((1, 2, 2), -27.631021))

    def test_needs_the_key_only_then(self) -> None:
        gates = TrimKV.example(SHAPE).gates
        assert TrimKV(gates).needs == Needs(insert=("hidden_states",))
        assert set(TrimKV(gates, key_norm=True).needs.insert) == {"hidden_states", "key"}

    def test_the_cache_keeps_by_it(self) -> None:
        torch.manual_seed(2)
        policy = TrimKV.example(SHAPE)
        for gate in policy.gates.layers:
            torch.nn.init.constant_(gate.bias, 4.0)  # so slow that norms count
        normed = TrimKV(policy.gates, key_norm=True)
        hidden_states, key = torch.randn(1, 20, 12), torch.randn(1, 2, 20, 8)
        key *= torch.rand(1, 2, 20, 1) * 10 + 0.1
        age = 20 - torch.arange(20)
        kept = {}
        for name, scored in (("plain", policy), ("normed", normed)):
            cache = make_cache(scored, num_layers=2, budget=6)
            for layer in range(2):
                cache.attend(layer, key, key, key, hidden_states=hidden_states)
            cache.evict()
            kept[name] = cache.positions(1)[0].sort(-1).values[:, -6:].tolist()
        scores = policy.gates(1, hidden_states)[0].double() * (age + 1)
        scores += key[0].double().square().sum(-1).sqrt().log()
        expected = scores.topk(6).indices.sort(-1).values.tolist()
        assert kept["normed"] == expected
        assert kept["plain"] != expected

    def test_from_pretrained_takes_the_option(self, tmp_path: Path) -> None:
        policy = TrimKV.example(SHAPE)
        policy.save_pretrained(tmp_path)
        loaded = TrimKV.from_pretrained(tmp_path, age_offset=-1, lookahead=3, key_norm=True)
        assert (loaded.age_offset, loaded.lookahead, loaded.key_norm) == (-1, 3, True)
        x = torch.randn(1, 3, 12)
        assert torch.equal(loaded.gates(0, x), policy.gates(0, x))


def gates_with(lookahead: int | None) -> RetentionGates:
    gates = TrimKV.example(SHAPE).gates
    gates.config = replace(gates.config, lookahead=lookahead)
    return gates


class TestLookahead:
    def test_the_gates_own_number_is_the_default(self, tmp_path: Path) -> None:
        TrimKV(gates_with(100)).save_pretrained(tmp_path)
        loaded = TrimKV.from_pretrained(tmp_path)
        assert (loaded.lookahead, loaded.bind(SHAPE).lookahead) == (100, 100)
        assert TrimKV.from_pretrained(tmp_path, lookahead=1).lookahead == 1
        assert TrimKV(gates_with(None)).lookahead == 1

    def test_it_is_summed_over(self) -> None:
        gates = gates_with(100)
        hidden_states = torch.randn(1, 5, 12)
        slope, offset = TrimKV(gates).affine(view(hidden_states))
        log_beta = gates(1, hidden_states).double()  # the layer of view()
        ages = torch.arange(1, 101, dtype=torch.float64) + 7 + 1
        expected = (log_beta[..., None] * ages).logsumexp(-1)  # of a slot of age 7
        torch.testing.assert_close((slope * 7 + offset).double(), expected, rtol=1e-5, atol=1e-5)

    def test_zero_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"lookahead .*must be an integer >= 1 .*got 0"):
            gates_with(0)


class TestExample:
    def test_is_the_same_each_time_and_leaves_the_generator_alone(self) -> None:
        state = torch.get_rng_state()
        x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
        first, second = (TrimKV.example(SHAPE).gates(1, x) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), state)
        assert first.std() > 0.01  # spread out, so that rounding does not decide

    def test_fits_what_it_was_made_for(self) -> None:
        assert TrimKV.example(SHAPE).bind(SHAPE).gates.config.hidden_size == 12

    def test_bind_moves_a_copy(self) -> None:
        low = ModelShape(
            num_layers=2,
            num_kv_heads=2,
            head_dim=8,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        policy = TrimKV(TrimKV.example(SHAPE).gates, lookahead=2, key_norm=True)
        bound = policy.bind(low)
        assert {p.dtype for p in bound.gates.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in policy.gates.parameters()} == {torch.float32}
        assert (bound.lookahead, bound.key_norm) == (2, True)
        assert bound.bind(low) is bound


@pytest.mark.parametrize(("kind", "shares"), [("rg", False), ("rg10", True)])
def test_gates_that_were_trained_to_share_a_budget_do(kind: str, shares: bool) -> None:
    folder = Path(__file__).parents[1] / "golden" / "trimkv-0.1.5" / kind / "gates"
    policy = TrimKV.from_pretrained(folder)
    assert policy.gates.config.shared_budget is shares
    assert policy.allocation == (GlobalTopK(0) if shares else Uniform())


def test_gates_bring_the_protection_that_they_were_trained_with(tmp_path: Path) -> None:
    config = GateConfig(
        kind="rg", hidden_size=16, intermediate_size=4, num_layers=1, num_kv_heads=2,
        sinks=4, recent=8,
    )  # fmt: skip
    policy = TrimKV(RetentionGates(config))
    policy.save_pretrained(tmp_path)
    loaded = TrimKV.from_pretrained(tmp_path)
    assert (loaded.sinks, loaded.recent) == (4, 8)
    cache = make_cache(loaded, budget=16)
    assert (cache.sinks, cache.recent) == (4, 8)
    cache = make_cache(loaded, budget=16, sinks=1, recent=0)
    assert (cache.sinks, cache.recent) == (1, 0)
    # ages count from the end of the protection: one step less than eight old is as if newer
    hidden = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    slopes = loaded.gates(0, hidden)
    tokens = TokenView(
        "trimkv", 0, torch.tensor([3]), torch.arange(3)[None], torch.ones(1, 3).bool(),
        given={"hidden_states": hidden},
    )  # fmt: skip
    slope, offset = loaded.affine(tokens)
    torch.testing.assert_close(slope, slopes)
    torch.testing.assert_close(offset, slopes * (1 - 8))


def test_protection_in_a_config_is_checked() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 4, "num_layers": 1, "num_kv_heads": 2}
    message = r"sinks must be an integer >= 0 or None, below 2\*\*31, got -1"
    with pytest.raises(ValueError, match=message):
        GateConfig(kind="rg", **sizes, sinks=-1)
    assert GateConfig(kind="rg", **sizes).to_dict()["recent"] is None
