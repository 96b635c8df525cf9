"""`make gpu` where there is no GPU: what it says, what a dry run computes, what a run reports."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
GOALS = {"D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8", "E1", "E2", "E3", "E4", "C1", "C2"}
GOALS |= {"B1", "X1", "X2", "T1", "T2", "T3", "T4", "R1", "R2"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / name) for name in ("src", "benchmarks"))
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a dry run left its files."""
    folder = tmp_path_factory.mktemp("gpu-dry")
    done = run("--dry", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"gpu.{name}")

    return load


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_without_a_gpu_says_so(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_part_is_named(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu("run").main(["--dry", "--parts", "decode,cook"])
    assert "got cook" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_computes_everything(dry: Path, gpu: Any) -> None:
    lines = records(dry)
    report = gpu("report")
    fields = set(report.Record.__dataclass_fields__)
    machine = {"device", "driver", "torch", "triton", "transformers", "python", "commit"}
    machine |= {"run", "part", "tests", "rates"}
    for line in lines:
        assert set(line) == fields | machine
        where = (line["op"], line["contestant"], line["shape"], line["note"])
        assert line["status"] in ("ok", "absent"), where
        assert (line["note"] is None) == (line["status"] == "ok"), where
        assert line["median_us"] is line["p20_us"] is line["p80_us"] is None
        if line["status"] == "ok":
            assert line["launches"] > 0
            assert line["bytes"] > 0
            assert line["max_error"] < 1e-3, where
    computed = {line["contestant"] for line in lines if line["status"] == "ok"}
    assert {*report.OURS, "trimkv_0.1.5_eager", "flex", "torch_compiled"} <= computed
    pictured = {op for ops in report.PICTURES.values() for op in ops}
    assert {line["op"] for line in lines} == pictured | {"serving"}
    # in the same bytes: (16 + 8) slots a row, one row to read in; 40 + 8 tokens of a full cache
    running = {x["contestant"]: x["shape"]["running"] for x in lines if x["op"] == "serving"}
    assert running == {"rows": 3, "full_generate": 2}
    # a rival that is compiled anew for each shape runs in a part of its own, beside ours again
    parts = {line["part"] for line in lines if line["contestant"] in ("flex", "flex_tuned")}
    assert parts == {"flex"}
    assert {line["part"] for line in lines if line["contestant"] == "extend_attention"} == {
        "extend", "flex"
    }  # fmt: skip


@pytest.mark.slow
def test_dry_run_writes_few_files(dry: Path) -> None:
    names = ["notes.txt", "results.jsonl", "results.md"]
    assert sorted(path.name for path in dry.iterdir()) == names


@pytest.mark.slow
def test_every_goal_stands_in_the_table(dry: Path) -> None:
    rows = [line.split(" | ") for line in (dry / "results.md").read_text().splitlines()]
    goals = [row for row in rows if row[0].removeprefix("| ") in GOALS]
    assert {row[0].removeprefix("| ") for row in goals} == GOALS
    assert all("not measured" in row for row in goals)


@pytest.fixture
def measured(gpu: Any) -> Any:
    """Results of a run on a GPU that took ten microseconds for ours and twenty for the others."""
    cases, report, rivals = gpu("cases"), gpu("report"), gpu("rivals")
    timing = gpu("measure").Timing
    found = []
    for part in cases.CASES.values():
        for case in part(torch.device("cpu"), False):
            entries = [(x, "") for x in rivals.contestants_of(case)]
            entries += [(x, "flex") for x in rivals.contestants_of(case, slow=True)]
            for contestant, name in entries:
                ours = contestant.name in report.OURS
                us = (20.0 - 10.0 * ours) * (1 + (case.shape.get("backward") is True))
                record = report.Record(case.op, contestant.name, case.shape, "bfloat16", "ok")
                record.part, record.flops, record.wall_us = name, case.flops, 3 * us
                record.bytes = 10**6
                record.set_timing(timing(30, us, us, us, 0.0), {}, copy_gb_per_s=200.0)
                found.append(record)
    return report.Results(found)


def test_goals_read_the_results(measured: Any, gpu: Any) -> None:
    rows = [goal.row(measured) for goal in gpu("report").GOALS]
    values = {(row["goal"], row["quantity"]): row for row in rows}
    unmeasured = {row["goal"] for row in rows if row["verdict"] == "not measured"}
    assert unmeasured == {"X2", "T3"}  # rivals that are not among ours
    assert values["D1", "decode, 1024 slots, b=1"]["verdict"] == "missed"
    d2 = values["D2", "decode, 1024 slots, b=8"]
    assert (d2["measured"], d2["verdict"], d2["note"]) == (10.0, "met", "stretch met")
    assert values["D4", "decode, 4096 slots, b=64, of the copy"]["measured"] == pytest.approx(50)
    for row in rows:
        if row["target"].endswith(" x") and row["verdict"] != "not measured":
            same = row["goal"] in ("T4", "B1")  # of two of ours
            assert row["measured"] == pytest.approx(1.0 if same else 2.0), row
    assert values["R2", "sum, both ways, 8 x 128K"]["measured"] == pytest.approx(0.02)


def test_report_of_a_run(measured: Any, gpu: Any, tmp_path: Path) -> None:
    report = gpu("report")
    text = report.markdown({"device": "a GPU"}, {"copy": 4300.0, "matmul": 780.0}, ["x"], measured)
    assert "copy 4300 GB/s" in text
    assert text.count("| append_attention |") == 20 + 6  # once more beside FlexDecoding
    report.append_lines(tmp_path / "lines", {"device": "a GPU"}, measured.records)
    assert len((tmp_path / "lines").read_text().splitlines()) == len(measured.records)


def test_calls_fit_their_minutes(gpu: Any) -> None:
    run = gpu("run")
    minutes = {name: sum(parts.values()) / 60 for name, parts in run.CALLS.items()}
    assert minutes["kernels"] <= 4
    assert minutes["steps"] <= 5
    assert minutes["tune"] <= 5
    assert next(iter(run.CALLS["kernels"])) == "tests"
    assert list(run.CALLS["steps"])[-1] == "flex"


def test_an_error_of_the_device_costs_one_contestant(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is lost to a process is run again by the next one, but for what it was lost to."""
    part, rivals = gpu("part"), gpu("rivals")
    lost = []

    def check(case: Any, run: Any, record: Any) -> None:
        if record.contestant == "append_attention_mass":
            lost.append(1)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(part, "check", check)
    command = ["decode", "--out", str(tmp_path), "--run", "1", "--dry"]
    assert part.main(command) == part.DEVICE_ERROR
    assert [line["status"] for line in records(tmp_path)] == ["failed"]
    assert part.main(command) == 0
    assert lost == [1]
    found = {line["contestant"]: line["status"] for line in records(tmp_path)}
    cases = gpu("cases").decode_cases(torch.device("cpu"), True)
    assert set(found) == {x.name for case in cases for x in rivals.contestants_of(case)}
    assert [name for name, status in found.items() if status == "failed"] == [
        "append_attention_mass"
    ]
    assert found["append_attention"] == found["sdpa_flash"] == "ok"
    before = (tmp_path / "results.jsonl").read_text()
    assert part.main(command) == 0  # all of it is there already
    assert (tmp_path / "results.jsonl").read_text() == before


def test_steps_that_an_earlier_call_had_no_time_for_come_first(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, outcome, report = gpu("part"), gpu("outcome"), gpu("report")
    cases, rounds = (importlib.import_module(f"decode_{name}") for name in ("cases", "rounds"))
    toys = cases.subset_cases(torch.device("cpu"), True)[0]
    toys = [replace(toys, batch=batch) for batch in (1, 8, 4, 64)]
    for case in toys[:3]:
        for entry in case.entries:
            record = rounds.blank(case, entry)
            record.part = outcome.STEP
            is_late = case.batch == 4 and entry.contestant == cases.LOOP
            record.median_us = None if is_late else 1.0
            report.append_lines(tmp_path / part.RESULTS, {"run": "before"}, [record])
    seen: list[int] = []

    def run_cases(cases: Any, deadline: float, copy: Any, *, in_order: bool) -> Iterator[Any]:
        assert in_order
        seen.extend(case.batch for case in cases)
        yield []

    monkeypatch.setattr(cases, "subset_cases", lambda device, toy: toys)
    monkeypatch.setattr(rounds, "run_cases", run_cases)
    assert part.main([outcome.STEP, "--out", str(tmp_path), "--run", "now", "--dry"]) == 0
    assert seen == [4, 64, 1, 8]


def test_steps_go_on_without_what_lost_the_device(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, outcome = gpu("part"), gpu("outcome")
    cases, rounds = (importlib.import_module(f"decode_{name}") for name in ("cases", "rounds"))
    (toy,) = cases.subset_cases(torch.device("cpu"), True)
    names = (cases.EAGER, cases.LOOP, cases.CAT)
    entries = tuple(x for x in toy.entries if x.contestant in names)
    toys = [replace(toy, batch=batch, entries=entries) for batch in (1, 2)]
    monkeypatch.setattr(cases, "subset_cases", lambda device, toy: toys)
    first_period = rounds.first_period

    def lose(case: Any, run: Any) -> None:
        if (case.batch, run.entry.contestant) == (2, cases.LOOP):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        first_period(case, run)

    monkeypatch.setattr(rounds, "first_period", lose)
    command = [outcome.STEP, "--out", str(tmp_path), "--run", "1", "--dry"]
    assert part.main(command) == part.DEVICE_ERROR
    assert part.main(command) == 0
    found = [(x["shape"]["batch"], x["contestant"], x["status"]) for x in records(tmp_path)]
    assert found == [
        *((1, name, "ok") for name in names),
        (2, cases.LOOP, "failed"),
        (2, cases.EAGER, "ok"),
        (2, cases.CAT, "ok"),
    ]


def test_a_red_test_or_a_part_that_dies_stops_nothing(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu("run")
    monkeypatch.setattr(run, "run_tests", lambda folder, seconds: ("red", ["tests: 1 failed"]))
    called = []

    def python(self: Any, module: str, options: list[str], seconds: float, env: Any) -> int | None:
        called.append((module, options[0], env, options[options.index("--tests") + 1]))
        return {"decode": -9, "evict": None, "sum": 1}.get(options[0], 0)

    monkeypatch.setattr(run.Call, "_python", python)
    assert run.Call(tmp_path, dry=False).run(["tests", "decode", "evict", "extend", "sum"]) == 1
    waiting = {"CUDA_LAUNCH_BLOCKING": "1"}
    assert [(part, env) for _, part, env, _ in called if part != "evict"] == [
        ("decode", {}), ("decode", waiting), ("extend", {}), ("sum", {}), ("sum", waiting)
    ]  # fmt: skip
    assert {tests for *_, tests in called} == {"red"}
    notes = (tmp_path / "notes.txt").read_text()
    assert "tests: 1 failed" in notes
    assert "decode: its process ended with status -9" in notes
    assert "evict: its process ended with its time: it was stopped" in notes


def test_a_second_measurement_replaces_the_first(gpu: Any, tmp_path: Path) -> None:
    report, run, outcome = gpu("report"), gpu("run"), gpu("outcome")
    shape = {"batch": 1, "slots": 1024}
    for us, status in ((9.0, "ok"), (7.0, "ok"), (None, "not run")):
        record = outcome.Record("decode", "append_attention", shape, "bfloat16", status)
        record.median_us = us
        report.append_lines(tmp_path / "lines", {"device": "a GPU"}, [record])
    (kept,) = run.load(tmp_path / "lines").records
    assert (kept.median_us, kept.status) == (7.0, "ok")


def test_what_failed_is_read_from_pytest(gpu: Any) -> None:
    suite = gpu("suite")
    log = (
        "FAILED tests/test_a.py::test_b[1-x] - ValueError: no\n"
        "ERROR tests/test_c.py::test_d\nFAILED (errors=1)\n2 failed, 3 passed, 1 error in 2.1s\n"
    )
    assert suite.failures(log) == ["tests/test_a.py::test_b[1-x]", "tests/test_c.py::test_d"]
    assert suite.summary([log, "5 passed in 1.0s\n"]) == "2 failed, 8 passed, 1 error"
    assert suite.summary(["", ""]) == "nothing ran"


def test_clocks_come_from_nvml(gpu: Any) -> None:
    class Library:
        """Answers as NVML does: 0, and the value where the last argument points."""

        def __getattr__(self, name: str) -> Any:
            values = {
                "nvmlDeviceGetTemperature": 41, "nvmlDeviceGetPowerUsage": 123_400,
                "nvmlDeviceGetCurrentClocksThrottleReasons": 4,
            }  # fmt: skip

            def call(*arguments: Any) -> int:
                if name == "nvmlDeviceGetClockInfo":
                    arguments[-1]._obj.value = {1: 1980, 2: 3201}[arguments[1]]
                elif name in values:
                    arguments[-1]._obj.value = values[name]
                elif name == "nvmlSystemGetDriverVersion":
                    arguments[0].value = b"580.1"
                return 0

            return call

    nvml = gpu("nvml")
    device = nvml.Nvml("GPU-1", Library())
    assert device.clocks() == {
        "sm_mhz": "1980", "memory_mhz": "3201", "celsius": "41", "watts": "123.4",
        "throttle": "0x4",
    }  # fmt: skip
    assert device.driver() == "580.1"
    monkey = type("Broken", (Library,), {"__getattr__": lambda self, name: lambda *_: 6})
    with pytest.raises(OSError, match="nvmlInit_v2 returned 6"):
        nvml.Nvml("GPU-1", monkey())
    assert nvml.of_current_device() is None or torch.cuda.is_available()


def test_plots(measured: Any, gpu: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = gpu("report").plot(measured, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert len(names) == 5


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    measure = gpu("measure")
    now, log = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Graph:
        def __init__(self, name: str, milliseconds: float) -> None:
            self.name, self.milliseconds = name, milliseconds

        def replay(self) -> None:
            log.append(self.name)
            now[0] += self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = {
        name: (measure.Run(lambda _: []), Graph(name, milliseconds))
        for name, milliseconds in (("ours", 2.0), ("rival", 3.0), ("slow", 1e3))
    }
    timings, _ = measure.replay_in_turns(graphs, launches=4)
    assert {name: timing.replays for name, timing in timings.items()} == {
        "ours": measure.MAX_REPLAYS, "rival": measure.MAX_REPLAYS, "slow": measure.MIN_REPLAYS
    }  # fmt: skip
    assert timings["rival"].median_us == pytest.approx(750.0)
    assert log[3:9] == ["ours", "rival", "slow", "slow", "rival", "ours"]


def test_wrong_results_are_not_timed(gpu: Any) -> None:
    main, cases, measure = gpu("part"), gpu("cases"), gpu("measure")
    case = next(cases.decode_cases(torch.device("cpu"), True))
    wrong = measure.Run(lambda _: [case.exact[0] * 1.01])
    record = main.Record("decode", "wrong", case.shape, "float32", "ok")
    with pytest.raises(ValueError, match=r"^wrong result: relative error 0\.01, allowed 0\.001$"):
        main.check(case, wrong, record)
    with pytest.raises(ValueError, match="relative error inf"):
        main.check(case, measure.Run(lambda _: [case.exact[0] * torch.nan]), record)


def test_tuner_keeps_what_is_faster(gpu: Any) -> None:
    cost = {"splits": {1: 3.0, 2: 2.0, 4: 2.5}, "num_warps": {4: 1.0, 8: 0.5}}

    def seconds(entry: dict[str, int]) -> float:
        return cost["splits"][entry.get("splits", 1)] + cost["num_warps"][entry.get("num_warps", 4)]

    axes = {name: tuple(values) for name, values in cost.items()}
    best = gpu("tune").descend({}, axes, lambda entry, other: seconds(entry) < seconds(other))
    assert best == {"splits": 2, "num_warps": 8}


@pytest.mark.parametrize("part", ["decode", "evict", "extend"])
def test_tuner_finds_what_kernels_ask_for(
    part: str, gpu: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, tune = gpu("cases"), gpu("tune")
    monkeypatch.setattr(cases.Case, "impl", "triton")
    tried = []

    def gain(case: Any, run: Any, table: Any, other: Any) -> float:
        tried.append(table)
        (entry,) = table.values()
        return 1.0 if list(entry.values()) == [64] else -1.0

    monkeypatch.setattr(tune, "gain", gain)
    case = next(cases.CASES[part](torch.device(device), True))
    found = tune.tune(case, {})
    kernel = {"decode": "decode_attention", "extend": "extend_attention"}.get(part, part)
    assert {name.split()[0] for table in tried for name in table} == {kernel}
    assert [list(entry.values()) for entry in found.values()] == [[64]] * (part != "evict")
