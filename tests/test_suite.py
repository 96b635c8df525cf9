"""`evaluate`: its figures against the functions they stand for, cells, report and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimkv_kernels as tk
from trimkv_kernels import loading
from trimkv_kernels.cli import main
from trimkv_kernels.embedded import FIRST_HELD_OUT_SEED, embedded_model, make_recall_text
from trimkv_kernels.evaluation import kl, perplexity
from trimkv_kernels.evaluation.contestants import policy_group
from trimkv_kernels.evaluation.reader import agreement, pair_bytes, until
from trimkv_kernels.evaluation.suite import Cell, Grid, evaluate, interval
from trimkv_kernels.loading import ModelSource

SIZES: dict[str, Any] = {"buffer": 8, "chunk": 8}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_recall_text(160, seed=FIRST_HELD_OUT_SEED).text)
    return path


@pytest.fixture
def grid(text_file: Path) -> Grid:
    return Grid(
        policies=("streaming_llm", "h2o"), budgets=(16, 32), tasks=("kl", "perplexity"),
        lengths=(150,), samples=1, text_file=text_file, **SIZES,
    )  # fmt: skip


def by_name(cells: list[Cell]) -> dict[tuple[str, str, int | None], Cell]:
    return {(cell.task, cell.policy, cell.budget): cell for cell in cells}


def test_figures_are_those_of_the_functions(grid: Grid, tmp_path: Path) -> None:
    cells = by_name(evaluate(grid, ModelSource(), tmp_path))
    assert len(cells) == 2 * (1 + 2 * 2)
    model, tokenizer = embedded_model()
    assert grid.text_file is not None
    ids = tokenizer(Path(grid.text_file).read_text(), return_tensors="pt").input_ids[:, :150]
    for policy in grid.policies:
        for budget in grid.budgets:
            options = {"budget": budget, **SIZES}
            divergence = kl(model, ids, policy, **options)
            cell = cells["kl", policy, budget]
            blocks = len(cell.values)
            # the mean of two block means weighs blocks, which differ by less than half a block
            sizes = [64] * (blocks - 1) + [divergence.bounded_tokens - 64 * (blocks - 1)]
            total = sum(v * n for v, n in zip(cell.values, sizes, strict=True))
            assert total / divergence.bounded_tokens == pytest.approx(divergence.kl, rel=1e-4)
            assert cell.low <= cell.figure <= cell.high
            loss = perplexity(model, ids, policy, **options).loss
            values = cells["perplexity", policy, budget].values
            assert (64 * values[0] + 85 * values[1]) / 149 == pytest.approx(loss, rel=1e-5)
    full = cells["kl", "full", None]
    assert (full.figure, full.kv_bytes) == (0, 150 * pair_bytes(model))
    assert 0 < cells["kl", "h2o", 16].kv_bytes < cells["kl", "h2o", 32].kv_bytes < full.kv_bytes
    assert cells["kl", "h2o", 16].agreement is None


def test_a_budget_for_all_answers_as_the_full_cache(grid: Grid, tmp_path: Path) -> None:
    whole = replace(
        grid, tasks=("agreement", "conversation"), budgets=(16, 512), policies=("key_norm",),
        lengths=(80,), samples=2,
    )  # fmt: skip
    cells = by_name(evaluate(whole, ModelSource(), tmp_path))
    assert cells["agreement", "full", None].figure == 1
    assert cells["agreement", "key_norm", 512].figure == 1
    assert cells["agreement", "key_norm", 16].figure < 1
    answers = cells["conversation", "key_norm", 512]
    assert (answers.agreement, len(answers.answers)) == (1, 2)
    assert answers.answers == cells["conversation", "full", None].answers


def test_a_name_may_say_how_the_budget_is_shared_out(grid: Grid, tmp_path: Path) -> None:
    allocations = {"adaptive_heads": tk.AdaptiveHeads(), "layer_preference": tk.LayerPreference()}
    names = ("key_diff", "key_diff+uniform", "key_diff+global_top_k")
    names += tuple(f"key_diff+{name}" for name in allocations)
    shared = replace(grid, tasks=("kl",), budgets=(16,), policies=names)
    cells = by_name(evaluate(shared, ModelSource(), tmp_path))
    figures = {name: cells["kl", name, 16].figure for name in names}
    assert figures["key_diff+uniform"] == figures["key_diff"]
    assert len(set(figures.values())) == 4
    looks = {name for name in names if cells["kl", name, 16].group == "needs attention"}
    assert looks == {"key_diff+layer_preference"}
    model, tokenizer = embedded_model()
    ids = tokenizer(Path(shared.text_file).read_text(), return_tensors="pt").input_ids[:, :150]
    with torch.no_grad():
        full = model(ids).logits[0].double().log_softmax(-1)
    for name, allocation in allocations.items():
        with (
            torch.no_grad(),
            tk.patch(model, "key_diff", budget=16, allocation=allocation, buffer=8) as handle,
        ):
            cache = handle.new_cache()
            chunks = [model(part, past_key_values=cache).logits[0] for part in ids.split(8, dim=1)]
        bounded = torch.cat(chunks).double().log_softmax(-1)
        divergence = (full.exp() * (full - bounded)).sum(-1)[24:-1]
        values = cells["kl", f"key_diff+{name}", 16].values
        assert values == pytest.approx(
            [part.mean().item() for part in (divergence[:64], divergence[64:])], rel=1e-4
        )


def test_cells_are_measured_once_and_give_the_same_report(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(grid, ModelSource(), tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"torch", "transformers"} == set(report["versions"])
    assert len(report["cells"]) == len(first)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = evaluate(grid, ModelSource(), tmp_path / "again")
    for one, other in zip(first, again, strict=True):
        assert replace(one, tokens_per_second=0) == replace(other, tokens_per_second=0)

    gone = tmp_path / "cells" / "kl-150-h2o-16.json"
    gone.unlink()
    assert evaluate(grid, ModelSource(), tmp_path)[3].policy == "h2o"
    assert gone.is_file()

    def load(source: ModelSource) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading.ModelSource, "load_model", load)
    before = (tmp_path / "results.md").read_text()
    kept = evaluate(grid, ModelSource(), tmp_path)
    assert [c.figure for c in kept] == [c.figure for c in first]
    assert (tmp_path / "results.md").read_text().count("\n") == before.count("\n")
    with pytest.raises(ValueError, match=r"other setting, kl-150-full.json: seed was 0 and is 1"):
        evaluate(replace(grid, seed=1), ModelSource(), tmp_path)


def test_the_table(grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--policies", "h2o,streaming_llm", "--budgets", "32,16"]
    arguments += ["--tasks", "kl,conversation", "--length", "150", "--samples", "2"]
    arguments += ["--buffer", "8", "--chunk", "8", "--out", str(tmp_path)]
    assert main([*arguments, "--text-file", str(grid.text_file)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "results.md").read_text()
    titles = [line for line in printed.splitlines() if line.startswith("### ")]
    assert titles[:2] == ["### kl, 150 tokens, nats", "### conversation, 150 tokens, share"]
    assert "the full cache solves 0%, so this is the agreement with its answers" in titles[2]
    rows = [line.split(" | ")[:2] for line in printed.splitlines() if line.startswith("| ")]
    assert rows[2:5] == [
        ["| full", "full cache"], ["| streaming_llm", "needs nothing"], ["| h2o", "needs attention"]
    ]  # fmt: skip
    assert rows[0] == ["| policy", "needs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "klm"], "unknown task 'klm'; known: agreement"),
        (["--policies", "h3o"], "unknown policy 'h3o'.*Did you mean 'h2o'?"),
        (["--policies", "kvzap"], "policy 'kvzap' needs more than its name"),
        (
            ["--policies", "h2o+adaptive"],
            "unknown allocation 'adaptive' in 'h2o+adaptive'; known: un",
        ),
        (["--gates", "/no/such/folder"], "/no/such/folder"),
        (["--text-file", "/no/such"], "No such file or directory: '/no/such'"),
        (["--data", "gsm8k=/no/such"], "No such file or directory: '/no/such'"),
        (["--out", "{file}"], "out must be a folder, got the file"),
    ],
)
def test_mistakes_are_told_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: list[str], message: str,
) -> None:  # fmt: skip
    def load(source: ModelSource) -> None:
        raise AssertionError("something was loaded")

    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(loading.ModelSource, name, load)
    (tmp_path / "file").write_text("")
    arguments = ["evaluate", "--policies", "trimkv", "--budgets", "16", "--tasks", "kl"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, *(part.format(file=tmp_path / "file") for part in change)]) == 1
    error = capsys.readouterr().err
    assert all(part in error for part in message.split(".*")), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budgets", "16,0"], "must be an int of at least 1, got '0'"),
        (["--tasks", "kl,"], "must be names such as a,b, got 'kl,'"),
        (["--data", "gsm8k"], "must be TASK=FILE, got 'gsm8k'"),
    ],
)
def test_misuse(capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    arguments = ["evaluate", "--policies", "h2o", "--budgets", "16", "--tasks", "kl", "--out", "x"]
    with pytest.raises(SystemExit):
        main([*arguments, *change])
    assert message in capsys.readouterr().err


def test_intervals() -> None:
    # Wilson's interval of 8 in 10, as in Brown, Cai and DasGupta (2001)
    assert interval([1.0] * 8 + [0.0] * 2, shares=True) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = interval([1.0] * 10, shares=True)
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert interval([0.0]) == (0, 0)
    assert interval([0.25] * 5) == (0.25, 0.25)
    values = [0.1 * i for i in range(100)]
    low, high = interval(values)
    # mean 4.95, standard deviation of it 0.289: the percentiles lie at 1.96 of them
    assert (low, high) == pytest.approx((4.95 - 0.566, 4.95 + 0.566), abs=0.05)
    assert interval(values) == (low, high)


def test_what_policies_need() -> None:
    groups = {name: policy_group(name) for name in ("full", "key_diff", "snap_kv", "trimkv")}
    assert groups == {
        "full": "full cache", "key_diff": "needs nothing", "snap_kv": "needs attention",
        "trimkv": "trained",
    }  # fmt: skip
    assert policy_group("expected_attention") == "needs attention"
    assert policy_group("kvzap") == "trained"


def test_agreement_and_ends() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert (agreement([], []), agreement([], [1])) == (1, 0)
    assert until([5, 6, 7, 6], {6}) == [5]
    assert until([5, 7], {6}) == [5, 7]
