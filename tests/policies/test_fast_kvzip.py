"""Fast KVzip's gate against its formula, and the authors' files."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimkv_kernels import ModelShape, TokenView
from trimkv_kernels.policies.fast_kvzip import FastKVzip, FastKVzipConfig, FastKVzipGates

CONFIG = FastKVzipConfig(
    num_layers=2, num_kv_heads=2, input_size=12, group_size=3, head_dim=16, num_base_keys=5
)


def make_gates(scale: float = 1.0) -> FastKVzipGates:
    torch.manual_seed(0)
    gates = FastKVzipGates(CONFIG)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(std=scale)
    return gates


def expected_score(own: dict[str, Tensor], x: list[float], head: int) -> float:
    """One token and KV head, in Python floats."""

    def project(name: str, start: int, bias: bool) -> list[float]:
        weight = own[f"{name}_proj.weight"][start : start + 16].tolist()
        out = [math.fsum(a * b for a, b in zip(row, x, strict=True)) for row in weight]
        if bias:
            shift = own[f"{name}_proj.bias"][start : start + 16].tolist()
            out = [a + b for a, b in zip(out, shift, strict=True)]
        size = math.sqrt(math.fsum(a * a for a in out) / 16 + 1e-6)
        scale = own[f"{name}_norm.weight"].tolist()
        return [a / size * b for a, b in zip(out, scale, strict=True)]

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(i * j for i, j in zip(a, b, strict=True)) / 4

    key = project("k", head * 16, bias=False)
    total = 0.0
    for group in range(3):
        query = project("q", (head * 3 + group) * 16, bias=True)
        logit = dot(key, query) + own["b"][head, 0, group].item()
        base = own["k_base"][head, 0].tolist()
        total += 1 / (1 + sum(math.exp(dot(row, query) - logit) for row in base))
    return total / 3


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_formula(scale: float) -> None:
    gates = make_gates(scale)
    x = torch.randn(2, 4, 12)
    view = TokenView(
        policy="fast_kvzip",
        layer=1,
        t=torch.tensor([4, 4]),
        position=torch.arange(4).expand(2, -1),
        valid=torch.ones(2, 4, dtype=torch.bool),
        given={"hidden_states": x},
        num_kv_heads=2,
    )
    slope, score = FastKVzip(gates).affine(view)
    assert not slope.any()
    assert score.shape == (2, 2, 4)
    own = {name: tensor.double() for name, tensor in gates.layers[1].state_dict().items()}
    for row in range(2):
        for head in range(2):
            for token in range(4):
                expected = expected_score(own, x[row, token].double().tolist(), head)
                assert score[row, head, token].item() == pytest.approx(expected, abs=2e-6)


def test_one_base_key_equal_to_the_key_shares_the_attention() -> None:
    """exp(0) beside itself: the score is 1 / (1 + 1), whatever the token."""
    gates = FastKVzipGates(
        FastKVzipConfig(num_layers=1, num_kv_heads=1, input_size=4, head_dim=4, num_base_keys=1)
    )
    with torch.no_grad():
        gates.layers[0].k_norm.weight.zero_()
        gates.layers[0].k_base.zero_()
        gates.layers[0].b.zero_()
    score = gates(0, torch.randn(1, 6, 4))
    torch.testing.assert_close(score, torch.full((1, 1, 6), 0.5))


@pytest.mark.parametrize("b", [500.0, -500.0])
def test_large_logits_do_not_overflow(b: float) -> None:
    gates = make_gates()
    torch.nn.init.constant_(gates.layers[0].b, b)
    score = gates(0, torch.randn(1, 6, 12))
    torch.testing.assert_close(score, torch.full((1, 2, 6), 1.0 if b > 0 else 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype: torch.dtype) -> None:
    x = torch.randn(1, 50, 12)
    low, full = make_gates(0.3).to(dtype)(0, x), make_gates(0.3)(0, x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, atol=0.02, rtol=0)


class TestAuthorsFiles:
    def layers(self, gates: FastKVzipGates) -> list[dict[str, Tensor]]:
        return [layer.state_dict() for layer in gates.layers]

    def test_read(self, tmp_path: Path) -> None:
        """Projections in bf16, norms and base keys in fp32, as the authors' module is built."""
        gates = make_gates()
        for layer in gates.layers:
            layer.q_proj.bfloat16()
            layer.k_proj.bfloat16()
            layer.b.data = layer.b.data.bfloat16()
        torch.save({"module": self.layers(gates)}, tmp_path / "q3_dim16_sink5.pt")
        loaded = FastKVzip.from_pretrained(tmp_path).gates
        assert loaded.config == CONFIG
        x = torch.randn(1, 6, 12)
        assert torch.equal(loaded(1, x), gates(1, x))
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, gates.state_dict()[name])

    def test_ours_is_read_first(self, tmp_path: Path) -> None:
        torch.save({"module": []}, tmp_path / "gates.pt")
        FastKVzip(make_gates()).save_pretrained(tmp_path)
        assert FastKVzip.from_pretrained(tmp_path).gates.config == CONFIG

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2], r"must hold \{'module': \[tensors of each layer\]\}"),
            ({"module": [{"b": 3}]}, "must hold"),
            ({"module": []}, "no usable 'layers.0.k_base'"),
            ({"module": [{"k_base": torch.zeros(3)}]}, "does not hold Fast KVzip gates"),
        ],
    )
    def test_other_content(self, tmp_path: Path, content: object, message: str) -> None:
        torch.save(content, tmp_path / "gates.pt")
        with pytest.raises(ValueError, match=message):
            FastKVzip.from_pretrained(tmp_path)

    def test_a_lost_tensor_is_named(self, tmp_path: Path) -> None:
        layers = self.layers(make_gates())
        del layers[1]["q_norm.weight"]
        torch.save({"module": layers}, tmp_path / "gates.pt")
        with pytest.raises(ValueError, match=r"missing layers.1.q_norm.weight\. Check"):
            FastKVzip.from_pretrained(tmp_path)

    def test_nothing_in_a_pickle_is_executed(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return Path.touch, (tmp_path / "executed",)

        (tmp_path / "gates.pt").write_bytes(pickle.dumps({"module": Evil()}, protocol=2))
        with pytest.raises(ValueError, match="other than tensors, which are never loaded"):
            FastKVzip.from_pretrained(tmp_path)
        assert not (tmp_path / "executed").exists()

    def test_two_files(self, tmp_path: Path) -> None:
        for name in ("a.pt", "b.pt"):
            torch.save({}, tmp_path / name)
        with pytest.raises(ValueError, match=r"2 files \*.pt in .* expected fast_kvzip_config"):
            FastKVzip.from_pretrained(tmp_path)


def test_bind_checks_the_group() -> None:
    shape = ModelShape(
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_heads=4,
        hidden_size=12,
    )
    with pytest.raises(ValueError, match="group_size is 3 in the gates and 2 in the model"):
        FastKVzip(make_gates()).bind(shape)
