"""Test on the GPU, then measure every op against its rivals: ``make gpu OUT=folder``.

Exit status: 0 done, 1 the test suite is red or one of our ops failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from . import measure, outcome, report
from .case import Case
from .cases import CASES
from .contestants import Contestant
from .measure import ROOT, Run
from .outcome import Record, Results
from .rivals import contestants_of

# Seconds per part, and after which no part begins a case: all of it ends within nine minutes.
SECONDS = 480
BUDGETS = {"tests": 170, "decode": 125, "evict": 35, "extend": 35, "retention": 65, "sum": 30}
BUDGETS |= {outcome.STEP: 420}  # a whole run leaves it less; alone it measures everybody


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts; see the module's docstring for what is returned."""
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    arguments = parse(argv)
    if not arguments.dry and not torch.cuda.is_available():
        print(
            "make gpu: no GPU here (torch.cuda.is_available() is False), nothing was run; "
            "make gpu-dry checks the benchmarks on a CPU",
            file=sys.stderr,
        )
        return 2
    if not arguments.dry and not arguments.out:
        print("make gpu: OUT=folder is missing", file=sys.stderr)
        return 2
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="gpu-dry-"))
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(folder, torch.device("cpu" if arguments.dry else "cuda"))
    benchmark.say(f"parts: {', '.join(arguments.parts)}")
    if "tests" in arguments.parts and not arguments.dry:
        green, notes = run_tests(folder / "tests.log")
        for note in notes:
            benchmark.say(note)
        if not green:
            benchmark.write()
            return 1
    return benchmark.run([part for part in arguments.parts if part != "tests"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, parts checked."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder for results.jsonl, results.md, tests.log and plots")
    parser.add_argument("--parts", default="", help=f"of {','.join(BUDGETS)}; all if not given")
    parser.add_argument("--dry", action="store_true", help="toy shapes on the CPU, without a clock")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts.split(",") if arguments.parts else list(BUDGETS)
    unknown = [part for part in arguments.parts if part not in BUDGETS]
    if unknown:
        parser.error(f"--parts must be of {', '.join(BUDGETS)}, got {', '.join(unknown)}")
    return arguments


def run_tests(log: Path) -> tuple[bool, list[str]]:
    """Run the test suite on the GPU, less the files whose imports are missing.

    Returns:
        Whether it is green, and what to say about it.
    """
    if importlib.util.find_spec("pytest") is None:
        return False, ["test suite: pytest is missing"]
    skipped = files_that_cannot_import(ROOT / "tests")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--ignore={path}" for path in skipped]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), env.get("PYTHONPATH"))))
    env["HF_HUB_OFFLINE"] = "1"
    start = time.monotonic()
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
                timeout=BUDGETS["tests"], check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    lines = log.read_text().strip().splitlines() or ["no output"]
    if code != 0:
        print("\n".join(lines[-40:]))
    notes = [f"test suite: {lines[-1].strip('= ')} ({time.monotonic() - start:.0f} s)"]
    notes += [f"not tested: {path.name} needs {', '.join(x)}" for path, x in skipped.items()]
    if code is None:
        notes.append(f"test suite: stopped after {BUDGETS['tests']} s; see {log.name}")
    elif code != 0:
        notes.append(f"test suite: red, nothing is measured; see {log.name}")
    return code == 0, notes


def files_that_cannot_import(folder: Path) -> dict[Path, list[str]]:
    """Test files that import, at their top, a package that is not installed."""
    files = sorted(folder.rglob("*.py"))
    own = {path.stem for path in files}
    missing = {}
    for path in files:
        imported = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported.add(node.module.split(".")[0])
        absent = sorted(x for x in imported - own if importlib.util.find_spec(x) is None)
        if absent:
            missing[path] = absent
    return missing


class Benchmark:
    """One run over the chosen parts.

    Args:
        folder: Where results go.
        device: A GPU, or the CPU for a dry run.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.timed = device.type == "cuda"
        self.end = time.monotonic() + SECONDS
        self.notes: list[str] = []
        self.machine = measure.machine(device)
        self.results = Results()
        self.rates: dict[str, float] = {}
        (folder / "results.jsonl").write_text("")

    def run(self, parts: list[str]) -> int:
        """Measure; the report is rewritten after every part."""
        torch.manual_seed(0)
        self.rates = measure.ceilings(self.device, toy=not self.timed)
        broken = False
        for part in parts:
            start = time.monotonic()
            run_part = self.run_steps if part == outcome.STEP else self.run_part
            try:
                run_part(part, min(start + BUDGETS[part], self.end))
            except Exception as error:  # what a GPU in trouble says; the other parts may still run
                broken = True
                self.say(f"{part}: stopped by {describe(error)}")
            self.say(f"{part}: {time.monotonic() - start:.0f} s of {BUDGETS[part]}")
            self.write()
        report.plot(self.results, self.folder)
        print(report.goals_table(self.results))
        print(f"written to {self.folder}")
        return 1 if broken or self.failed() else 0

    def failed(self) -> bool:
        """Whether one of our own ops failed; a rival may."""
        return any(
            record.contestant in outcome.OURS and record.status == outcome.FAILED
            for record in self.results.records
        )

    def run_part(self, part: str, deadline: float) -> None:
        """Every case of a part, as far as its time allows."""
        late = 0
        for case in CASES[part](self.device, not self.timed):
            if self.timed and time.monotonic() > deadline:
                late += 1
                records = [blank(case, x, outcome.NOT_RUN) for x in contestants_of(case)]
            else:
                with torch.set_grad_enabled(case.needs_grad):
                    records = self.contest(case, deadline)
            self.results.records += records
            report.append_lines(self.folder / "results.jsonl", self.machine, records)
            del case
            measure.free_memory()
        if late:
            self.say(f"{part}: its time was up, {late} cases were not run")

    def run_steps(self, part: str, deadline: float) -> None:
        """Whole decode steps, end to end."""
        # with transformers and pytest, which the kernels' parts do without
        from decode_cases import subset_cases
        from decode_rounds import run_cases

        cases = subset_cases(self.device, not self.timed)
        for records in run_cases(cases, deadline, self.rates.get("copy")):
            self.results.records += records
            report.append_lines(self.folder / "results.jsonl", self.machine, records)
            self.show(records)

    def contest(self, case: Case, deadline: float) -> list[Record]:
        """Build, check and capture everybody who can take part, then replay all by turns."""
        records = [blank(case, entry, outcome.OK) for entry in contestants_of(case)]
        graphs: dict[str, tuple[Run, torch.cuda.CUDAGraph]] = {}
        for record, entry in zip(records, contestants_of(case), strict=True):
            reason = entry.missing(case)
            if reason:
                record.status, record.note = outcome.ABSENT, reason
                continue
            if self.timed and time.monotonic() > deadline:
                record.status, record.note = outcome.NOT_RUN, "the part's time was up"
                continue
            try:
                run = entry.build(case)
                check(case, run, record)
                if self.timed:
                    graphs[entry.name] = run, measure.capture(run, case.launches)
                    record.wall_us = measure.wall_us(run, case.launches)
                    record.peak_bytes = measure.peak_bytes(run)
                else:
                    run.reset()
                    run.all(case.launches)
            except Exception as error:
                record.status = outcome.FAILED
                record.note = describe(error)
        if graphs:
            timings, clocks = measure.replay_in_turns(graphs, case.launches)
            for record in records:
                if record.contestant in timings and record.status == outcome.OK:
                    record.set_timing(timings[record.contestant], clocks, self.rates["copy"])
        self.show(records)
        return records

    def show(self, records: list[Record]) -> None:
        """One line per case: the run may be watched from afar."""
        figures = [
            f"{record.contestant} {record.median_us:.1f}" if record.median_us is not None
            else f"{record.contestant} {record.status}"
            for record in records
        ]  # fmt: skip
        print(f"{records[0].op} {records[0].shape_text}: {', '.join(figures)}", flush=True)

    def say(self, note: str) -> None:
        """Print a note and keep it for the report."""
        self.notes.append(note)
        print(note, flush=True)

    def write(self) -> None:
        """The report as it stands."""
        text = report.markdown(self.machine, self.rates, self.notes, self.results)
        (self.folder / "results.md").write_text(text)


def describe(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]


def blank(case: Case, entry: Contestant, status: str) -> Record:
    """A record of a contestant that has not run yet."""
    return Record(
        op=case.op,
        contestant=entry.name,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        status=status,
    )


def check(case: Case, run: Run, record: Record) -> None:
    """Compare a contestant's first launch with the exact result; raise where it is wrong."""
    run.reset()
    outputs = run.launch(0)
    record.launches, record.bytes, record.flops = case.launches, case.bytes, case.flops
    record.max_error, record.relative_error = case.errors(outputs)
    if not record.relative_error <= case.tolerance:
        raise ValueError(
            f"wrong result: relative error {record.relative_error:.2g}, "
            f"allowed {case.tolerance:.2g}"
        )
