"""How a contest is timed: CUDA graphs replayed in turns, and what the machine did meanwhile."""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from . import nvml

ROOT = Path(__file__).parents[2]
MAX_REPLAYS = 30
MIN_REPLAYS = 3  # of what takes long; everything else gets MAX_REPLAYS
SECONDS = 0.8  # of replays per contestant of a case


def do_nothing() -> None:
    """The reset of a contestant that changes none of its inputs."""


@dataclass
class Run:
    """What a contestant built for a case.

    Attributes:
        launch: Issues launch number ``index`` on that launch's own buffers; returns what it
            computed, in the order of the case's exact results.
        reset: Puts back the inputs that launches change. Never timed.
    """

    launch: Callable[[int], Sequence[Tensor]]
    reset: Callable[[], object] = do_nothing

    def all(self, launches: int) -> None:
        """Issue every launch once."""
        for index in range(launches):
            self.launch(index)


@dataclass(frozen=True)
class Timing:
    """Microseconds per launch, gaps between launches included, over ``replays`` of the graph."""

    replays: int
    median_us: float
    p20_us: float
    p80_us: float
    drift: float  # second half of the replays over the first half, less 1: what noise there is


def capture(run: Run, launches: int) -> torch.cuda.CUDAGraph:
    """Record all launches in a graph, after warming up: kernels are compiled and loaded by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run.reset()
            run.all(launches)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.all(launches)
    return graph


def replay_in_turns(
    entries: dict[str, tuple[Run, torch.cuda.CUDAGraph]], launches: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Replay the graphs of one case by turns, forth and back, without waiting in between.

    The queue never runs dry, so what a start event measures is the device and not the host.

    Returns:
        A timing per name, and the clocks read while the device was at work.
    """
    replays = {name: _affordable(*entry) for name, entry in entries.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {x: [] for x in entries}
    names = list(entries)
    for turn in range(max(replays.values(), default=0)):
        for name in names if turn % 2 == 0 else reversed(names):
            if turn < replays[name]:
                events[name].append(_replay(*entries[name]))
    clocks = read_clocks()
    torch.cuda.synchronize()
    timings = {}
    for name, pairs in events.items():
        times = [1e3 * start.elapsed_time(end) / launches for start, end in pairs]
        timings[name] = summarize(times)
    return timings, clocks


def summarize(times: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile, and drift of a series."""
    half = len(times) // 2
    drift = statistics.median(times[half:]) / statistics.median(times[:half]) - 1
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(len(times), statistics.median(times), deciles[1], deciles[7], drift)


def wall_us(run: Run, launches: int) -> float:
    """Microseconds per launch as Python sees them, without a graph: the host's cost is in."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < SECONDS:
        run.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run.all(launches)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / launches


def peak_bytes(run: Run) -> int:
    """Device memory that one launch takes at its worst moment, beyond what was there."""
    run.reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.launch(0)
    return torch.cuda.max_memory_allocated() - before


def free_memory() -> None:
    """Give back what a finished case held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ceilings(device: torch.device, toy: bool) -> dict[str, float]:
    """The two rates everything is compared with: a large copy (both ways), a large product."""
    size = 1 << (10 if toy else 31)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 64 if toy else 8192
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    runs = {
        "copy": (Run(lambda _: [target.copy_(source)]), 2 * size / 1e3),  # GB/s = bytes / us / 1e3
        "matmul": (Run(lambda _: [left @ right]), 2 * side**3 / 1e6),  # TFLOP/s = flops / us / 1e6
    }
    rates = {}
    for name, (run, work) in runs.items():
        if device.type == "cuda":
            timing = replay_in_turns({name: (run, capture(run, 1))}, 1)[0][name]
            rates[name] = work / timing.median_us
        else:
            run.all(1)
    return rates


def read_clocks() -> dict[str, str]:
    """Clocks, temperature, power, and why the clock is held back; empty without NVML."""
    device = nvml.of_current_device()
    try:
        return {} if device is None else device.clocks()
    except OSError:
        return {}


def machine(device: torch.device) -> dict[str, str | None]:
    """What the figures hold for."""
    on_gpu = device.type == "cuda"
    driver = nvml.of_current_device() if on_gpu else None
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu (dry run)",
        "driver": driver.driver() if driver else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _replay(run: Run, graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run.reset()
    start.record()
    graph.replay()
    end.record()
    return start, end


def _affordable(run: Run, graph: torch.cuda.CUDAGraph) -> int:
    """How often a graph is replayed, found by replaying it once."""
    start, end = _replay(run, graph)
    torch.cuda.synchronize()
    replays = int(1e3 * SECONDS / max(start.elapsed_time(end), 1e-3))
    return min(max(replays, MIN_REPLAYS), MAX_REPLAYS)


def _commit() -> str | None:
    """The revision that is checked out, with a plus where files differ from it."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return commit + "+" * bool(changed) if commit else None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
