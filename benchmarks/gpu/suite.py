"""The tests that run on a GPU, in several processes; their kernels are compiled side by side."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .measure import ROOT

PROCESSES = 8  # each takes half a GB of the device


def run_tests(folder: Path, seconds: float) -> tuple[str, list[str]]:
    """Run what is marked ``gpu``; what failed once more with launches that wait, for the culprit.

    Args:
        folder: Gets a ``tests-*.log`` of each process.
        seconds: After that they are stopped.

    Returns:
        ``green`` or ``red``, and what to say about it.
    """
    start = time.monotonic()
    count = max(1, min(PROCESSES, (os.cpu_count() or 1) // 2))
    logs = [folder / f"tests-{index}.log" for index in range(count)]
    runs = [
        _pytest(log, ["-m", "gpu", "-p", "gpu.shard"], {"GPU_SHARD": f"{index}/{count}"})
        for index, log in enumerate(logs)
    ]
    codes = [_wait(run, start + seconds) for run in runs]
    texts = [log.read_text() for log in logs]
    failed = sorted({name for text in texts for name in failures(text)})
    is_green = all(code in (0, 5) for code in codes)  # 5: there was nothing for this process
    notes = [f"tests: {summary(texts)} in {time.monotonic() - start:.0f} s, {count} processes"]
    if None in codes:
        notes.append(f"tests: {codes.count(None)} processes were stopped after {seconds:.0f} s")
    notes += [f"tests: red: {name}" for name in failed[:20]]
    left = start + seconds - time.monotonic()
    if failed and left > 10:
        again = folder / "tests-blocking.log"
        run = _pytest(again, failed[:20], {"CUDA_LAUNCH_BLOCKING": "1"})
        _wait(run, start + seconds)
        notes.append(f"tests: those again, each launch waited for: see {again.name}")
    return "green" if is_green else "red", notes


def failures(log: str) -> list[str]:
    """Names of the tests that failed, out of what pytest says at its end."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+::\S.*?)(?: - |$)", log, re.MULTILINE)


def summary(logs: Sequence[str]) -> str:
    """Passed, failed and so on of all processes together."""
    total: dict[str, int] = {}
    for log in logs:
        last = (log.strip().splitlines() or [""])[-1]
        for number, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last):
            total[what] = total.get(what, 0) + int(number)
    return ", ".join(f"{number} {what}" for what, number in total.items()) or "nothing ran"


def _pytest(log: Path, options: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    own = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(ROOT / "src"), str(ROOT / "benchmarks"), own.get("PYTHONPATH"))
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", **env}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors", *options]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=output, stderr=subprocess.STDOUT
        )  # fmt: skip


def _wait(run: subprocess.Popen[bytes], end: float) -> int | None:
    """Its exit status; None where it had to be stopped."""
    try:
        return run.wait(timeout=max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        return None
