"""`benchmarks/decode.py`: its bytes by hand, its checks, and a toy run of every contestant."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
GPU = SimpleNamespace(type="cuda")


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, and by their names the modules of its parts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parts = {
        part: importlib.import_module(f"decode_{part}") for part in ("cases", "steps", "rounds")
    }
    return SimpleNamespace(command=importlib.import_module("decode"), **parts)


def toy_case(decode: Any, **changes: Any) -> Any:
    (case,) = decode.cases.subset_cases(torch.device("cpu"), True)
    return replace(case, **changes)


def test_floor_of_qwen3_4b_by_hand(decode: Any) -> None:
    """36 layers of 8 heads x 128 in bf16; 4022.5 M weights, from the published sizes."""
    cases = decode.cases.subset_cases(torch.device("cuda"), False)
    case = next(case for case in cases if case.batch == 4)
    assert case.pair_bytes == 36 * 4096
    with torch.device("meta"):
        model = decode.cases.make_model(case.setting)
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert weights == pytest.approx(8.045e9, rel=1e-4)
    # a full head holds 1025 to 1152 pairs while a step attends
    ours = decode.cases.Entry("trimkv_loop", buffer=128)
    assert case.floor_bytes(ours, weights) == weights + 4 * 147456 * 1088.5
    full = decode.cases.Entry("full_eager", context=32768)
    assert case.floor_bytes(full, weights) == weights + 4 * 147456 * (32768 + 16.5)
    assert case.floor_bytes(decode.cases.Entry("no_attention"), weights) == weights


def test_rounds_are_whole_periods(decode: Any) -> None:
    case = decode.cases.subset_cases(torch.device("cuda"), False)[0]
    steps = {
        buffer: case.steps(decode.cases.Entry("cat", buffer=buffer)) for buffer in (1, 24, 128)
    }
    assert steps == {1: 32, 24: 48, 128: 128}
    assert case.steps(decode.cases.Entry("full_eager", context=9)) == 32


def test_cache_that_does_not_fit(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(decode.cases.subset_cases(GPU, False)[0], batch=64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (131 * 10**9, 150 * 10**9))
    full = decode.cases.Entry("static_compiled", context=32768)
    # 64 x 32,800 tokens of 147,456 bytes
    assert (
        decode.rounds.does_not_fit(case, full) == "does not fit: a cache of 310 GB, 131 GB are free"
    )
    assert decode.rounds.does_not_fit(case, decode.cases.Entry("trimkv_loop", buffer=128)) is None


def test_toy_run_times_everybody(decode: Any) -> None:
    case = toy_case(decode, rounds=2)
    start = time.monotonic()
    (records,) = decode.rounds.run_cases([case], start + 60, copy=1.0)
    passed = time.monotonic() - start
    assert [record.contestant for record in records] == [x.contestant for x in case.entries]
    for record in records:
        assert (record.status, record.note) == ("ok", None)
        assert record.replays == 2
        assert 0 < record.median_us * record.launches * 2 / 1e6 < passed
        assert record.tokens_per_s == pytest.approx(2e6 / record.median_us)
        seconds = record.bytes / 1e9  # at the 1 GB/s above
        assert record.copy_share == pytest.approx(seconds / (record.median_us / 1e6))
        assert record.relative_error < 1e-5
        counts = {} if "compiled" not in record.contestant else {
            "graphs": 1, "graph_breaks": 0, "cudagraph_skips": 0, "recompiles": 0
        }  # fmt: skip
        assert record.compile == counts


def test_full_caches_are_filled_alike_and_cut_back(decode: Any) -> None:
    case = toy_case(decode)
    with torch.no_grad():
        models = decode.cases.Models(case)
        dynamic, static = (
            decode.steps.build(models, decode.cases.Entry(name, context=64))
            for name in (decode.cases.FULL, decode.cases.STATIC)
        )
        for stepper in (dynamic, static):
            stepper.advance(3)
            assert int(stepper.contestant.cache.get_seq_length()) == 67
            stepper.restore()
            assert int(stepper.contestant.cache.get_seq_length()) == 64
    for a, b in zip(dynamic.contestant.cache.layers, static.contestant.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys[:, :, :64])
        assert torch.equal(a.values, b.values[:, :, :64])
        assert a.keys.std() == pytest.approx(1, abs=0.1)


def test_bounded_caches_start_a_period(decode: Any) -> None:
    case = toy_case(decode)
    with torch.no_grad():
        models = decode.cases.Models(case)
        cat, ours = (
            decode.steps.build(models, decode.cases.Entry(name, buffer=8))
            for name in (decode.cases.CAT, decode.cases.EAGER)
        )
        for steps, held in ((0, 16), (7, 23), (1, 16)):
            for stepper in (cat, ours):
                stepper.advance(steps)
            used = ours.contestant.cache.stats().slots_used
            assert used.unique().tolist() == [held]
            assert cat.contestant.cache.layers[0].keys.shape[2] == held


def test_positions_are_made_beside_the_keys(decode: Any) -> None:
    layer = decode.steps.BoundedCatCache(1, budget=4, buffer=2).layers[0]
    layer.new_log_beta = torch.zeros(1, 1, 3, device="meta")
    layer.update(*torch.zeros(2, 1, 1, 3, 8, device="meta"))
    assert layer.position.device.type == "meta"


def test_wrong_results_are_not_timed(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = decode.steps.Stepped.advance

    def slip(self: Any, steps: int) -> None:
        stepped(self, steps)
        if isinstance(self.contestant.cache, decode.steps.BoundedCatCache):
            self.contestant.logits = self.contestant.logits * 1.01

    monkeypatch.setattr(decode.steps.Stepped, "advance", slip)
    entries = tuple(
        decode.cases.Entry(name, buffer=8) for name in (decode.cases.EAGER, decode.cases.CAT)
    )
    (records,) = decode.rounds.run_cases(
        [toy_case(decode, entries=entries)], time.monotonic() + 60, None
    )
    assert [record.status for record in records] == ["ok", "failed"]
    assert records[1].note == "ValueError: wrong result: relative error 0.01, allowed 0.001"


def test_without_time_nothing_is_run(decode: Any) -> None:
    case = toy_case(decode, backend="inductor")
    (late,) = decode.rounds.run_cases([case], time.monotonic(), None)
    assert {record.note for record in late} == {"the part's time was up"}
    (soon,) = decode.rounds.run_cases(
        [case], time.monotonic() + decode.rounds.COMPILE_SECONDS, None
    )
    notes = {record.contestant: record.note for record in soon}
    without = "no time was left to compile"
    assert notes.pop("trimkv_compiled") == notes.pop("static_compiled") == without
    assert set(notes.values()) == {None}


def test_the_headline_comes_first_and_the_rest_as_time_allows(
    decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU would: a compilation takes 60 s, anything else 8 s for each entry, of 205 s."""
    rounds, now = decode.rounds, [0.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rounds, "Models", lambda case: SimpleNamespace(case=case, weight_bytes=1))
    monkeypatch.setattr(rounds, "reserved_bytes", lambda device: 0)
    monkeypatch.setattr(rounds, "does_not_fit", lambda case, entry: None)
    monkeypatch.setattr(rounds, "check", lambda case, run, runs: None)
    monkeypatch.setattr(rounds, "finish", lambda models, run, clocks, copy: None)
    monkeypatch.setattr(rounds, "decode_in_turns", lambda case, runs, deadline: {})

    def build(models: Any, entry: Any) -> str:
        now[0] += 60 if models.case.compiles(entry) else 0
        return entry.contestant

    def first_period(case: Any, run: Any) -> None:
        now[0] += 8

    monkeypatch.setattr(rounds, "build", build)
    monkeypatch.setattr(rounds, "first_period", first_period)
    cases = decode.cases.subset_cases(GPU, False)
    found = [
        (record.shape["batch"], record.contestant, record.status, record.note)
        for records in rounds.run_cases(cases, 205.0, None, in_order=True)
        for record in records
    ]
    both = [
        (batch, name, "ok", None)
        for batch in (1, 8)
        for name in ("full_eager", "trimkv_eager", "trimkv_loop")
    ]
    assert found[:6] == both
    late = "no time was left to compile"
    status = {(batch, name): note for batch, name, _, note in found[6:]}
    assert status == {
        (4, "full_eager"): None, (4, "trimkv_eager"): None, (4, "trimkv_loop"): late,
        (4, "cat"): None, (4, "trimkv_compiled"): late, (4, "static_compiled"): late,
        (64, "trimkv_eager"): None, (64, "trimkv_loop"): late,
    }  # fmt: skip


def test_a_round_on_a_gpu(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits before and after, restores before, and counts what the round takes beyond."""
    log: list[Any] = []
    now = [0.0]

    def advance(steps: int) -> None:
        log.append(steps)
        now[0] += 0.5

    monkeypatch.setattr(decode.rounds.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 70)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    stepper = SimpleNamespace(advance=advance, restore=lambda: log.append("restore"))
    run = decode.rounds.Run(decode.cases.Entry("cat", buffer=50), SimpleNamespace(), stepper)
    decode.rounds.decode_round(SimpleNamespace(device=GPU, steps=lambda entry: 50), run)
    assert log == ["restore", "reset", "wait", 50, "wait"]
    assert run.seconds == [0.01]
    assert run.transient_bytes == 30


def test_command_writes_its_record(
    decode: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "decode.json"
    sizes = ["--models", "toy", "--contexts", "32", "64", "--rounds", "2", "--threads", "1"]
    assert decode.command.main(["--device", "cpu", *sizes, "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    shapes = [(x["contestant"], x["shape"].get("context"), x["shape"].get("buffer"))
              for x in kept["records"]]  # fmt: skip
    assert shapes == [
        ("full_eager", 32, None), ("full_eager", 64, None),
        ("trimkv_eager", None, 8), ("cat", None, 8),
        ("trimkv_eager", None, 1), ("cat", None, 1),
        ("no_attention", None, None),
    ]  # fmt: skip
    assert {x["status"] for x in kept["records"]} == {"ok"}
    assert kept["settings"]["toy"]["prompt"] == 16 + 2 * 8
    assert [goal["verdict"] for goal in kept["goals"][:2]] == ["not measured"] * 2
    ms = {shape: x["median_us"] for shape, x in zip(shapes, kept["records"], strict=True)}
    floor = ms["no_attention", None, None]
    share = (ms["trimkv_eager", None, 1] - floor) / (ms["cat", None, 1] - floor)
    assert kept["goals"][2]["measured"] == pytest.approx(share)
    assert "no_attention" in capsys.readouterr().out


def test_a_gpu_that_is_asked_for_must_be_there(
    decode: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode.command.main(["--device", "cuda"]) == 2
    assert "no GPU here" in capsys.readouterr().err


@pytest.fixture
def measured(decode: Any) -> Any:
    """Three, four and six ms for the loop; 45 and 9 for full caches; half a bandwidth."""
    times = {
        (4, "trimkv_loop"): 3.0, (8, "trimkv_loop"): 4.0, (64, "trimkv_loop"): 6.0,
        (4, "full_eager"): 45.0, (4, "static_compiled"): 9.0,
    }  # fmt: skip
    records = []
    for case in decode.cases.subset_cases(torch.device("cuda"), False):
        for entry in case.entries:
            record = decode.rounds.blank(case, entry)
            ms = times.get((case.batch, entry.contestant), 10.0)
            record.bytes = int(ms * 1e6)  # a GB per second
            if entry.contestant == "trimkv_compiled":
                names = ("graphs", "graph_breaks", "cudagraph_skips", "recompiles")
                record.compile = dict(zip(names, (1, 0, 0, int(case.batch == 4)), strict=True))
            record.set_timing(decode.rounds.measure.summarize([1e3 * ms] * 3), {}, 2.0)
            records.append(record)
    return decode.command.Results(records)


def test_goals_read_the_results(decode: Any, measured: Any) -> None:
    rows = [goal.row(measured) for goal in decode.command.report.STEP_GOALS]
    assert [(row["goal"], row["measured"], row["verdict"]) for row in rows] == [
        ("G1", pytest.approx(3), "met"), ("G2", pytest.approx(4), "missed"),
        ("G3", pytest.approx(6), "met"), ("G4", pytest.approx(15), "met"),
        ("G4", pytest.approx(3), "met"), ("G5", 1, "missed"),
    ]  # fmt: skip


def test_steps_stand_in_the_report(decode: Any, measured: Any, tmp_path: Path) -> None:
    text = decode.command.report.markdown({"device": "a GPU"}, {"copy": 2.0}, [], measured)
    assert "| G4 | full cache of 32K, eager / decode_loop, b=4 | >= 12 x | 16 | 15 | met |" in text
    steps = text.split("## Decode steps")[1]
    assert steps.count("| trimkv_loop |") == 4
    assert "| trimkv_loop | 3 | 3 - 3 |  |  | 50 |" in steps
    assert "trimkv_loop" not in text.split("## Figures")[1].split("## Decode steps")[0]
    pytest.importorskip("matplotlib")
    assert decode.command.report.plot(measured, tmp_path) == ["decode.png"]


def test_the_small_model_is_measured_beside_stock(
    decode: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shape is SmolLM2-135M's (134.5 M weights, published), and every goal gets a figure."""
    small = importlib.import_module("small_model")
    with torch.device("meta"):
        model = small.make_model(small.SETTING, small.LONG)
    assert sum(x.numel() for x in model.parameters()) == 134_515_008
    assert small.main(["--toy", "--cpu-time", "--out", str(tmp_path / "out.json")]) == 0
    kept = json.loads((tmp_path / "out.json").read_text())
    us = {(x["op"], x["contestant"], x["shape"]["prompt"]): x["median_us"] for x in kept["records"]}
    assert len(us) == 2 * 2 * 4
    first, _, speedup, *_, prompt = [goal["measured"] for goal in kept["goals"]]
    both = [us["generate", policy, 8] for policy in ("streaming_llm", "key_norm")]
    assert first == pytest.approx(max(both) / us["generate", "full", 8])
    both = [us["generate", policy, 48] for policy in ("streaming_llm", "key_norm")]
    assert speedup == pytest.approx(us["generate", "full", 48] / max(both))
    assert prompt == pytest.approx(us["prompt", "h2o", 48] / us["prompt", "full", 48])
    assert "not measured" not in capsys.readouterr().out
