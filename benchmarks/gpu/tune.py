"""Find launch configurations by measuring: ``make gpu-tune OUT=table.json``.

For every case of the benchmarks each number of the configuration is varied in turn, starting from
the one in use; what is faster by more than noise stays. The result, one table for this device, goes
to ``src/trimkv_kernels/kernels/tables/`` and is read by `trimkv_kernels.kernels.tuning`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimkv_kernels.kernels import tuning

from . import measure
from .case import Case
from .cases import CASES
from .measure import Run
from .outcome import OURS
from .rivals import contestants_of

GAIN = 0.02  # below that a difference is noise
# What is tried, by kernel; a kernel that is not here is left alone.
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "decode_attention": {
        "splits": (1, 2, 4, 8, 16, 32),
        "block_s": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    "evict": {"block_r": (8, 16, 32), "num_warps": (4, 8, 16)},
    "fill_slots": {"block_c": (1024, 2048, 4096), "block_r": (8, 16, 32), "num_warps": (4, 8, 16)},
    **{
        f"retention_attention_{kernel}_{mode}": {
            "block_t": (16, 32, 64, 128),
            "block_s": (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (1, 2, 3),
        }
        for kernel in ("output", "query_grad", "key_value_grad")
        for mode in ("add", "scale")
    },
    "retention_sum_output": {"block": (32, 64), "columns": (16, 32), "num_warps": (4, 8)},
    "retention_sum_grad": {"block": (16, 32), "columns": (16, 32), "num_warps": (4, 8)},
    "extend_attention": {
        "block_m": (64, 128),
        "block_s": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
}
Entry = dict[str, int]
Table = dict[str, Entry]


class Asked(dict[str, Entry]):
    """A table that remembers what kernels look up in it."""

    def __init__(self, entries: Table) -> None:
        super().__init__(entries)
        self.names: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self.names:
            self.names.append(name)
        return super().get(name, default)


def main(argv: list[str] | None = None) -> int:
    """Tune everything within the time given; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="make gpu-tune", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--parts", default="decode,evict,extend,retention,sum")
    parser.add_argument("--seconds", type=float, default=480)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: no GPU here, nothing was measured", file=sys.stderr)
        return 2
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    table: Table = dict(tuning.table(device))
    for part in arguments.parts.split(","):
        for case in CASES[part](torch.device("cuda"), False):
            if time.monotonic() > deadline:
                print(f"{part} {case.shape}: not tuned, the time was up")
                continue
            with torch.set_grad_enabled(case.needs_grad):
                table |= tune(case, table)
            Path(arguments.out).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            measure.free_memory()
    return 0


def tune(case: Case, table: Table) -> Table:
    """Entries for the kernels of one case that are faster than what ``table`` leads to."""
    run = next(x for x in contestants_of(case) if x.name in OURS).build(case)
    entries: Table = dict(table)
    with in_use(entries) as asked:
        run.reset()
        run.launch(0)
        names = [name for name in asked.names if name.split()[0] in AXES]
    found: Table = {}
    for name in names:

        def faster(entry: Entry, best: Entry, name: str = name) -> bool:
            return gain(case, run, entries | {name: entry}, entries | {name: best}) > GAIN

        entry = descend(entries.get(name, {}), AXES[name.split()[0]], faster)
        if entry != entries.get(name, {}):
            found[name] = entries[name] = entry
        print(f"{case.op} {case.shape} {name}: {entry or 'as chosen'}", flush=True)
    return found


def descend(
    best: Entry, axes: dict[str, tuple[int, ...]], faster: Callable[[Entry, Entry], bool]
) -> Entry:
    """Vary one number after the other, keeping what ``faster(candidate, best)`` finds better."""
    for axis, values in axes.items():
        for value in values:
            if value != best.get(axis):
                candidate = best | {axis: value}
                best = candidate if faster(candidate, best) else best
    return best


def gain(case: Case, run: Run, table: Table, other: Table) -> float:
    """How much faster ``table`` is than ``other``, side by side; negative if it does not work."""
    graphs = {}
    for name, entries in (("table", table), ("other", other)):
        with in_use(entries):
            try:
                run.reset()
                relative_error = case.errors(run.launch(0))[1]
                if not relative_error <= case.tolerance:
                    return -1.0
                graphs[name] = run, measure.capture(run, case.launches)
            except Exception as error:  # most likely more shared memory than there is
                print(f"{case.op} {case.shape} {entries}: {type(error).__name__}")
                return -1.0
    timings, _ = measure.replay_in_turns(graphs, case.launches)
    return timings["other"].median_us / timings["table"].median_us - 1


@contextmanager
def in_use(entries: Table) -> Iterator[Asked]:
    """Let kernels read ``entries`` instead of the table that ships."""
    asked, shipped = Asked(entries), tuning.table
    tuning.table = lambda device: asked
    try:
        yield asked
    finally:
        tuning.table = shipped


if __name__ == "__main__":
    sys.exit(main())
