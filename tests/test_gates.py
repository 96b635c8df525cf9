"""Retention gates: the maths, the two checkpoint layouts, and what a bad checkpoint says."""

import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from trimkv_kernels import files as files_module
from trimkv_kernels.gates import (
    GateConfig,
    RetentionGates,
    check_base,
    checkpoint_folder,
    load_gates,
    resolve_base_model,
    save_gates,
)
from trimkv_kernels.policies.trimkv import retention_affine

GOLDEN = Path(__file__).parent / "golden" / "trimkv-0.1.5"
PREFIX = "model.layers.{}.self_attn.retention_gate."
CONFIG = GateConfig(
    kind="rg10",
    hidden_size=10,
    intermediate_size=6,
    num_layers=3,
    num_kv_heads=2,
    tied=True,
    bias_init=2.5,
    base_model="owner/base",
    base_revision="main",
    budget=64,
    buffer=8,
)
RG_CONFIG = replace(CONFIG, kind="rg", tied=False)


def make_gates(config: GateConfig, dtype: torch.dtype = torch.float32) -> RetentionGates:
    torch.manual_seed(0)
    gates = RetentionGates(config)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(std=0.5)
    return gates.to(dtype)


def published_tensors(gates: RetentionGates) -> dict[str, Tensor]:
    return {
        PREFIX.format(layer) + name: tensor.clone()
        for layer, gate in enumerate(gates.layers)
        for name, tensor in gate.state_dict().items()
    }


def write_published(
    folder: Path,
    config: GateConfig = RG_CONFIG,
    tensors: dict[str, Tensor] | None = None,
    **overrides: object,
) -> Path:
    """Write the published layout; an override of None leaves the key out."""
    folder.mkdir(exist_ok=True)
    data = {**config.to_dict(), "model_type": "qwen3", "max_seq_len": 32768, **overrides}
    data = {key: value for key, value in data.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))
    if tensors is None:
        tensors = published_tensors(make_gates(config))
    torch.save(tensors, folder / "trimkv_weights.pth")
    return folder


def expected_log_beta(tensors: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    """The formulas in float64: [batch, seq, hidden_size] -> [batch, num_kv_heads, seq]."""
    own = {
        name.removeprefix(PREFIX.format(layer)): tensor.double()
        for name, tensor in tensors.items()
        if name.startswith(PREFIX.format(layer))
    }
    hidden, last = x.double(), "linear3.weight" if "linear3.weight" in own else "linear2.weight"
    for name in ("linear1", "linear2"):
        if f"{name}.bias" in own:
            hidden = hidden @ own[f"{name}.weight"].T + own[f"{name}.bias"]
            hidden = hidden / (1 + torch.exp(-hidden))
    logits = hidden @ own[last].T + own["bias"]
    return -torch.log1p(torch.exp(-logits)).transpose(1, 2)


class TestForward:
    @pytest.mark.parametrize("config", [RG_CONFIG, CONFIG, replace(CONFIG, tied=False)])
    def test_float64_oracle(self, config: GateConfig) -> None:
        gates = make_gates(config)
        x = torch.randn(2, 7, config.hidden_size)
        for layer in range(config.num_layers):
            expected = expected_log_beta(published_tensors(gates), layer, x)
            torch.testing.assert_close(gates(layer, x).double(), expected, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [0.0, 18.0, 60000.0, -60000.0])
    def test_never_positive_never_nan(self, dtype: torch.dtype, bias: float) -> None:
        gates = make_gates(RG_CONFIG)
        torch.nn.init.constant_(gates.layers[0].bias, bias)
        x = 100 * torch.randn(2, 50, 10)
        log_beta = gates.to(dtype)(0, x)
        assert log_beta.dtype == torch.float32
        assert log_beta.shape == (2, 2, 50)
        assert (log_beta <= 0).all()

    def test_bias_does_not_round_bfloat16_logits(self) -> None:
        gates = make_gates(RG_CONFIG).to(torch.bfloat16)
        torch.nn.init.constant_(gates.layers[0].bias, 18.0)
        log_beta = gates(0, torch.randn(1, 64, 10))
        assert log_beta[0, 0].unique().numel() > 50

    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
            ("relu", lambda x: max(x, 0.0)),
            (
                "gelu_pytorch_tanh",
                lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            ),
        ],
    )
    def test_activations(self, name: str, function) -> None:
        config = GateConfig("rg", 1, 1, num_layers=1, num_kv_heads=1, hidden_act=name)
        gates = RetentionGates(config)
        for parameter in gates.parameters():
            torch.nn.init.constant_(parameter, 0.75)
        logit = 0.75 * function(0.75 * -0.4 + 0.75) + 0.75
        expected = -math.log1p(math.exp(-logit))
        assert gates(0, torch.tensor([[[-0.4]]])).item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("config", [RG_CONFIG, CONFIG])
    def test_initialisation(self, config: GateConfig) -> None:
        config = replace(config, hidden_size=256, intermediate_size=64)
        gates = RetentionGates(config)
        for name, parameter in gates.named_parameters():
            if name.endswith("weight"):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.3)
            elif "linear" in name:
                assert (parameter == 0).all()
            else:
                assert (parameter == 2.5).all()
        log_beta = gates(1, torch.zeros(1, 3, 256))
        assert log_beta.mean().item() == pytest.approx(-math.log1p(math.exp(-2.5)), abs=0.02)

    def test_parameter_counts_of_qwen3_4b(self) -> None:
        sizes = {"hidden_size": 2560, "intermediate_size": 512, "num_layers": 36, "num_kv_heads": 8}
        with torch.device("meta"):
            rg = RetentionGates(GateConfig("rg", **sizes))
            rg10 = RetentionGates(GateConfig("rg10", tied=True, **sizes))
        assert sum(parameter.numel() for parameter in rg.parameters()) == 47_352_096
        assert sum(parameter.numel() for parameter in rg10.parameters()) == 56_664_072

    def test_tied_tensors_are_one_and_stay_one(self) -> None:
        gates = make_gates(CONFIG).to(torch.float64).to(torch.bfloat16)
        first, *others = gates.layers
        for gate in others:
            assert gate.linear3.weight is first.linear3.weight
            assert gate.bias is first.bias
            assert gate.linear1.weight is not first.linear1.weight

    def test_compiles_whole_and_has_gradients(self) -> None:
        gates = make_gates(RG_CONFIG)
        x = torch.randn(2, 3, 10)
        compiled = torch.compile(gates, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(1, x), gates(1, x))
        gates(1, x).sum().backward()
        assert gates.layers[1].linear1.weight.grad.abs().sum() > 0
        assert gates.layers[0].linear1.weight.grad is None

    def test_bad_input(self) -> None:
        gates = RetentionGates(RG_CONFIG)
        with pytest.raises(
            ValueError, match=r"hidden_states .*\[batch, seq, 10\], got \[2, 3, 9\]"
        ):
            gates(0, torch.zeros(2, 3, 9))
        with pytest.raises(ValueError, match=r"hidden_states .* got \[3, 10\]"):
            gates(0, torch.zeros(3, 10))
        for layer in (3, -1):
            with pytest.raises(ValueError, match=rf"layer must be in \[0, 3\), got {layer}"):
                gates(layer, torch.zeros(1, 1, 10))
        with pytest.raises(TypeError, match="config must be a GateConfig, got dict"):
            RetentionGates({})


class TestConfig:
    @pytest.mark.parametrize(
        "config", [CONFIG, RG_CONFIG, GateConfig("rg", 4, 3, num_layers=2, num_kv_heads=1)]
    )
    def test_round_trip(self, config: GateConfig) -> None:
        assert GateConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_published_values(self) -> None:
        data = {**RG_CONFIG.to_dict(), "memory_size": 512.0, "tie_retention_gate_layers": True}
        config = GateConfig.from_dict(data)
        assert config.budget == 512
        assert isinstance(config.budget, int)
        assert not config.tied

    def test_published_defaults(self) -> None:
        optional = ("tie_retention_gate_layers", "memory_size", "buffer_size", "base_model")
        data = {key: value for key, value in CONFIG.to_dict().items() if key not in optional}
        config = GateConfig.from_dict(data)
        assert config == replace(CONFIG, budget=None, buffer=None, base_model=None)

    def test_missing_keys(self) -> None:
        data = CONFIG.to_dict()
        del data["num_hidden_layers"], data["retention_gate"]
        with pytest.raises(ValueError, match="lacks 'retention_gate', 'num_hidden_layers'; it mu"):
            GateConfig.from_dict(data)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("retention_gate", "rg4", r"kind \('retention_gate' .*one of 'rg', 'rg10', got 'rg4'"),
            ("hidden_act", "mish", r"hidden_act must be one of 'silu', .*, got 'mish'"),
            ("hidden_size", 0, r"hidden_size must be an integer >= 1 .*got 0"),
            ("num_key_value_heads", "2", r"num_kv_heads \('num_key_value_heads' .*got '2'"),
            ("num_hidden_layers", True, r"num_layers .*>= 1 .*got True"),
            ("memory_size", 0, r"budget \('memory_size' in a config file\) must be .*got 0"),
            ("memory_size", -512.0, r"budget .*got -512"),
            ("memory_size", 0.5, r"budget .*not a fraction of the prompt\), got 0.5"),
            ("memory_size", math.nan, r"budget .*got nan"),
            ("buffer_size", 1.5, r"buffer \('buffer_size' .*got 1.5"),
            ("retention_gate_bias_init", math.inf, r"bias_init .*finite number, got inf"),
            ("global_capacity", "yes", r"shared_budget .*must be true or false, got 'yes'"),
            ("tie_retention_gate_layers", 1, r"tied .*must be true or false, got 1"),
            ("base_model", "", r"base_model must be a non-empty string or None, got ''"),
            ("base_revision", 3, r"base_revision must be a non-empty string or None, got 3"),
        ],
    )
    def test_bad_value(self, key: str, value: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GateConfig.from_dict({**CONFIG.to_dict(), key: value})

    def test_rg_has_nothing_to_tie(self) -> None:
        with pytest.raises(ValueError, match=r"tied .*must be false for kind 'rg' .*got True"):
            replace(RG_CONFIG, tied=True)

    def test_check_base(self) -> None:
        check_base(CONFIG, num_layers=3, num_kv_heads=2, hidden_size=10)
        with pytest.raises(
            ValueError,
            match=r"do not fit .*num_layers is 3 in the gates and 4 in the base model; "
            r"hidden_size is 10 in the gates and 12 .*trained for owner/base",
        ):
            check_base(CONFIG, num_layers=4, num_kv_heads=2, hidden_size=12)
        unnamed = replace(CONFIG, base_model=None)
        with pytest.raises(ValueError, match=r"num_kv_heads is 2 .*an unnamed base model"):
            check_base(unnamed, num_layers=3, num_kv_heads=8, hidden_size=10)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("config", [RG_CONFIG, CONFIG, replace(CONFIG, tied=False)])
    def test_published_to_ours(
        self, tmp_path: Path, config: GateConfig, dtype: torch.dtype
    ) -> None:
        tensors = published_tensors(make_gates(config, dtype))
        published = load_gates(write_published(tmp_path / "published", config, tensors))
        save_gates(published, tmp_path / "deep" / "ours")
        ours = load_gates(tmp_path / "deep" / "ours")

        assert published.config == ours.config == config
        for gates in (published, ours):
            loaded = published_tensors(gates)
            assert loaded.keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert loaded[key].dtype == dtype
                assert torch.equal(loaded[key], tensor)
            shared = gates.layers[0].bias is gates.layers[2].bias
            assert shared == config.tied
        x = torch.randn(1, 4, 10)
        assert torch.equal(published(2, x), ours(2, x))

    def test_our_files(self, tmp_path: Path) -> None:
        gates = make_gates(CONFIG, torch.bfloat16)
        save_gates(gates, str(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "trimkv_config.json",
            "trimkv_gates.safetensors",
        ]
        assert load_file(tmp_path / "trimkv_gates.safetensors").keys() == (
            published_tensors(gates).keys()
        )
        (tmp_path / "plain").write_text("")
        modes = {path.stat().st_mode for path in tmp_path.iterdir()}
        assert len(modes) == 1

    def test_ours_is_read_first(self, tmp_path: Path) -> None:
        write_published(tmp_path, RG_CONFIG)
        save_gates(make_gates(CONFIG), tmp_path)
        assert load_gates(tmp_path).config.kind == "rg10"

    def test_safetensors_with_config_json(self, tmp_path: Path) -> None:
        save_gates(make_gates(CONFIG), tmp_path)
        (tmp_path / "trimkv_config.json").rename(tmp_path / "config.json")
        assert load_gates(tmp_path).config == CONFIG

    def test_overwriting_loaded_gates_in_place(self, tmp_path: Path) -> None:
        save_gates(make_gates(CONFIG), tmp_path)
        gates = load_gates(tmp_path)
        before = published_tensors(gates)
        save_gates(gates, tmp_path)
        for key, tensor in published_tensors(load_gates(tmp_path)).items():
            assert torch.equal(tensor, before[key])

    def test_loaded_gates_train(self, tmp_path: Path) -> None:
        save_gates(make_gates(CONFIG), tmp_path)
        gates = load_gates(tmp_path)
        gates(0, torch.randn(1, 4, 10)).sum().backward()
        assert gates.layers[2].bias.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("owner", "name"), [(Path, "write_bytes"), (Path, "write_text"), (os, "replace")]
    )
    def test_failed_save_leaves_the_old_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
    ) -> None:
        save_gates(make_gates(CONFIG), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(path: Path, *args: object, **kwargs: object) -> None:
            with path.open("a") as file:
                file.write("half")
            raise OSError("disk full")

        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(OSError, match="disk full"):
            save_gates(make_gates(RG_CONFIG), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_bad_save(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="gates must be a RetentionGates, got Linear"):
            save_gates(torch.nn.Linear(1, 1), tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="folder must be a directory, got the file"):
            save_gates(make_gates(CONFIG), tmp_path / "file")
        mixed = make_gates(RG_CONFIG)
        mixed.layers[1].bfloat16()
        with pytest.raises(ValueError, match=r"one dtype among .*torch.bfloat16, torch.float32"):
            save_gates(mixed, tmp_path / "mixed")
        assert not (tmp_path / "mixed").exists()


class TestBadCheckpoint:
    def test_keys_and_shapes(self, tmp_path: Path) -> None:
        tensors = published_tensors(make_gates(RG_CONFIG))
        del tensors[PREFIX.format(1) + "bias"]
        tensors["model.norm.weight"] = torch.zeros(3)
        tensors[PREFIX.format(0) + "linear1.weight"] = torch.zeros(6, 9)
        write_published(tmp_path, RG_CONFIG, tensors)
        with pytest.raises(ValueError, match=r"trimkv_weights.pth does not hold") as raised:
            load_gates(tmp_path)
        message = str(raised.value)
        assert "missing model.layers.1.self_attn.retention_gate.bias;" in message
        assert "unexpected model.norm.weight;" in message
        assert (
            "misshaped model.layers.0.self_attn.retention_gate.linear1.weight "
            "(expected [6, 10], got [6, 9])" in message
        )
        assert "'rg' gates, 3 layers, hidden_size 10" in message

    def test_config_of_another_model(self, tmp_path: Path) -> None:
        write_published(tmp_path, RG_CONFIG, num_hidden_layers=5, hidden_size=12)
        with pytest.raises(
            ValueError, match=r"missing .*layers.3.* and 4 more; misshaped .*expected \[6, 12\]"
        ):
            load_gates(tmp_path)

    def test_other_kind(self, tmp_path: Path) -> None:
        write_published(tmp_path, RG_CONFIG, retention_gate="rg10")
        with pytest.raises(ValueError, match=r"missing .*linear2.bias.*linear3.weight"):
            load_gates(tmp_path)

    @pytest.mark.parametrize("name", ["linear3.weight", "bias"])
    def test_of_tied_tensors_that_disagree_the_last_is_read(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
    ) -> None:
        tensors = published_tensors(make_gates(CONFIG))
        last = PREFIX.format(2) + name
        tensors[last] = tensors[last] + 1
        write_published(tmp_path, CONFIG, tensors)
        gates = load_gates(tmp_path)
        for layer in gates.layers:
            assert torch.equal(layer.get_parameter(name), tensors[last])
        assert gates.layers[0].bias is gates.layers[2].bias
        (record,) = caplog.records
        assert f"the config ties {name}, and its copies differ: layers 0, 1" in record.getMessage()

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
    def test_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensors = published_tensors(make_gates(RG_CONFIG))
        tensors[PREFIX.format(0) + "bias"] = torch.zeros(2, dtype=dtype)
        write_published(tmp_path, RG_CONFIG, tensors)
        with pytest.raises(ValueError, match=rf"tensors of one dtype among .*got .*{dtype}"):
            load_gates(tmp_path)

    @pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
    def test_corrupt_safetensors(self, tmp_path: Path, kept: float) -> None:
        save_gates(make_gates(CONFIG), tmp_path)
        path = tmp_path / "trimkv_gates.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
        with pytest.raises(ValueError, match=r"trimkv_gates.safetensors is not a readable"):
            load_gates(tmp_path)

    @pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
    def test_corrupt_pth(self, tmp_path: Path, kept: float) -> None:
        path = write_published(tmp_path) / "trimkv_weights.pth"
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
        with pytest.raises(ValueError, match=r"trimkv_weights.pth is corrupt or holds"):
            load_gates(tmp_path)

    def test_text_in_place_of_pth(self, tmp_path: Path) -> None:
        path = write_published(tmp_path) / "trimkv_weights.pth"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 94\n")
        with pytest.raises(ValueError, match=r"trimkv_weights.pth is corrupt or holds"):
            load_gates(tmp_path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_malicious_pickle_is_not_run(self, tmp_path: Path, zipped: bool) -> None:
        class Touch:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(tmp_path / "ran"),)

        path = write_published(tmp_path) / "trimkv_weights.pth"
        if zipped:
            torch.save({"model.layers.0": Touch()}, path)
        else:
            path.write_bytes(pickle.dumps({"model.layers.0": Touch()}, protocol=2))
        with pytest.raises(ValueError, match=r"objects other than tensors.*never loaded.*safete"):
            load_gates(tmp_path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("data", [[torch.zeros(2)], {"a": 1}, {1: torch.zeros(2)}, "text"])
    def test_not_a_dict_of_tensors(self, tmp_path: Path, data: object) -> None:
        torch.save(data, write_published(tmp_path) / "trimkv_weights.pth")
        with pytest.raises(ValueError, match=r"must hold a plain dict of tensors.*safetensors"):
            load_gates(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
    def test_corrupt_config(self, tmp_path: Path, text: str) -> None:
        path = write_published(tmp_path) / "config.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"config\.json: "):
            load_gates(tmp_path)

    def test_bad_config_value_names_the_file(self, tmp_path: Path) -> None:
        write_published(tmp_path, memory_size=0.5)
        with pytest.raises(ValueError, match=r"config\.json: budget .*got 0\.5"):
            load_gates(tmp_path)
        write_published(tmp_path, num_key_value_heads=None)
        with pytest.raises(ValueError, match=r"config\.json: .*lacks 'num_key_value_heads'"):
            load_gates(tmp_path)

    def test_folder_without_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no retention-gate weights in .*trimkv_gates.safe"):
            load_gates(tmp_path)
        (write_published(tmp_path) / "config.json").unlink()
        with pytest.raises(ValueError, match=r"no retention-gate config in .*trimkv_config.json"):
            load_gates(tmp_path)


class TestLocation:
    def test_folders_only(self, tmp_path: Path) -> None:
        assert checkpoint_folder(tmp_path) == tmp_path
        with pytest.raises(ValueError, match=r"revision is for hub ids only, got 'v1' with"):
            load_gates(tmp_path, revision="v1")
        path = write_published(tmp_path) / "trimkv_weights.pth"
        with pytest.raises(ValueError, match=r"folder_or_hub_id must be a folder, got the file"):
            load_gates(path)

    @pytest.mark.parametrize("name", ["owner/never-cached", "/no/such/folder", "a/b/c", ""])
    def test_neither_folder_nor_hub_id(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.chdir(GOLDEN)
        if name:
            message = r"existing folder or a hub id 'owner/name', got .*no such folder"
        else:
            message = "no retention-gate weights in ."
        with pytest.raises(ValueError, match=message):
            load_gates(name)

    def test_hub_id_asks_for_the_gate_files_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = {}

        def snapshot(repo_id: str, **kwargs: object) -> str:
            asked.update(kwargs, repo_id=repo_id)
            return str(write_published(tmp_path))

        monkeypatch.setattr(files_module, "snapshot_download", snapshot)
        assert load_gates("owner/name", revision="abc").config == RG_CONFIG
        assert asked == {
            "repo_id": "owner/name",
            "revision": "abc",
            "local_files_only": False,
            "allow_patterns": [
                "trimkv_config.json",
                "trimkv_gates.safetensors",
                "config.json",
                "trimkv_weights.pth",
            ],
        }

    def test_resolve_base_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "gates"
        (folder / "inside").mkdir(parents=True)
        (tmp_path / "beside").mkdir()

        def resolve(name: str | None, start: str | Path = folder) -> str:
            return resolve_base_model(start, replace(CONFIG, base_model=name))

        assert resolve("inside") == str(folder / "inside")
        assert resolve("beside") == str(tmp_path / "beside")
        assert resolve("../beside") == str(folder / "../beside")
        assert resolve(str(tmp_path)) == str(tmp_path)
        assert resolve("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
        assert resolve(None) == str(folder)
        monkeypatch.chdir(folder)
        assert resolve("beside", ".") == str(tmp_path / "beside")


@pytest.fixture(scope="module", params=["rg", "rg10"])
def golden(request: pytest.FixtureRequest) -> tuple[RetentionGates, list[Tensor], Path]:
    """The gates of a golden case and what entered each attention while the prompt was read."""
    folder = GOLDEN / request.param
    gates = load_gates(folder / "gates")
    base = resolve_base_model(folder / "gates", gates.config)
    model = Qwen3ForCausalLM.from_pretrained(base).eval()
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, __, out: inputs.append(out))
    case = folder / ("per_step" if request.param == "rg" else "global")
    with torch.no_grad():
        prompt = load_file(case.with_suffix(".safetensors"))["tokens"][:, :40]
        model(prompt)
    return gates, inputs, case


class TestGolden:
    def test_loads(self, golden: tuple[RetentionGates, list[Tensor], Path]) -> None:
        gates, _, case = golden
        kind = case.parent.name
        assert gates.config == GateConfig(
            kind=kind,
            hidden_size=64,
            intermediate_size=32,
            num_layers=3,
            num_kv_heads=2,
            tied=kind == "rg10",
            shared_budget=kind == "rg10",
            bias_init=2.0,
            base_model="base",
            budget=1024,
        )
        weights = torch.load(case.parent / "gates" / "trimkv_weights.pth", weights_only=True)
        loaded = published_tensors(gates)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())

    def test_kept_after_the_prompt(self, golden: tuple[RetentionGates, list[Tensor], Path]) -> None:
        gates, inputs, case = golden
        budget = json.loads(case.with_suffix(".json").read_text())["memory_size"]
        with torch.no_grad():
            log_beta = torch.stack([gates(layer, x)[0] for layer, x in enumerate(inputs)])
        slope, offset = retention_affine(log_beta)
        scores = slope * (40 - torch.arange(40)) + offset  # [layers, num_kv_heads, 40]
        if case.name == "per_step":
            kept = torch.zeros_like(scores).scatter(-1, scores.topk(budget).indices, 1).bool()
        else:
            kept = scores >= scores.flatten().topk(3 * 2 * budget).values[-1]
        expected = load_file(case.with_suffix(".safetensors"))["kept_positions"][0]
        for layer in range(3):
            for head in range(2):
                positions = expected[layer, head]
                assert kept[layer, head].nonzero().flatten().tolist() == (
                    positions[positions >= 0].tolist()
                )


BETA = torch.tensor([0.99, 0.5, 0.9, 0.95, 0.8], dtype=torch.float64)


def scores_at(beta: Tensor, t: int, **kwargs: int) -> Tensor:
    slope, offset = retention_affine(beta.log(), **kwargs)
    assert slope.dtype == offset.dtype == torch.float32
    return slope * (t - torch.arange(len(beta))) + offset


def kept_of(scores: Tensor, budget: int) -> list[int]:
    return sorted(scores.topk(budget).indices.tolist())


class TestRetentionAffine:
    """Worked numbers of trimkv 0.1.5, and the formulas in float64."""

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [-0.060302, -3.465736, -0.421442, -0.15388, -0.446287]),
            ({"age_offset": 2}, [-0.070352, -4.158883, -0.526803, -0.205173, -0.669431]),
            ({"lookahead": 2}, [0.617782, -3.753418, 0.115051, 0.462656, -0.081644]),
            ({"lookahead": 8}, [1.974178, -3.46965, 1.212843, 1.701638, 0.756358]),
            ({"lookahead": 128}, [4.211507, -3.465736, 1.775781, 2.78915, 0.940007]),
        ],
    )
    def test_scores(self, options: dict[str, int], expected: list[float]) -> None:
        torch.testing.assert_close(
            scores_at(BETA, 5, **options), torch.tensor(expected), atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize(
        ("age_offset", "kept"), [(1, [0, 2, 3]), (0, [0, 3, 4]), (-1, [0, 3, 4])]
    )
    def test_age_offset_decides_on_the_newest(self, age_offset: int, kept: list[int]) -> None:
        assert kept_of(scores_at(BETA, 5, age_offset=age_offset), 3) == kept

    def test_paper_exponent_never_drops_the_newest(self) -> None:
        assert scores_at(BETA, 5, age_offset=-1)[-1] == 0

    def test_lookahead_flips_an_order(self) -> None:
        log_beta, age = torch.tensor([0.99, 0.8]).log(), torch.tensor([40, 1])
        for lookahead, expected in ((1, [-0.402, -0.2231]), (8, [1.6325, 0.9795])):
            slope, offset = retention_affine(log_beta, age_offset=0, lookahead=lookahead)
            torch.testing.assert_close(
                slope * age + offset, torch.tensor(expected), atol=1e-4, rtol=0
            )

    @pytest.mark.parametrize(
        ("buffer", "lookahead", "trace"),
        [
            (1, 1, [[0, 1, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4], [0, 2, 6], [0, 2, 6]]),
            (1, 8, [[0, 1, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4], [0, 2, 6], [0, 2, 6]]),
            (2, 1, [[0, 1, 2], [0, 1, 2, 3], [0, 2, 4], [0, 2, 4, 5], [0, 2, 6], [0, 2, 6, 7]]),
        ],
    )
    def test_trace(self, buffer: int, lookahead: int, trace: list[list[int]]) -> None:
        beta = torch.tensor([0.999, 0.6, 0.95, 0.7, 0.9, 0.5, 0.99, 0.8])
        kept: list[int] = []
        for t, expected in zip(range(3, 9), trace, strict=True):
            kept = [*kept, t - 1] if kept else [0, 1, 2]
            if len(kept) >= 3 + buffer:
                scores = scores_at(beta, t, lookahead=lookahead)[kept]
                kept = [kept[slot] for slot in kept_of(scores, 3)]
            assert kept == expected

    @given(
        log_beta=st.floats(-80, -(2.0**-100), width=32),
        age=st.integers(1, 4096),
        age_offset=st.sampled_from([-1, 0, 1]),
        lookahead=st.sampled_from([1, 2, 7, 128, 4096]),
    )
    @settings(max_examples=200, deadline=None)
    def test_float64_sum(self, log_beta: float, age: int, age_offset: int, lookahead: int) -> None:
        slope, offset = retention_affine(
            torch.tensor(log_beta), age_offset=age_offset, lookahead=lookahead
        )
        exponent = age + age_offset
        if lookahead == 1:
            expected = log_beta * exponent
        else:
            steps = torch.arange(1, lookahead + 1, dtype=torch.float64)
            expected = log_beta * exponent + (log_beta * steps).logsumexp(0).item()
        assert (slope * age + offset).item() == pytest.approx(expected, rel=1e-6, abs=2e-6)

    @pytest.mark.parametrize("lookahead", [1, 2, 128])
    @pytest.mark.parametrize("age_offset", [-1, 0, 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_edges_are_finite(self, lookahead: int, age_offset: int, dtype: torch.dtype) -> None:
        edges = torch.tensor([0.0, -0.0, -1e-45, -1e-38, -1e-20, -6e4, -3e38, -math.inf])
        slope, offset = retention_affine(
            edges.to(dtype), age_offset=age_offset, lookahead=lookahead
        )
        for age in (1, 2, 2**20):
            assert torch.isfinite(slope * age + offset).all()
        torch.testing.assert_close(offset[:2], torch.full((2,), math.log(lookahead)))

    def test_nan_stays_visible(self) -> None:
        for lookahead in (1, 2):
            slope, offset = retention_affine(torch.tensor([math.nan]), lookahead=lookahead)
            assert (slope * 1 + offset).isnan().all()

    def test_bad_options(self) -> None:
        with pytest.raises(ValueError, match=r"lookahead must be >= 1 .*got 0"):
            retention_affine(BETA.log(), lookahead=0)
        with pytest.raises(TypeError, match=r"lookahead must be an integer, got 2\.0"):
            retention_affine(BETA.log(), lookahead=2.0)
        with pytest.raises(TypeError, match="age_offset must be an integer, got True"):
            retention_affine(BETA.log(), age_offset=True)


def test_save_file_is_what_the_loader_reads(tmp_path: Path) -> None:
    """A safetensors file made by hand from published tensors loads as it is."""
    gates = make_gates(CONFIG, torch.bfloat16)
    save_file(published_tensors(gates), tmp_path / "trimkv_gates.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    x = torch.randn(1, 5, 10)
    assert torch.equal(load_gates(tmp_path)(1, x), gates(1, x))
