"""`custom_generate/`: a model's folder that decodes bounded wherever it is loaded."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, dynamic_module_utils

import trimkv_kernels as tk
from trimkv_kernels.cli import main
from trimkv_kernels.custom_generate import write_custom_generate
from trimkv_kernels.integrations.discovery import find_handle

OPTIONS = {"policy": "streaming_llm", "budget": 12, "buffer": 4}
PROMPT = torch.arange(3, 33)[None]


@pytest.fixture
def folder(qwen3: Qwen3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder; the code of folders is copied to a place of the test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    qwen3.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def generate(model: Qwen3ForCausalLM, **options: object) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=20, do_sample=False, eos_token_id=None, **options)


@pytest.fixture
def bounded(folder: Path) -> torch.Tensor:
    """What the patched model says."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with tk.patch(model, **OPTIONS):
        return generate(model)


def test_a_model_that_brings_its_folder(
    folder: Path, bounded: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--policy", "streaming_llm", "--budget", "12", "--buffer", "4"]
    assert main(["custom_generate", str(folder), *sizes]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(generate(model), bounded)
    assert torch.equal(generate(model), bounded)
    assert find_handle(model).options.budget == 12
    tk.unpatch(model)
    stock = generate(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(generate(model), stock)
    assert not torch.equal(stock, bounded)


def test_a_folder_by_itself(folder: Path, bounded: torch.Tensor, tmp_path: Path) -> None:
    write_custom_generate(tmp_path / "ours", **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = {"custom_generate": str(tmp_path / "ours"), "trust_remote_code": True}
    assert torch.equal(generate(model, **ours), bounded)
    assert torch.equal(generate(model, **ours), bounded)


def test_a_failed_patch_leaves_the_model_as_it_was(folder: Path) -> None:
    written = write_custom_generate(folder, policy="streaming_llm", budget=12, buffer=4)
    code = written / "generate.py"
    code.write_text(code.read_text().replace(json.dumps(OPTIONS), '{"budget": 3}'))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="budget"):
            generate(model)
    assert find_handle(model) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "streaming_lm"}, "Did you mean 'streaming_llm'"),
        ({"budget": 0}, "budget must be an int of at least 1, got 0"),
        ({"prefill_chunk": True}, "prefill_chunk must be an int of at least 1, got True"),
    ],
)
def test_options_are_checked_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_custom_generate(tmp_path, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["custom_generate", str(tmp_path / "nothing")]) == 1
    assert "there is no" in capsys.readouterr().err
    assert main(["custom_generate", str(tmp_path)]) == 1
    assert "without config.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
