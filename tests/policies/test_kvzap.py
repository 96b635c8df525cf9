"""KVzap: its formula, and what all static gates share: checkpoints, binding, the cache."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from trimkv_kernels import BoundedKVCache, ModelShape, TokenView, files
from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.fast_kvzip import FastKVzip
from trimkv_kernels.policies.kvzap import KVzap, KVzapConfig, KVzapGates
from trimkv_kernels.policies.loc_ret import LocRet

pytestmark = pytest.mark.numeric

SHAPE = ModelShape(
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
    dtype=torch.float32,
    device=torch.device("cpu"),
    num_heads=4,
    hidden_size=12,
)
CONFIG = KVzapConfig(num_layers=3, num_kv_heads=2, input_size=12, intermediate_size=5)
LINEAR = replace(CONFIG, intermediate_size=None)
ALL = pytest.mark.parametrize("policy_type", [KVzap, FastKVzip, LocRet])


def make_policy_of(config: KVzapConfig) -> KVzap:
    torch.manual_seed(0)
    return KVzap(KVzapGates(config))


def view(**given: Tensor) -> TokenView:
    some = next(iter(given.values()))
    batch, new = some.shape[0], some.shape[-2]
    return TokenView(
        policy="test",
        layer=1,
        t=torch.full((batch,), new, dtype=torch.int32),
        position=torch.arange(new, dtype=torch.int32).expand(batch, -1),
        valid=torch.ones(batch, new, dtype=torch.bool),
        given=given,
        num_kv_heads=2,
    )


class TestFormula:
    @pytest.mark.parametrize("config", [CONFIG, LINEAR], ids=["mlp", "linear"])
    def test_float64(self, config: KVzapConfig) -> None:
        policy = make_policy_of(config)
        x = torch.randn(2, 7, 12)
        slope, score = policy.affine(view(hidden_states=x))
        own = {
            name.removeprefix("layers.1."): tensor.double()
            for name, tensor in policy.gates.state_dict().items()
            if name.startswith("layers.1.")
        }
        if config is LINEAR:
            expected = torch.einsum("hd,bsd->bhs", own["weight"], x.double())
            expected += own["bias"][:, None]
        else:
            inner = x.double() @ own["0.weight"].T + own["0.bias"]
            inner = inner * 0.5 * torch.erfc(-inner / math.sqrt(2))
            expected = (inner @ own["2.weight"].T + own["2.bias"]).transpose(1, 2)
        torch.testing.assert_close(score.double(), expected, atol=1e-6, rtol=1e-6)
        assert score.dtype == slope.dtype == torch.float32
        assert not slope.any()

    def test_the_cache_keeps_the_highest(self) -> None:
        policy = make_policy_of(CONFIG)
        cache = BoundedKVCache(
            policy,
            num_layers=3,
            num_kv_heads=2,
            head_dim=8,
            batch_size=2,
            budget=9,
            buffer=3,
            sinks=2,
            recent=3,
            dtype=torch.float32,
            device="cpu",
            impl="torch",
        )
        x = torch.randn(3, 2, 30, 12)
        for part in x.split([17] + [1] * 13, dim=2):
            for layer in range(3):
                token = torch.zeros(2, 2, part.shape[2], 8)
                cache.attend(layer, token, token, token, hidden_states=part[layer])
            cache.evict()
        # evictions came at 17 and then at 20, 23, ... tokens: 29 is the last
        for layer in range(3):
            held = cache.positions(layer)
            for row in range(2):
                scores = policy.gates(layer, x[layer])[row]
                for head in range(2):
                    kept = held[row, head][held[row, head] >= 0].sort().values.tolist()
                    assert kept == self.expected(scores[head])

    @staticmethod
    def expected(scores: Tensor) -> list[int]:
        kept: list[int] = []
        for t in [17, *range(18, 31)]:
            kept += range(kept[-1] + 1 if kept else 0, t)
            if len(kept) >= 12:
                best = sorted((p for p in kept if 2 <= p < t - 3), key=lambda p: -scores[p])[:4]
                kept = sorted([0, 1, *best, t - 3, t - 2, t - 1])
        return kept


class KvpressConfig(PretrainedConfig):
    model_type = "kvzap"


class KvpressModel(PreTrainedModel):
    """The published module, as transformers writes it."""

    config_class = KvpressConfig

    def __init__(self, config: KvpressConfig) -> None:
        super().__init__(config)
        self.layers = KVzapGates(
            KVzapConfig(config.n_modules, config.output_dim, config.input_dim, config.hidden_dim)
        ).layers
        self.post_init()


class TestPublished:
    @pytest.mark.parametrize("hidden_dim", [5, None])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_transformers_saves(
        self, tmp_path: Path, hidden_dim: int | None, dtype: torch.dtype
    ) -> None:
        config = KvpressConfig(input_dim=12, output_dim=2, hidden_dim=hidden_dim, n_modules=3)
        model = KvpressModel(config).to(dtype)
        model.save_pretrained(tmp_path)
        policy = KVzap.from_pretrained(tmp_path)
        assert policy.gates.config == replace(CONFIG, intermediate_size=hidden_dim)
        x = torch.randn(1, 4, 12).to(dtype)
        for layer in range(3):
            expected = model.layers[layer](x).transpose(1, 2).float()
            scores = policy.gates(layer, x)
            assert scores.dtype == torch.float32
            assert torch.equal(scores, expected)

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
        with pytest.raises(ValueError, match=r"config.json: model_type must be 'kvzap', got 'qwen"):
            KVzap.from_pretrained(tmp_path)


@ALL
class TestEveryStaticGate:
    def test_round_trip(self, tmp_path: Path, policy_type: type[KVzap]) -> None:
        policy = policy_type.example(SHAPE)
        policy.gates.to(torch.bfloat16)
        policy.save_pretrained(tmp_path / "deep" / "er")
        kind = policy_type.name
        assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == [
            f"{kind}_config.json",
            f"{kind}_gates.safetensors",
        ]
        loaded = policy_type.from_pretrained(str(tmp_path / "deep" / "er"))
        assert loaded.gates.config == policy.gates.config
        state = policy.gates.state_dict()
        assert loaded.gates.state_dict().keys() == state.keys()
        for name, tensor in loaded.gates.state_dict().items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, state[name])

    def test_failed_save_leaves_the_old_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy_type: type[KVzap]
    ) -> None:
        policy = policy_type.example(SHAPE)
        policy.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(*args: object, **kwargs: object) -> None:
            raise OSError("disk full")

        for owner, name in ((Path, "write_text"), (Path, "write_bytes"), (os, "replace")):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, fail)
                with pytest.raises(OSError, match="disk full"):
                    policy.save_pretrained(tmp_path)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_wrong_tensors_are_named(self, tmp_path: Path, policy_type: type[KVzap]) -> None:
        policy_type.example(SHAPE).save_pretrained(tmp_path)
        path = tmp_path / f"{policy_type.name}_gates.safetensors"
        tensors = load_file(path)
        first, second, *_ = sorted(tensors)
        shape = list(tensors[second].shape)
        tensors[second] = torch.zeros(1)
        tensors["extra"] = tensors.pop(first)
        save_file(tensors, path)
        with pytest.raises(ValueError, match="are not those of") as raised:
            policy_type.from_pretrained(tmp_path)
        text = str(raised.value)
        assert f"missing {first};" in text
        assert "unexpected extra;" in text
        assert f"misshaped {second} (expected {shape}, got [1])" in text

    def test_wrong_dtype_is_named(self, tmp_path: Path, policy_type: type[KVzap]) -> None:
        policy_type.example(SHAPE).save_pretrained(tmp_path)
        path = tmp_path / f"{policy_type.name}_gates.safetensors"
        save_file({name: x.long() for name, x in load_file(path).items()}, path)
        with pytest.raises(ValueError, match=r"neither fp32, bf16 nor fp16 layers.*torch.int64"):
            policy_type.from_pretrained(tmp_path)

    def test_bad_files(self, tmp_path: Path, policy_type: type[KVzap]) -> None:
        kind = policy_type.name
        with pytest.raises(ValueError, match=f"no {kind} gates in .*{kind}_gates.safetensors"):
            policy_type.from_pretrained(tmp_path)
        policy_type.example(SHAPE).save_pretrained(tmp_path)
        config = tmp_path / f"{kind}_config.json"
        data = json.loads(config.read_text())
        assert data.pop("kind") == kind
        for bad, message in (
            ("{", "config.json: "),
            ("[]", "expected a JSON object, got a list"),
            (json.dumps({**data, "num_layers": 0}), "num_layers must be an int .* got 0"),
            (json.dumps({**data, "input_size": "12"}), "input_size must be an int .* got '12'"),
            (json.dumps({"num_layers": 3}), "lacks num_kv_heads, input_size; it must have"),
        ):
            config.write_text(bad)
            with pytest.raises(ValueError, match=message):
                policy_type.from_pretrained(tmp_path)
        config.unlink()
        with pytest.raises(ValueError, match=f"{kind}_config.json: .*No such file"):
            policy_type.from_pretrained(tmp_path)
        (tmp_path / f"{kind}_gates.safetensors").write_bytes(b"junk")
        config.write_text(json.dumps(data))
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            policy_type.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="folder must be a directory, got the file"):
            policy_type.example(SHAPE).save_pretrained(config)

    def test_hub_ids(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy_type: type[KVzap]
    ) -> None:
        asked = []

        def download(name: str, **options: object) -> str:
            asked.append((name, options["revision"]))
            files = options["allow_patterns"]
            if name != "owner/name":
                raise OSError("no such repository")
            inside = "deep/" if any(file.startswith("deep/") for file in files) else ""
            assert f"{inside}{policy_type.name}_gates.safetensors" in files
            policy_type.example(SHAPE).save_pretrained(tmp_path / inside)
            return str(tmp_path)

        monkeypatch.setattr(files, "snapshot_download", download)
        policy_type.from_pretrained("owner/name", revision="v1")
        policy_type.from_pretrained("owner/name/deep")
        with pytest.raises(ValueError, match="existing folder or a hub id .*'a/b': .*no such repo"):
            policy_type.from_pretrained("a/b")
        assert asked == [("owner/name", "v1"), ("owner/name", None), ("a/b", None)]

    def test_bind_moves_a_copy(self, policy_type: type[KVzap]) -> None:
        policy = policy_type.example(SHAPE)
        assert policy.bind(SHAPE) is policy
        low = replace(SHAPE, dtype=torch.bfloat16, hidden_size=None, num_heads=None)
        bound = policy.bind(low)
        assert {p.dtype for p in bound.gates.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in policy.gates.parameters()} == {torch.float32}
        assert bound.bind(low) is bound

    def test_bind_names_every_difference(self, policy_type: type[KVzap]) -> None:
        policy = policy_type.example(SHAPE)
        with pytest.raises(
            ValueError,
            match=rf"'{policy_type.name}' do not fit the model: num_layers is 3 in the gates and 4 "
            r"in the model; num_kv_heads is 2 in the gates and 1 in the model",
        ):
            policy.bind(replace(SHAPE, num_layers=4, num_kv_heads=1))
        wide = replace(SHAPE, hidden_size=16, head_dim=16)
        with pytest.raises(ValueError, match="model: input_size is .* in the model; use gates"):
            policy.bind(wide)

    def test_example_is_the_same_each_time(self, policy_type: type[KVzap]) -> None:
        state = torch.get_rng_state()
        first, second = (policy_type.example(SHAPE).gates for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        x = torch.randn(2, 9, first.config.input_size)
        scores = first(2, x)
        assert torch.equal(scores, second(2, x))
        assert scores.shape == (2, 2, 9)
        assert scores.std() > 1e-3
        policy_type.example(replace(SHAPE, hidden_size=None, num_heads=None))

    def test_compiles_whole(self, policy_type: type[KVzap]) -> None:
        gates = policy_type.example(SHAPE).gates
        x = torch.randn(2, 3, gates.config.input_size)
        compiled = torch.compile(gates, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(1, x), gates(1, x))

    def test_bad_arguments(self, policy_type: type[KVzap]) -> None:
        name = policy_type.gates_type.__name__
        with pytest.raises(TypeError, match=f"gates must be {name}, got Linear"):
            policy_type(torch.nn.Linear(1, 1))
        with pytest.raises(TypeError, match=r"config must be a \w+Config, got dict"):
            policy_type.gates_type({})
        gates = policy_type.example(SHAPE).gates
        width = gates.config.input_size
        with pytest.raises(ValueError, match=rf"\[batch, seq, {width}\], got \[1, 2, 3\]: these"):
            gates(0, torch.zeros(1, 2, 3))
        with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), got 3"):
            gates(3, torch.zeros(1, 2, width))

    def test_is_registered_and_affine(self, policy_type: type[KVzap]) -> None:
        policy = make_policy(policy_type.name, gates=policy_type.example(SHAPE).gates)
        assert type(policy) is policy_type
        assert policy.is_affine
        assert policy.is_compileable
