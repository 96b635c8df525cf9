"""The command ``trimkv-kernels``."""

import json
from pathlib import Path

import pytest
import torch
from recall_rows import recall_rows, write_jsonl

from trimkv_kernels.cli import main
from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.gates import load_gates


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "recall.jsonl", recall_rows(4))


def train(data: Path, out: Path, *options: str) -> int:
    return main(
        ["train", "--model", str(EMBEDDED_MODEL), "--data", str(data), "--budget", "4",
         "--out", str(out), "--use_cpu", "--disable_tqdm", "true", "--max_steps", "2",
         "--intermediate_size", "8", *options]
    )  # fmt: skip


def test_train_resume_convert(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gates"
    # nothing to go on from is no error: one command serves the first start and every later one
    assert train(data, out, "--save_steps", "1", "--logging_steps", "1", "--resume") == 0
    config = load_gates(out).config
    assert (config.budget, config.steps, config.data) == (4, 2, "recall.jsonl")
    assert config.base_model == str(EMBEDDED_MODEL)
    assert "'capacity_loss'" in capsys.readouterr().out
    assert train(data, out, "--resume", "--max_steps", "3") == 0
    assert load_gates(out).config.steps == 3
    assert main(["convert", str(out), str(tmp_path / "pth"), "--to", "published"]) == 0
    assert main(["convert", str(tmp_path / "pth"), str(tmp_path / "back"),
                 "--to", "safetensors"]) == 0  # fmt: skip
    for name, tensor in load_gates(out).state_dict().items():
        assert torch.equal(load_gates(tmp_path / "back").state_dict()[name], tensor)


def test_texts_are_tokenized(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ada keeps amber . " * n}) for n in (3, 4, 5)))
    assert train(path, tmp_path / "gates", "--context", "32", "--scope", "global") == 0
    config = load_gates(tmp_path / "gates").config
    assert (config.kind, config.context) == ("rg10", 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base_loss", "kl"], "trimkv-kernels train: base_loss must be one of"),
        (["--context", "9"], "tokens, and context is 9: cut it, or raise context"),
        (["--no_such_option", "1"], "Some specified arguments are not used"),
    ],
)
def test_errors_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert train(data, tmp_path / "gates", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "gates").exists()


def test_convert_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path), "--to", "published"]) == 1
    assert "trimkv-kernels convert: no retention-gate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path), str(tmp_path), "--to", "published", "--what"])
    assert "unrecognized arguments: --what" in capsys.readouterr().err
