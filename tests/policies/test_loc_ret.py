"""LocRet's retaining heads against their formula, and the authors' files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimkv_kernels import BoundedKVCache, ModelShape, RetentionPolicy, TokenView
from trimkv_kernels.policies.loc_ret import LocRet, LocRetConfig, LocRetGates

SHAPE = ModelShape(
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    dtype=torch.float32,
    device=torch.device("cpu"),
    num_heads=6,
)
CONFIG = LocRetConfig(num_layers=2, num_kv_heads=2, input_size=40, intermediate_size=7)


def make_gates() -> LocRetGates:
    torch.manual_seed(0)
    return LocRetGates(CONFIG)


def view(query: Tensor, key: Tensor, value: Tensor) -> TokenView:
    batch, _, new, _ = query.shape
    return TokenView(
        policy="loc_ret",
        layer=1,
        t=torch.full((batch,), new),
        position=torch.arange(new).expand(batch, -1),
        valid=torch.ones(batch, new, dtype=torch.bool),
        given={"query_nope": query, "key_nope": key, "value": value},
        num_kv_heads=key.shape[1],
    )


def test_formula() -> None:
    gates = make_gates()
    query, key, value = (torch.randn(3, heads, 5, 4) for heads in (6, 2, 2))
    slope, score = LocRet(gates).affine(view(query, key, value))
    assert score.dtype == torch.float32
    assert not slope.any()
    first, second = (x.double() for x in gates.layers[1].state_dict().values())
    for row in range(3):
        for token in range(5):
            parts = [x[row, :, token].double().reshape(-1) for x in (query, key, value)]
            inner = first @ torch.cat(parts)
            inner = inner / (1 + torch.exp(-inner))
            torch.testing.assert_close(
                score[row, :, token].double(), second @ inner, atol=1e-6, rtol=1e-6
            )


def test_what_it_needs_is_taken_before_rope() -> None:
    assert set(LocRet.needs.insert) == {"query_nope", "key_nope", "value"}


def test_bind_checks_the_width_where_the_heads_are_known() -> None:
    policy = LocRet(make_gates())
    assert policy.bind(SHAPE) is policy
    assert policy.bind(replace(SHAPE, num_heads=None, hidden_size=99)) is policy
    with pytest.raises(ValueError, match="input_size is 40 in the gates and 32 in the model"):
        policy.bind(replace(SHAPE, num_heads=4))


def test_the_first_call_checks_it_elsewhere() -> None:
    policy = LocRet(make_gates()).bind(replace(SHAPE, num_heads=None))
    query, key = torch.zeros(1, 4, 3, 4), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"\[batch, seq, 40\], got \[1, 3, 32\]: these gates"):
        policy.affine(view(query, key, key))


class FixedScores(RetentionPolicy):
    """LocRet whose head gives these scores."""

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.2, 0.05])[tokens.position.long()][:, None]
        return torch.zeros_like(scores), scores


@pytest.mark.parametrize("calls", [[6], [5, 1]])
def test_stabilizers_are_recent_tokens(calls: list[int]) -> None:
    """With 2 stabilizers and a budget of 4, the last two and the two best of the rest stay."""
    cache = BoundedKVCache(
        FixedScores(),
        num_layers=1,
        num_kv_heads=1,
        head_dim=4,
        batch_size=1,
        budget=4,
        buffer=2,
        sinks=0,
        recent=2,
        dtype=torch.float32,
        device="cpu",
        impl="torch",
    )
    for new in calls:
        token = torch.zeros(1, 1, new, 4)
        cache.attend(0, token, token, token)
        cache.evict()
    assert sorted(p for p in cache.positions(0).flatten().tolist() if p >= 0) == [1, 2, 4, 5]


class TestAuthorsFiles:
    def published(self, gates: LocRetGates) -> dict[str, Tensor]:
        return {
            f"model.layers.{i}.self_attn.{name}": x
            for i, layer in enumerate(gates.layers)
            for name, x in layer.state_dict().items()
        }

    def test_read_beside_other_tensors(self, tmp_path: Path) -> None:
        gates = make_gates().bfloat16()
        others = {
            "lm_head.weight": torch.zeros(3, 3),
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3),
            "model.layers.0.mlp.fc1.weight": torch.zeros(3, 3),
        }
        torch.save({**others, **self.published(gates)}, tmp_path / "heads.bin")
        loaded = LocRet.from_pretrained(tmp_path).gates
        assert loaded.config == CONFIG
        for name, tensor in gates.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
            assert loaded.state_dict()[name].dtype == torch.bfloat16

    def test_a_lost_layer_is_named(self, tmp_path: Path) -> None:
        tensors = self.published(make_gates())
        tensors["model.layers.7.self_attn.fc1.weight"] = tensors.pop(
            "model.layers.1.self_attn.fc1.weight"
        )
        del tensors["model.layers.1.self_attn.fc2.weight"]
        torch.save(tensors, tmp_path / "heads.bin")
        with pytest.raises(
            ValueError,
            match=r"missing layers.1.fc1.weight, layers.1.fc2.weight; unexpected layers.7.fc1",
        ):
            LocRet.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "content", [[], {"lm_head.weight": torch.zeros(1)}, {1: 2}], ids=["list", "other", "int"]
    )
    def test_other_content(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "heads.bin")
        with pytest.raises(ValueError, match="does not hold LocRet's heads: expected model.layers"):
            LocRet.from_pretrained(tmp_path)
