"""Gates in the published layout and ours, both ways, and on their way to the hub."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN
from trimkv_kernels import files
from trimkv_kernels import gates as gates_package
from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.gates import (
    GateConfig,
    RetentionGates,
    checkpoint,
    convert_gates,
    load_gates,
    push_to_hub,
    save_gates,
    save_published,
)


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_published_to_ours_and_back(kind: str, tmp_path: Path) -> None:
    source = GOLDEN / kind / "gates"
    convert_gates(source, tmp_path / "ours", layout="safetensors")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "trimkv_config.json",
        "trimkv_gates.safetensors",
    ]
    convert_gates(tmp_path / "ours", tmp_path / "back", layout="published")
    before = torch.load(source / "trimkv_weights.pth", weights_only=True)
    after = torch.load(tmp_path / "back" / "trimkv_weights.pth", weights_only=True)
    assert type(after) is dict
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    published = json.loads((source / "config.json").read_text())
    assert config["base_model"] == str(GOLDEN / kind / "base")  # found from any folder
    for key in ("retention_gate", "retention_gate_intermediate_size", "memory_size", "hidden_size",
                "num_hidden_layers", "rope_theta", "rope_scaling", "vocab_size",
                "tie_word_embeddings", "model_type"):  # fmt: skip
        assert config[key] == published[key], key
    assert config["trainable_params"] == "self_attn.retention_gate"
    assert config["tie_retention_gate_layers"] == (kind == "rg10")


def make_gates(**changes: Any) -> RetentionGates:
    options = {"kind": "rg", "hidden_size": 128, "intermediate_size": 8, "num_layers": 2,
               "num_kv_heads": 2, "bias_init": 6.0, "base_model": str(EMBEDDED_MODEL),
               "budget": 16, "context": 512, "data": "recall", "steps": 30}  # fmt: skip
    torch.manual_seed(0)
    return RetentionGates(GateConfig(**{**options, **changes}))


def test_published_config_of_our_gates(tmp_path: Path) -> None:
    save_gates(make_gates(), tmp_path / "ours")
    convert_gates(tmp_path / "ours", tmp_path / "published", layout="published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    # transformers 4 reads these where transformers 5 has rope_parameters
    assert (config["rope_theta"], config["rope_scaling"]) == (1e6, None)
    assert (config["memory_size"], config["max_seq_len"]) == (16, 512)
    assert "buffer_size" not in config
    loaded = load_gates(tmp_path / "published")
    assert (loaded.config.data, loaded.config.steps) == ("recall", 30)
    for name, tensor in make_gates().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_scaled_positions_get_their_old_name(tmp_path: Path) -> None:
    base = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    rope = {"rope_theta": 5e6, "rope_type": "yarn", "factor": 4.0}
    save_published(make_gates(), tmp_path, base_config={**base, "rope_parameters": rope})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e6
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


def test_errors(tmp_path: Path) -> None:
    save_gates(make_gates(), tmp_path / "ours")
    with pytest.raises(ValueError, match="layout must be one of 'safetensors', 'published', got"):
        convert_gates(tmp_path / "ours", tmp_path, layout="pth")
    with pytest.raises(ValueError, match="its hidden_size must be 128, got 64"):
        save_published(make_gates(), tmp_path, base_config={"hidden_size": 64})
    with pytest.raises(ValueError, match="the gates name no base model, which the published"):
        save_published(make_gates(base_model=None), tmp_path, base_config={})
    with pytest.raises(TypeError, match="gates must be a RetentionGates"):
        save_published(torch.nn.Linear(1, 1), tmp_path, base_config={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_base_config_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gates(make_gates(base_model="owner/tiny", base_revision="abc"), tmp_path / "ours")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"], options["revision"]))
        if len(asked) > 1:
            raise OSError("offline")
        return str(EMBEDDED_MODEL)

    monkeypatch.setattr(files, "snapshot_download", download)
    convert_gates(tmp_path / "ours", tmp_path / "a", layout="published")
    assert asked == [("owner/tiny", ["config.json"], "abc")]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["base_model"] == "owner/tiny"
    with pytest.raises(ValueError, match="needs the config of the base model 'owner/tiny'"):
        convert_gates(tmp_path / "ours", tmp_path / "b", layout="published")
    assert not (tmp_path / "b").exists()


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            pushed["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> None:
            pushed["repo"] = (repo_id, options)

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
            folder = Path(folder_path)
            pushed["files"] = sorted(path.name for path in folder.iterdir())
            pushed["tensors"] = load_file(folder / "trimkv_gates.safetensors")
            pushed["card"] = (folder / "README.md").read_text()
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(checkpoint, "HfApi", Api)
    gates = make_gates(base_model="owner/tiny")
    address = push_to_hub(gates, "me/gates", private=True, token="secret")
    assert address == "https://hub/me/gates/commit/1"
    assert pushed["token"] == "secret"
    assert pushed["repo"] == ("me/gates", {"private": True, "exist_ok": True})
    assert pushed["files"] == ["README.md", "trimkv_config.json", "trimkv_gates.safetensors"]
    assert len(pushed["tensors"]) == len(gates.state_dict())
    assert "base_model: owner/tiny\n" in pushed["card"]
    assert "| Training data | recall |" in pushed["card"]


def test_card_does_not_tell_paths_of_this_machine() -> None:
    assert str(EMBEDDED_MODEL) not in gates_package.gate_card(make_gates().config)
