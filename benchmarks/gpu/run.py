"""Test on the GPU, then measure: ``make gpu OUT=folder CALL=kernels``, then ``steps``, ``tune``.

Each call stands alone and fits its minutes; RUNBOOK.md says what each is for. Every part of it is a
process of its own. Its results are added to the folder as they come, and nothing that goes wrong in
one part keeps another from running.

Exit status: 0 done, 1 a test is red or one of our ops failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import torch

from . import outcome, report
from .cases import CASES
from .measure import ROOT
from .outcome import FLEX, Record, Results
from .part import DEVICE_ERROR, RESULTS
from .suite import run_tests

TESTS, TUNE = "tests", "tune"
# Seconds of each part, by call: at most 4, 5 and 5 minutes.
CALLS: dict[str, dict[str, int]] = {
    "kernels": {TESTS: 85, "decode": 75, "evict": 20, "extend": 15, "retention": 25, "sum": 15},
    "steps": {outcome.STEP: 205, FLEX: 80},
    TUNE: {TUNE: 285},
}
PARTS = {part: seconds for parts in CALLS.values() for part, seconds in parts.items()}
PARTS[outcome.REQUESTS] = 120  # in no call: for when there is time left
DRY = [*CASES, FLEX, outcome.STEP, outcome.REQUESTS]
GRACE = 10  # seconds that a part may take to finish a case


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts; see the module's docstring for what is returned."""
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
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="gpu-dry-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return Call(folder, arguments.dry).run(arguments.parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, parts checked."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder to which results are added")
    parser.add_argument("--call", default="", help=f"{', '.join(CALLS)}; kernels if not given")
    parser.add_argument("--parts", default="", help=f"instead of a call, of {','.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="toy shapes on the CPU, without a clock")
    arguments = parser.parse_args(argv)
    call = arguments.call or "kernels"
    if call not in CALLS:
        parser.error(f"--call must be one of {', '.join(CALLS)}, got {call}")
    chosen = DRY if arguments.dry and not arguments.call else list(CALLS[call])
    arguments.parts = arguments.parts.split(",") if arguments.parts else chosen
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return arguments


class Call:
    """One call: parts after each other.

    Args:
        folder: Where results are added.
        dry: Toy shapes on the CPU.
    """

    def __init__(self, folder: Path, dry: bool) -> None:
        self.folder, self.dry = folder, dry
        self.name = f"{time.time():.0f}"
        self.tests = ""
        self.notes: list[str] = []

    def run(self, parts: list[str]) -> int:
        """Every part; the report is rewritten after each."""
        self.say(f"parts: {', '.join(parts)}")
        wrong = False
        for part in parts:
            start = time.monotonic()
            wrong |= not self._run_part(part, PARTS[part])
            self.say(f"{part}: {time.monotonic() - start:.0f} s of {PARTS[part]}")
            self.write()
        results = load(self.folder / RESULTS)
        report.plot(results, self.folder)
        print(report.goals_table(results))
        print(f"written to {self.folder}")
        return int(wrong)

    def _run_part(self, part: str, seconds: int) -> bool:
        """Whether all of ours is right."""
        if part == TESTS:
            self.tests, notes = run_tests(self.folder, seconds)
            for note in notes:
                self.say(note)
            return self.tests == "green"
        if part == TUNE:
            table = self.folder / "table.json"
            options = ["--out", str(table), "--seconds", str(seconds)]
            return self._python("gpu.tune", options, seconds + GRACE, {}) == 0
        end = time.monotonic() + seconds
        codes: list[int | None] = []
        while not codes or (codes[-1] not in (0, 1, None) and time.monotonic() < end):
            codes.append(self._measure(part, end - time.monotonic()))
            if codes[-1] not in (0, 1):
                self.say(f"{part}: its process ended with {_meaning(codes[-1])}")
            if codes[-1] not in (0, 1, DEVICE_ERROR, None):
                break  # it died without a word of what it was at
        if codes != [0] and not self.dry and end - time.monotonic() > 10:
            self.say(f"{part}: once more without a clock, each launch waited for")
            waiting = {"CUDA_LAUNCH_BLOCKING": "1"}
            self._measure(part, end - time.monotonic(), ["--check"], waiting)
        return codes == [0]

    def _measure(
        self, part: str, seconds: float, more: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> int | None:  # fmt: skip
        options = [part, "--out", str(self.folder), "--run", self.name, "--tests", self.tests]
        options += ["--seconds", f"{seconds:.0f}", *(["--dry"] if self.dry else []), *(more or [])]
        return self._python("gpu.part", options, seconds, env or {})

    def _python(
        self, module: str, options: list[str], seconds: float, env: dict[str, str]
    ) -> int | None:
        """Run a module; its exit status, None where it had to be stopped."""
        command = [sys.executable, "-m", module, *options]
        run = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, start_new_session=True
        )  # fmt: skip
        try:
            return run.wait(timeout=None if self.dry else seconds + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return None

    def say(self, note: str) -> None:
        """Print a note and keep it for the report."""
        self.notes.append(note)
        with (self.folder / "notes.txt").open("a") as notes:
            notes.write(f"{note}\n")
        print(note, flush=True)

    def write(self) -> None:
        """The report of all that is in the folder."""
        machine, rates = report.of_whom(self.folder / RESULTS)
        notes = (self.folder / "notes.txt").read_text().splitlines()
        text = report.markdown(machine, rates, notes, load(self.folder / RESULTS))
        (self.folder / "results.md").write_text(text)


def load(path: Path) -> Results:
    """What was measured; where something was measured twice, the last time."""
    names = {field.name for field in fields(Record)}
    latest: dict[str, Record] = {}
    for line in report.lines(path):
        record = Record(**{name: value for name, value in line.items() if name in names})
        key = f"{record.part} {record.op} {record.contestant} {record.shape_text}"
        if record.median_us is not None or key not in latest or latest[key].median_us is None:
            latest[key] = record
    return Results(latest.values())


def _meaning(code: int | None) -> str:
    if code is None:
        return "its time: it was stopped"
    return "an error of the device" if code == DEVICE_ERROR else f"status {code}"


if __name__ == "__main__":
    sys.exit(main())
