"""`trimkv-kernels perplexity` and `kl`, the math example, and the migration pages."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import trimkv_kernels as tk
from trimkv_kernels.cli import main
from trimkv_kernels.embedded import (
    EMBEDDED_MODEL,
    FIRST_HELD_OUT_SEED,
    embedded_model,
    make_recall_text,
)
from trimkv_kernels.evaluation import kl, perplexity

ROOT = Path(__file__).parent.parent
GATES = EMBEDDED_MODEL / "retention_gates"
SIZES = ["--budget", "32", "--buffer", "8", "--chunk", "8"]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(make_recall_text(120, seed=FIRST_HELD_OUT_SEED).text)
    return path


@pytest.mark.parametrize(("command", "measure"), [("perplexity", perplexity), ("kl", kl)])
def test_measures_of_a_text_file(
    command: str, measure: object, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = embedded_model()
    input_ids = tokenizer(text_file.read_text(), return_tensors="pt").input_ids
    expected = measure(model, input_ids, "key_norm", budget=32, buffer=8, chunk=8)
    arguments = [command, "--text-file", str(text_file), "--policy", "key_norm", *SIZES]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(vars(expected))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == f"{expected}\n"
    assert printed.startswith("key_norm, budget 32, buffer 8, 120 tokens read 8 at a time\n")
    assert "79 " in printed  # 119 predictions less the 40 before the first eviction


def test_without_options_the_small_model_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kl", "--chunk", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    config = tk.TrimKV.from_pretrained(GATES).gates.config
    assert (result["policy"], result["tokens"]) == ("trimkv", 1000)
    assert (result["budget"], result["buffer"]) == (config.budget, config.buffer)
    assert 0 < result["kl"] < 1


def test_gates_are_taken_from_a_folder(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["perplexity", "--text-file", str(text_file), *SIZES, "--gates", str(GATES)]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "trimkv"
    assert main([*arguments, "--policy", "h2o"]) == 1
    assert "gates are for policy 'trimkv', got policy 'h2o'" in capsys.readouterr().err


def test_refusals_name_the_numbers(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["perplexity", "--policy", "random", "--chunk", "64", "--text-file", str(text_file)]
    assert main([*arguments, "--budget", "100", "--buffer", "20"]) == 1
    error = capsys.readouterr().err
    assert "at least 130 tokens at budget=100, buffer=20, chunk=64, got 120;" in error
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("Quite another vocabulary than that of ada , of the mill .")
    assert main(["kl", "--text-file", str(foreign)]) == 1
    assert re.search(r"does not know \d+ of the text's 12 tokens", capsys.readouterr().err)


def test_qwen3_math_example_on_the_small_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "examples" / "qwen3_math.py")
    question = "ada keeps amber . " * 8 + "what does ada keep ?"
    sizes = ["--budget", "16", "--buffer", "4", "--new", "20"]
    arguments = [script, "--checkpoint", str(GATES), *sizes, "--question", question]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(script, run_name="__main__")
    answer, figures = capsys.readouterr().out.split("---\n")
    assert answer.split()[0] == "amber"
    assert re.search(r"at most (\d+) slots used, [1-9]\d* pairs evicted", figures)


@pytest.mark.parametrize(("page", "blocks"), [("trimkv", 4), ("kvpress", 4)])
def test_migration_page_runs(page: str, blocks: int, tmp_path: Path) -> None:
    text = (ROOT / "docs" / f"migrate-from-{page}.md").read_text()
    ours = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(ours) == blocks
    for path, small in (
        ('"ngocbh/TrimKV-Qwen3-4B-Math"', repr(str(GATES))),
        ('"Qwen/Qwen3-4B"', repr(str(EMBEDDED_MODEL))),
        ("budget=512, buffer=128", "budget=64, buffer=16"),
        ("max_new_tokens=32768", "max_new_tokens=8"),
    ):
        ours = [block.replace(path, small) for block in ours]
    model, tokenizer = embedded_model()
    source = make_recall_text(300, seed=FIRST_HELD_OUT_SEED)
    inputs = tokenizer(source.prompt(source.questions[0]), return_tensors="pt")
    with torch.no_grad():
        for block in ours:
            model, _ = embedded_model()
            exec(block, {"model": model, "inputs": inputs, "tokenizer": tokenizer, "tk": tk})


def test_migration_pages_name_what_exists() -> None:
    names = set(tk.available_policies())
    page = (ROOT / "docs" / "migrate-from-kvpress.md").read_text()
    presses = page[page.index("## Presses") : page.index("## Ratio")]
    rows = [line.split("|") for line in presses.splitlines() if line.startswith("| `")]
    assert len(rows) >= 12
    for row in rows:
        for name in re.findall(r'"(\w+)"', row[2]):
            assert name in names
