"""Measure one part, as a process of its own: ``python -m gpu.part decode --out folder``.

Every case's records are written as soon as they are there. An error of the device, after which
nothing else would run in the process, ends it with status 3; started again with the same ``--run``
it leaves out what is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import measure, outcome, report
from .case import Case
from .cases import CASES
from .contestants import Contestant
from .measure import Run
from .outcome import DeviceError, Record, describe, is_lost
from .rivals import contestants_of

RESULTS = "results.jsonl"
DEVICE_ERROR = 3


def main(argv: list[str] | None = None) -> int:
    """Measure; 0 done, 1 one of our ops failed, 3 the device was lost."""
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    parser = argparse.ArgumentParser(prog="gpu.part", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*CASES, outcome.FLEX, outcome.STEP, outcome.REQUESTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--run", default="", help="names the run that the records belong to")
    parser.add_argument("--tests", default="", help="what the tests said before: green or red")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--check", action="store_true", help="compute and compare, no clock")
    arguments = parser.parse_args(argv)
    part = Part(arguments)
    try:
        records = part.measure(time.monotonic() + arguments.seconds)
    except DeviceError as error:
        print(f"{arguments.part}: {error}", flush=True)
        return DEVICE_ERROR
    return int(any(x.contestant in outcome.OURS and x.status == outcome.FAILED for x in records))


class Part:
    """One part of a run.

    Args:
        arguments: The command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.name, self.folder = arguments.part, arguments.out
        self.device = torch.device("cpu" if arguments.dry else "cuda")
        self.toy, self.timed = arguments.dry, not (arguments.dry or arguments.check)
        self.machine: dict[str, Any] = measure.machine(self.device)
        self.machine |= {"run": arguments.run, "tests": arguments.tests}
        self.written = set() if arguments.check else _written(self.folder, arguments.run, self.name)
        torch.manual_seed(0)
        self.rates = measure.ceilings(self.device, toy=not self.timed)
        self.machine["rates"] = self.rates

    def measure(self, deadline: float) -> list[Record]:
        """Every case, as far as the time allows."""
        found: list[Record] = []
        parts = {outcome.STEP: self._steps, outcome.REQUESTS: self._requests}
        for records in parts.get(self.name, self._ops)(deadline):
            found += records
        return found

    def _steps(self, deadline: float) -> Iterator[list[Record]]:
        # with transformers and pytest, which the kernels' parts do without
        from decode_cases import subset_cases
        from decode_rounds import run_cases

        lines = _lines(self.folder, self.name)
        measured = {_key_of(x) for x in lines if x["median_us"] is not None}
        failed = {_key_of(x) for x in lines if x["status"] == outcome.FAILED} & self.written

        def keys(case: Any) -> dict[str, Any]:
            return {_key(outcome.STEP, x.contestant, case.shape(x)): x for x in case.entries}

        # what an earlier call had no time for comes first
        every = sorted(subset_cases(self.device, self.toy), key=lambda x: measured >= set(keys(x)))
        cases = [
            replace(case, entries=tuple(x for key, x in keys(case).items() if key not in failed))
            for case in every
            if not self.written >= set(keys(case))
        ]
        try:
            for records in run_cases(cases, deadline, self.rates.get("copy"), in_order=True):
                self._keep(records)
                yield records
        except DeviceError as error:
            self._keep(error.records)
            raise

    def _requests(self, deadline: float) -> Iterator[list[Record]]:
        from . import requests

        for records in requests.run(requests.load(self.device, self.toy), deadline, self.timed):
            self._keep(records)
            yield records

    def _ops(self, deadline: float) -> Iterator[list[Record]]:
        slow = self.name == outcome.FLEX
        for part in CASES if slow else [self.name]:
            for case in CASES[part](self.device, self.toy):
                entries = [
                    entry
                    for entry in contestants_of(case, slow)
                    if _key(case.op, entry.name, case.shape) not in self.written
                ]
                if not entries:
                    continue
                with torch.set_grad_enabled(case.needs_grad):
                    records = self._contest(case, entries, deadline)
                self._keep(records)
                yield records
                del case
                measure.free_memory()

    def _contest(self, case: Case, entries: list[Contestant], deadline: float) -> list[Record]:
        """Build, check and capture everybody who can take part, then replay all by turns."""
        records = [blank(case, entry) for entry in entries]
        graphs: dict[str, tuple[Run, torch.cuda.CUDAGraph]] = {}
        try:
            for record, entry in zip(records, entries, strict=True):
                run = self._prepare(case, entry, record, deadline)
                if run is not None and self.timed:
                    graphs[entry.name] = run, measure.capture(run, case.launches)
                    record.wall_us = measure.wall_us(run, case.launches)
                    record.peak_bytes = measure.peak_bytes(run)
            if graphs:
                timings, clocks = measure.replay_in_turns(graphs, case.launches)
                for record in records:
                    if record.contestant in timings and record.status == outcome.OK:
                        timing = timings[record.contestant]
                        record.set_timing(timing, clocks, self.rates["copy"])
        except DeviceError as error:
            self._keep([x for x in error.records if x.status == outcome.FAILED])
            raise
        return records

    def _prepare(
        self, case: Case, entry: Contestant, record: Record, deadline: float
    ) -> Run | None:
        """A run that computes what it should; None, and the reason in ``record``, if there is none.

        Raises:
            DeviceError: the device was lost.
        """
        reason = entry.missing(case)
        if reason:
            record.status, record.note = outcome.ABSENT, reason
            return None
        if time.monotonic() > deadline and not self.toy:
            record.status, record.note = outcome.NOT_RUN, "the part's time was up"
            return None
        try:
            run = entry.build(case)
            check(case, run, record)
            if self.toy:
                run.reset()
                run.all(case.launches)
        except Exception as error:
            record.status, record.note = outcome.FAILED, describe(error)
            if is_lost(error):
                raise DeviceError([record]) from error
            return None
        return run

    def _keep(self, records: list[Record]) -> None:
        if not records:
            return
        for record in records:
            record.part = self.name
        report.append_lines(self.folder / RESULTS, self.machine, records)
        figures = [
            f"{record.contestant} {record.median_us:.1f}" if record.median_us is not None
            else f"{record.contestant} {record.status}"
            for record in records
        ]  # fmt: skip
        print(f"{records[0].op} {records[0].shape_text}: {', '.join(figures)}", flush=True)


def _written(folder: Path, run: str, part: str) -> set[str]:
    """What this part of this run has written already."""
    return {_key_of(x) for x in _lines(folder, part) if x.get("run") == run}


def _lines(folder: Path, part: str) -> list[dict[str, Any]]:
    """The lines of a part in the results so far."""
    path = folder / RESULTS
    lines = path.read_text().splitlines() if path.exists() else []
    return [x for x in map(json.loads, lines) if x.get("part") == part]


def _key_of(line: dict[str, Any]) -> str:
    return _key(line["op"], line["contestant"], line["shape"])


def _key(op: str, contestant: str, shape: dict[str, Any]) -> str:
    return json.dumps([op, contestant, shape])


def blank(case: Case, entry: Contestant) -> Record:
    """A record of a contestant that has not run yet."""
    return Record(
        op=case.op,
        contestant=entry.name,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        status=outcome.OK,
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


if __name__ == "__main__":
    sys.exit(main())
