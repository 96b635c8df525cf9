"""The contest of decode.py: contestants are prepared, checked, and timed in turns."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from decode_cases import EAGER, FULL, Case, Entry, Models
from decode_steps import Stepper, build
from gpu import measure, outcome
from gpu.outcome import Record

COMPILE_SECONDS = 90  # what Inductor may take; with less left nothing is compiled
MARGIN = 1.25  # of the longest compilation so far, which is what the next may take
MIN_ROUNDS = 3
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # bf16 through all layers


@dataclass
class Run:
    """What became of an entry."""

    entry: Entry
    record: Record
    stepper: Stepper | None = None
    first: Tensor | None = None  # [batch, vocabulary], logits of its first step
    tokens: Tensor | None = None  # [batch, steps], chosen in its first period
    held_bytes: int = 0  # of device memory, by what it keeps from one step to the next
    transient_bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # per step, by round


class Compilations:
    """How long those so far took, which says how long the next may take."""

    def __init__(self) -> None:
        self._longest = COMPILE_SECONDS / MARGIN
        self._is_known = False

    @property
    def seconds(self) -> float:
        """What the next one may take."""
        return MARGIN * self._longest

    def note(self, seconds: float) -> None:
        """Take the time of one."""
        self._longest = max(seconds, self._longest) if self._is_known else seconds
        self._is_known = True


def run_cases(
    cases: Sequence[Case], deadline: float, copy: float | None, *, in_order: bool = False
) -> Iterator[list[Record]]:
    """Measure case by case.

    Args:
        deadline: On the clock of ``time.monotonic``.
        copy: Bandwidth of a copy on this device, GB/s, where it was measured.
        in_order: A case may take all the time that is left. Otherwise the time is shared out by
            numbers of entries.

    Yields:
        The records of a case.

    Raises:
        DeviceError: the device was lost; nothing more can be measured in this process.
    """
    left = sum(len(case.entries) for case in cases)
    compilations = Compilations()
    for case in cases:
        now = time.monotonic()
        share = max(deadline - now, 0.0)
        if not in_order:
            share *= len(case.entries) / left
        left -= len(case.entries)
        with torch.no_grad():
            records = run_case(case, now + share, copy, compilations)
        measure.free_memory()
        yield records


def run_case(
    case: Case, deadline: float, copy: float | None, compilations: Compilations
) -> list[Record]:
    """Build everybody that can take part, and let them decode in turns."""
    runs = [Run(entry, blank(case, entry)) for entry in case.entries]
    if time.monotonic() >= deadline:
        for run in runs:
            set_aside(run, outcome.NOT_RUN, "the part's time was up")
        return [run.record for run in runs]
    models = Models(case)
    for run in runs:
        prepare(models, run, runs, deadline, compilations)
    if case.rounds:
        clocks = decode_in_turns(case, [run for run in runs if run.stepper is not None], deadline)
        for run in runs:
            if run.stepper is not None:
                finish(models, run, clocks, copy)
    if any(entry.is_compiled or case.compiles(entry) for entry in case.entries):
        torch.compiler.reset()
    return [run.record for run in runs]


def blank(case: Case, entry: Entry) -> Record:
    """A record of a contestant that has not run yet."""
    dtype = str(case.dtype).removeprefix("torch.")
    return Record(outcome.STEP, entry.contestant, case.shape(entry), dtype, outcome.OK)


def set_aside(run: Run, status: str, note: str) -> None:
    """Note why an entry is not measured, and let go of what it holds."""
    run.record.status, run.record.note, run.stepper = status, note, None


def prepare(
    models: Models,
    run: Run,
    runs: Sequence[Run],
    deadline: float,
    compilations: Compilations,
) -> None:
    """Build an entry, let it decode a first period, untimed, and check what it computes."""
    case, entry, record = models.case, run.entry, run.record
    compiles, begin = case.compiles(entry), time.monotonic()
    if begin >= deadline and case.rounds:
        return set_aside(run, outcome.NOT_RUN, "the part's time was up")
    if compiles and begin + compilations.seconds > deadline:
        return set_aside(run, outcome.NOT_RUN, "no time was left to compile")
    before = reserved_bytes(case.device)
    reason = does_not_fit(case, entry)
    if reason:
        return set_aside(run, outcome.ABSENT, reason)
    start = compile_counts() if entry.is_compiled else {}
    try:
        run.stepper = build(models, entry)
        first_period(case, run)
        check(case, run, runs)
    except Exception as error:  # a rival may need more than is here; the others go on
        return fail(run, error)
    if compiles:
        compilations.note(time.monotonic() - begin)
    run.held_bytes = reserved_bytes(case.device) - before
    record.launches = case.steps(entry)
    record.bytes = case.floor_bytes(entry, models.weight_bytes)
    if entry.is_compiled:
        record.compile = {**difference(compile_counts(), start), "recompiles": 0}


def first_period(case: Case, run: Run) -> None:
    """A round that is not timed: kernels are compiled, graphs captured."""
    assert run.stepper is not None
    tokens = []
    for _ in range(case.steps(run.entry)):
        run.stepper.advance(1)
        tokens.append(run.stepper.token.clone())
        if run.first is None and run.stepper.logits is not None:
            run.first = run.stepper.logits.clone()
    run.tokens = torch.cat(tokens, dim=1)


def check(case: Case, run: Run, runs: Sequence[Run]) -> None:
    """Compare with the eager entry on the same cache; raise where this one is wrong.

    Logits are those of the first step. Where there are none, the error is the share of tokens that
    differ: in bf16 two tokens are often equally likely, so there it is only recorded.
    """
    name = FULL if run.entry.context is not None else EAGER
    wanted = replace(run.entry, contestant=name)
    reference = next((x for x in runs if x.entry == wanted and x.tokens is not None), None)
    if reference is None or run.tokens is None or reference.tokens is None:
        return
    record = run.record
    if run.first is None or reference.first is None:
        differ = (run.tokens != reference.tokens).float().mean().item()
        record.max_error = record.relative_error = differ
        tolerance = 0.0 if case.dtype == torch.float32 else 1.0
    else:
        exact = reference.first.double()
        error = run.first.double() - exact
        record.max_error = error.abs().max().item()
        record.relative_error = (error.norm() / exact.norm()).item()
        tolerance = TOLERANCES[case.dtype]
    if not record.relative_error <= tolerance:
        raise ValueError(
            f"wrong result: relative error {record.relative_error:.2g}, allowed {tolerance:.2g}"
        )


def decode_in_turns(case: Case, runs: Sequence[Run], deadline: float) -> dict[str, str]:
    """Rounds of every entry, in an order shuffled anew, until all are done or the time is up.

    Returns:
        The clocks of the device, read after the last round.
    """
    order = list(runs)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(case.rounds):
            if number >= MIN_ROUNDS and time.monotonic() > deadline:
                break
            shuffle(order)
            for run in order:
                if run.stepper is not None:
                    decode_round(case, run)
    finally:
        gc.enable()
    return measure.read_clocks() if case.device.type == "cuda" else {}


def decode_round(case: Case, run: Run) -> None:
    """One timed round; an error, such as memory that runs out, ends the entry."""
    stepper, steps, on_gpu = run.stepper, case.steps(run.entry), case.device.type == "cuda"
    assert stepper is not None
    counts = compile_counts() if run.entry.is_compiled else {}
    allocated = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        stepper.restore()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        stepper.advance(steps)
        if on_gpu:
            torch.cuda.synchronize()
        run.seconds.append((time.perf_counter() - start) / steps)
    except Exception as error:
        return fail(run, error)
    if on_gpu:
        transient = torch.cuda.max_memory_allocated() - allocated
        run.transient_bytes = max(run.transient_bytes, transient)
    if run.entry.is_compiled:
        run.record.compile["recompiles"] += difference(compile_counts(), counts)["graphs"]


def finish(models: Models, run: Run, clocks: dict[str, str], copy: float | None) -> None:
    """Fill in what was measured."""
    case, record = models.case, run.record
    timing = measure.summarize([1e6 * seconds for seconds in run.seconds])
    record.set_timing(timing, clocks, copy)
    record.tokens_per_s = 1e6 * case.batch / timing.median_us
    if case.device.type == "cuda":
        record.peak_bytes = models.weight_bytes + run.held_bytes + run.transient_bytes


def fail(run: Run, error: Exception) -> None:
    """End an entry.

    Raises:
        DeviceError: the device was lost, and with it all other entries.
    """
    set_aside(run, outcome.FAILED, outcome.describe(error))
    if outcome.is_lost(error):
        raise outcome.DeviceError([run.record]) from error


def reserved_bytes(device: torch.device) -> int:
    """Device memory in use, that of CUDA graphs included."""
    if device.type != "cuda":
        return 0
    measure.free_memory()
    return torch.cuda.memory_reserved()


def does_not_fit(case: Case, entry: Entry) -> str | None:
    """What a cache needs and what is free, where that is less."""
    if case.device.type != "cuda":
        return None
    needed, free = case.cache_bytes(entry), torch.cuda.mem_get_info()[0]
    if needed <= free:
        return None
    return f"does not fit: a cache of {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def compile_counts() -> dict[str, int]:
    """What Dynamo and Inductor have counted so far."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}
