"""What a whole decode step takes: full caches, a bounded cat, ours, on one model, side by side.

    python benchmarks/decode.py                          # the CPU contest, under five minutes
    python benchmarks/decode.py --device cuda --models qwen3-4b --contexts 32768 --batches 4

`make gpu` runs a part of it. See `README.md` for who takes part and how to read it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import trimkv_kernels
from bounded_cat import BoundedCatCache, attach_gates
from contest import (
    TOY,
    Contestant,
    Setting,
    fixed_threads,
    leave_attention_out,
    make_gates,
    make_model,
    share_weights,
)
from gpu import measure, outcome, report
from gpu.goals import STEP_GOALS, Goal
from gpu.outcome import Record, Results
from trimkv_kernels.policies.trimkv import TrimKV

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "qwen3-0.6b": Setting(num_layers=28, vocab_size=151936, budget=1024),
    "qwen3-4b": Setting(
        num_layers=36,
        hidden_size=2560,
        intermediate_size=9728,
        num_heads=32,
        vocab_size=151936,
        budget=1024,
    ),
    "8x1024": Setting(),
    "toy": TOY,
}
FULL, STATIC, CAT, FLOOR = "full_eager", "static_compiled", "cat", "no_attention"
EAGER, COMPILED, LOOP = outcome.OUR_STEPS
COMPILE_SECONDS = 90  # what Inductor may take; with less left nothing is compiled
MIN_ROUNDS = 3
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # bf16 through all layers
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


@dataclass(frozen=True)
class Entry:
    """A contestant with what it differs in from others of its name.

    Attributes:
        context: Tokens in a full cache.
        buffer: Steps from one eviction to the next in a bounded one.
    """

    contestant: str
    context: int | None = None
    buffer: int | None = None

    @property
    def is_compiled(self) -> bool:
        return self.contestant in (STATIC, COMPILED)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a batch, on which all entries decode in turns.

    Attributes:
        model: Of `MODELS`.
        setting: Its sizes, and budget; ``prompt`` tokens are what a bounded cache reads.
        rounds: Timed rounds; 0 only checks that all of it runs.
        plain_steps: Steps of a round where nothing is evicted; otherwise it is the buffer.
        backend: What ``torch.compile`` is given.
    """

    model: str
    setting: Setting
    batch: int
    entries: tuple[Entry, ...]
    device: torch.device
    dtype: torch.dtype
    rounds: int = 5
    plain_steps: int = 32
    backend: str = "inductor"

    def steps(self, entry: Entry) -> int:
        """Steps of a round: whole periods, one eviction in each."""
        period = entry.buffer or 1
        return period * -(-self.plain_steps // period)

    def shape(self, entry: Entry) -> dict[str, Any]:
        """What tells this step from others, in the results."""
        shape: dict[str, Any] = {"model": self.model, "batch": self.batch}
        if entry.context is not None:
            shape["context"] = entry.context
        if entry.buffer is not None:
            shape |= {"budget": self.setting.budget, "buffer": entry.buffer}
        return shape

    @property
    def pair_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        setting = self.setting
        return (
            2 * setting.num_layers * setting.num_kv_heads * setting.head_dim * self.dtype.itemsize
        )

    def floor_bytes(self, entry: Entry, weight_bytes: int) -> int:
        """What a mean step must read: every weight, and each pair that it attends to, once."""
        length = 0.0
        if entry.context is not None:
            length = entry.context + (self.steps(entry) + 1) / 2
        elif entry.buffer is not None:
            length = self.setting.budget + (entry.buffer + 1) / 2
        return weight_bytes + int(self.batch * self.pair_bytes * length)

    def cache_bytes(self, entry: Entry) -> int:
        """Keys and values at the end of a round, and the copy of a layer that a cat makes."""
        length = self.setting.budget + (entry.buffer or 0)
        if entry.context is not None:
            length = entry.context + self.steps(entry)
        copies = 1 + (entry.contestant in (FULL, CAT)) / self.setting.num_layers
        return int(self.batch * self.pair_bytes * length * copies)


class Models:
    """One set of weights and of gates, and the models that share them, made when first needed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        longest = max((entry.context or 0 for entry in case.entries), default=0)
        sizes = replace(case.setting, prompt=max(longest, case.setting.prompt))
        with torch.device(case.device), _default_dtype(case.dtype):
            self.stock = make_model(sizes)
            self.gates = make_gates(case.setting)
        self.prompt = torch.randint(
            case.setting.vocab_size, (case.batch, case.setting.prompt), device=case.device
        )
        # a tensor of its own: compiled code would meet other strides in the second step
        self.token = self.prompt[:, -1:].clone(memory_format=torch.contiguous_format)
        self._patched: dict[int, tuple[nn.Module, Any]] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters; the embedding is the output matrix, and read as a whole."""
        return sum(parameter.nbytes for parameter in self.stock.parameters())

    @cached_property
    def cat(self) -> nn.Module:
        model = share_weights(self.stock)
        attach_gates(model, self.gates)
        return model

    @cached_property
    def without_attention(self) -> nn.Module:
        return leave_attention_out(self.stock)

    def patched(self, buffer: int) -> tuple[nn.Module, Any]:
        """A patched model and its handle."""
        if buffer not in self._patched:
            model = share_weights(self.stock)
            policy = TrimKV(self.gates, age_offset=0)
            budget = self.case.setting.budget
            handle = trimkv_kernels.patch(model, policy, budget=budget, buffer=buffer)
            self._patched[buffer] = model, handle
        return self._patched[buffer]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def do_nothing() -> None:
    """Before a round of a cache that is as long at its end as at its start."""


@dataclass
class Stepped:
    """Greedy steps of a model on a cache.

    Attributes:
        token: ``[batch, 1]``, the next input.
        restore: Makes the cache as long as it was. Not timed.
    """

    contestant: Contestant
    token: Tensor
    restore: Callable[[], None] = do_nothing

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.token = self.contestant.step(self.token, time.perf_counter)

    @property
    def logits(self) -> Tensor | None:
        """``[batch, vocabulary]`` of the latest step."""
        return self.contestant.logits


class Looped:
    """Steps of ``decode_loop``, which shows tokens and no logits."""

    logits = None

    def __init__(self, model: nn.Module, prompt: Tensor, limit: int) -> None:
        self._tokens = trimkv_kernels.decode_loop(model, prompt, max_new_tokens=limit)
        self.token = next(self._tokens)[:, None]
        self.restore = do_nothing

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.token = next(self._tokens)[:, None]


Stepper = Stepped | Looped


def build(models: Models, entry: Entry) -> Stepper:
    """A contestant with a filled cache."""
    if entry.contestant == FLOOR:
        contestant = Contestant(models.without_attention, None)
        return Stepped(contestant, models.token)
    if entry.context is not None:
        return build_full(models, entry)
    return build_bounded(models, entry)


def build_full(models: Models, entry: Entry) -> Stepped:
    """``context`` random pairs in every layer, the same for both kinds of cache."""
    case, model = models.case, models.stock
    context = entry.context or 0
    length = context + case.steps(entry)
    if entry.contestant == STATIC:
        cache: Cache = StaticCache(config=model.config, max_cache_len=length)
    else:
        cache = DynamicCache(config=model.config)
    setting = case.setting
    shape = (case.batch, setting.num_kv_heads, context, setting.head_dim)
    generator = torch.Generator(case.device).manual_seed(1)
    options: dict[str, Any] = {
        "generator": generator, "dtype": case.dtype, "device": case.device
    }  # fmt: skip
    for layer in range(setting.num_layers):
        cache.update(torch.randn(shape, **options), torch.randn(shape, **options), layer)

    def restore() -> None:
        if entry.contestant == STATIC:
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)
        elif cache.get_seq_length() > context:
            cache.crop(context - cache.get_seq_length())

    if entry.contestant == STATIC:
        # a break in the rival's graph is no reason to leave it out
        model = compiled(model, case, fullgraph=False)
    return Stepped(Contestant(model, cache), models.token, restore)


def build_bounded(models: Models, entry: Entry) -> Stepper:
    """A cache that has read the prompt."""
    case, buffer = models.case, entry.buffer or 1
    if entry.contestant == CAT:
        model, cache = (
            models.cat,
            BoundedCatCache(case.setting.num_layers, case.setting.budget, buffer),
        )
    else:
        model, handle = models.patched(buffer)
        if entry.contestant == LOOP:
            # the first period, all rounds, and the prompt's token
            return Looped(model, models.prompt, (case.rounds + 1) * case.steps(entry) + 1)
        cache = handle.new_cache()
    read = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    token = model(models.prompt, **read).logits[:, -1].argmax(dim=-1, keepdim=True)
    if entry.contestant == COMPILED:
        model = compiled(model, case, fullgraph=True)
    return Stepped(Contestant(model, cache, buffer), token)


def compiled(model: nn.Module, case: Case, *, fullgraph: bool) -> Callable[..., Any]:
    """As ``generate`` compiles on a GPU, for one shape."""
    mode = "reduce-overhead" if case.device.type == "cuda" else None
    call = torch.compile(
        model, backend=case.backend, mode=mode, fullgraph=fullgraph, dynamic=False
    )  # fmt: skip

    def step(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's output is done with
        return call(*args, **kwargs)

    return step


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


def run_cases(cases: Sequence[Case], deadline: float, copy: float | None) -> Iterator[list[Record]]:
    """Measure case by case; the time until ``deadline`` is shared out by numbers of entries.

    Args:
        deadline: On the clock of ``time.monotonic``.
        copy: Bandwidth of a copy on this device, GB/s, where it was measured.

    Yields:
        The records of a case.
    """
    left = sum(len(case.entries) for case in cases)
    for case in cases:
        now = time.monotonic()
        share = max(deadline - now, 0.0) * len(case.entries) / left
        left -= len(case.entries)
        with torch.no_grad():
            records = run_case(case, now + share, copy)
        measure.free_memory()
        yield records


def run_case(case: Case, deadline: float, copy: float | None) -> list[Record]:
    """Build everybody that can take part, and let them decode in turns."""
    runs = [Run(entry, blank(case, entry)) for entry in case.entries]
    if time.monotonic() >= deadline:
        for run in runs:
            set_aside(run, outcome.NOT_RUN, "the part's time was up")
        return [run.record for run in runs]
    models = Models(case)
    for run in runs:
        prepare(models, run, runs, deadline)
    if case.rounds:
        clocks = decode_in_turns(case, [run for run in runs if run.stepper is not None], deadline)
        for run in runs:
            if run.stepper is not None:
                finish(models, run, clocks, copy)
    if any(entry.is_compiled for entry in case.entries):
        torch.compiler.reset()
    return [run.record for run in runs]


def blank(case: Case, entry: Entry) -> Record:
    """A record of a contestant that has not run yet."""
    dtype = str(case.dtype).removeprefix("torch.")
    return Record(outcome.STEP, entry.contestant, case.shape(entry), dtype, outcome.OK)


def set_aside(run: Run, status: str, note: str) -> None:
    """Note why an entry is not measured, and let go of what it holds."""
    run.record.status, run.record.note, run.stepper = status, note, None


def prepare(models: Models, run: Run, runs: Sequence[Run], deadline: float) -> None:
    """Build an entry, let it decode a first period, untimed, and check what it computes."""
    case, entry, record = models.case, run.entry, run.record
    compiles = case.backend == "inductor" and entry.is_compiled
    if compiles and time.monotonic() + COMPILE_SECONDS > deadline:
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
        return set_aside(run, outcome.FAILED, describe(error))
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
        return set_aside(run, outcome.FAILED, describe(error))
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


def describe(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]


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


def gpu_entries(contexts: Sequence[int], buffer: int) -> tuple[Entry, ...]:
    """Everybody; what takes long to compile comes last."""
    bounded = tuple(Entry(name, buffer=buffer) for name in (EAGER, LOOP, CAT, COMPILED))
    full = tuple(Entry(FULL, context=context) for context in contexts)
    static = tuple(Entry(STATIC, context=context) for context in contexts)
    return (*full, *bounded, *static)


def cpu_entries(contexts: Sequence[int], buffer: int, compiled: bool) -> tuple[Entry, ...]:
    """What can be told apart without a GPU: each bounded cache also evicting at every step."""
    full = tuple(Entry(FULL, context=context) for context in contexts)
    bounded = tuple(
        Entry(name, buffer=period) for period in (buffer, 1) for name in (EAGER, CAT)
    )  # fmt: skip
    extra = (Entry(COMPILED, buffer=buffer),) if compiled else ()
    return (*full, *bounded, *extra, Entry(FLOOR))


def sized(model: str, budget: int | None = None) -> Setting:
    """A model's sizes; the prompt is read, cut to the budget, and decoding starts a period."""
    setting = MODELS[model]
    budget = budget or setting.budget
    return replace(setting, budget=budget, prompt=budget + 2 * setting.buffer)


def subset_cases(device: torch.device, toy: bool) -> list[Case]:
    """What `make gpu` runs: G1 to G5 of the goals; a toy on the CPU for its dry run."""
    model, context = ("toy", 64) if toy else ("qwen3-4b", 32768)
    setting = sized(model)
    everybody = gpu_entries([context], setting.buffer)
    ours = tuple(entry for entry in everybody if entry.contestant in outcome.OUR_STEPS)
    options: dict[str, Any] = {"model": model, "setting": setting, "device": device}
    if toy:
        options |= {"dtype": torch.float32, "rounds": 0, "plain_steps": 4, "backend": "eager"}
        return [Case(batch=2, entries=everybody, **options)]
    options |= {"dtype": torch.bfloat16}
    batches = ((4, everybody), (8, ours), (64, ours))
    return [Case(batch=batch, entries=entries, **options) for batch, entries in batches]


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
        for records in run_cases(chosen_cases(arguments), deadline, copy):
            results.records += records
            print(report.steps_table(records), end="\n\n", flush=True)
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
