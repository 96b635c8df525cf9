"""What a whole decode step takes: full caches, a bounded cat, ours, on one model, side by side.

    python benchmarks/decode.py                          # the CPU contest, under five minutes
    python benchmarks/decode.py --device cuda --models qwen3-4b --contexts 32768 --batches 4

`make gpu` runs a part of it. See `README.md` for who takes part and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from contest import (
    fixed_threads,
)
from decode_cases import CAT, EAGER, FLOOR, FULL, MODELS, Case, cpu_entries, gpu_entries, sized
from decode_rounds import run_cases
from gpu import measure, outcome, report
from gpu.goals import STEP_GOALS, Goal
from gpu.outcome import Results

RESULTS = Path(__file__).parent / "results"
CPU_GOALS = (
    Goal("CPU", "full cache of 4096 / ours, buffer 128", "x", False, 2, None,
         lambda results: _over_ours(results, 4096)),
    Goal("CPU", "full cache of 16384 / ours, buffer 128", "x", False, 10, None,
         lambda results: _over_ours(results, 16384)),
    Goal("CPU", "share of the cache at buffer 1, ours / cat", "x", True, 0.6, None,
         lambda results: _share(results, EAGER) / _share(results, CAT)),
)  # fmt: skip


def _over_ours(results: Results, context: int) -> float:
    full = results.us(outcome.STEP, FULL, context=context)
    return full / results.us(outcome.STEP, EAGER, buffer=128)


def _share(results: Results, contestant: str) -> float:
    """Microseconds of a step that evicts each time, less those of the model without attention."""
    step = results.us(outcome.STEP, contestant, buffer=1)
    return step - results.us(outcome.STEP, FLOOR)


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    device = torch.device(arguments.device)
    cases = []
    for model in arguments.models:
        setting = sized(model, arguments.budget)
        if device.type == "cuda":
            entries = gpu_entries(arguments.contexts, setting.buffer)
        else:
            entries = cpu_entries(arguments.contexts, setting.buffer, arguments.compiled)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        common: dict[str, Any] = {
            "model": model, "setting": setting, "entries": entries, "device": device,
            "dtype": dtype, "rounds": arguments.rounds,
        }  # fmt: skip
        cases += [Case(batch=batch, **common) for batch in arguments.batches]
    return cases


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is left out depends on the device."""
    parser = argparse.ArgumentParser(prog="decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS))
    parser.add_argument("--contexts", nargs="+", type=int, help="tokens in full caches")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--budget", type=int, help="default: 1024 on a GPU, 512 on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, at least 2")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--compiled", action="store_true", help="on a CPU: ours by Inductor too")
    parser.add_argument(
        "--seconds", type=float, help="no fourth round begins after that; 540, on a CPU 240"
    )
    parser.add_argument("--out", type=Path, help="default: results/<device>_decode.json")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {arguments.rounds}")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = arguments.device == "cuda"
    arguments.models = arguments.models or (["qwen3-0.6b", "qwen3-4b"] if on_gpu else ["8x1024"])
    arguments.contexts = arguments.contexts or ([32768, 16384] if on_gpu else [4096, 16384])
    arguments.batches = arguments.batches or ([4, 8, 64, 1] if on_gpu else [1])
    arguments.seconds = arguments.seconds or (540 if on_gpu else 240)
    arguments.out = arguments.out or RESULTS / f"{arguments.device}_decode.json"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where one of ours failed, 2 where the GPU asked for is missing."""
    arguments = parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("decode.py: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    deadline = time.monotonic() + arguments.seconds
    device = torch.device(arguments.device)
    load = os.getloadavg()[0]
    results = Results()
    with fixed_threads(arguments.threads):
        copy = measure.ceilings(device, toy=False)["copy"] if device.type == "cuda" else None
        try:
            for records in run_cases(chosen_cases(arguments), deadline, copy):
                results.records += records
                print(report.steps_table(records), end="\n\n", flush=True)
        except outcome.DeviceError as error:
            results.records += error.records
            print(f"decode.py: {error}", file=sys.stderr)
    goals = CPU_GOALS if device.type == "cpu" else STEP_GOALS
    print(report.goals_table(results, goals))
    write(arguments, results, goals, load=(load, os.getloadavg()[0]), copy=copy)
    failed = [x for x in results.records if x.status == outcome.FAILED]
    return int(any(record.contestant in outcome.OUR_STEPS for record in failed))


def write(
    arguments: argparse.Namespace,
    results: Results,
    goals: Sequence[Goal],
    load: tuple[float, float],
    copy: float | None,
) -> None:
    """Keep the run, with all that is needed to repeat it."""
    device = torch.device(arguments.device)
    settings = {model: asdict(sized(model, arguments.budget)) for model in arguments.models}
    for setting in settings.values():  # what the contest of single steps has beside sizes
        for name in ("warmup", "steps", "cpu_time", "threads"):
            del setting[name]
    kept = {
        "benchmark": "decode",
        "date": datetime.now(UTC).date().isoformat(),
        **measure.machine(device),
        **({"device": cpu_name()} if device.type == "cpu" else {}),
        "command": " ".join(["python", *sys.argv]),
        "threads": arguments.threads,
        "load": [round(figure, 2) for figure in load],
        "copy_gb_per_s": copy,
        "settings": settings,
        "goals": [goal.row(results) for goal in goals],
        "records": [asdict(record) for record in results.records],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written to {arguments.out}")


def cpu_name() -> str:
    """The processor and its number of cores."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
