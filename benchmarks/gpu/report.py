"""What is written: a line of JSON per case and contestant, a table, the goals, a few plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .goals import GOALS, STEP_GOALS, Goal
from .outcome import OURS, PICTURES, REQUESTS, STEP, Record, Results


def append_lines(path: Path, machine: dict[str, Any], records: Iterable[Record]) -> None:
    """Add records to the JSON lines: what is written stays written if the run is cut short."""
    with path.open("a") as lines:
        for record in records:
            fields = {name: _finite(value) for name, value in asdict(record).items()}
            lines.write(json.dumps(fields | machine, allow_nan=False) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """What `append_lines` wrote; none where there is no file yet."""
    written = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in written]


def of_whom(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """The machine that the latest line holds for, and its measured rates."""
    written = lines(path)
    if not written:
        return {}, {}
    facts = ("device", "driver", "torch", "triton", "transformers", "python", "commit", "tests")
    last = written[-1]
    return {name: last.get(name) for name in facts}, last.get("rates", {})


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(
    machine: dict[str, Any], rates: dict[str, float], notes: Sequence[str], results: Results
) -> str:
    """The report: what it ran on, what to know about it, goals, and every figure."""
    rows = [_figures(record) for record in results.records if record.op not in (STEP, REQUESTS)]
    steps = [record for record in results.records if record.op == STEP]
    served = [_served(record) for record in results.records if record.op == REQUESTS]
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    ceilings = ", ".join(
        f"{name} {rates[name]:.0f} {unit}"
        for name, unit in (("copy", "GB/s (10^9, read and written)"), ("matmul", "TFLOP/s (bf16)"))
        if name in rates
    )
    return "\n".join([
        "# Kernels on one GPU", "",
        facts + ".", "", f"Measured ceilings: {ceilings or 'none, no clock'}.",
        _clocks(results), "",
        *[f"- {note}" for note in notes], "",
        "## Goals", "",
        "A ratio is the geometric mean over the cases that both sides ran, the best of several "
        "rivals taken in each.",
        "", goals_table(results), "",
        "## Figures", "",
        "Microseconds per launch: a graph's time over its launches, each on buffers of its own; an "
        "`evict` launch is all layers. `wall` is without a graph, `drift` the second half of the "
        "replays against the first. Errors are those of the first launch, or a part of it, against "
        "float64.",
        "", _table(rows) if rows else "None.", "",
        "## Decode steps", "",
        "Milliseconds of a whole step, evictions spread over all. The floor reads every weight and "
        "each attended pair once, at the copy bandwidth. Memory: weights, cache, and what a round "
        "takes beyond.",
        "", steps_table(steps) if steps else "None.", "",
        "## Requests", "",
        "Prompts, and tokens generated for all of them in a second, with as many requests at once "
        "as the same bytes of cache hold. Memory: the most that was allocated, weights included.",
        "", _table(served) if served else "None.", "",
    ])  # fmt: skip


def _clocks(results: Results) -> str:
    """What the GPU's clock did while cases were measured."""
    states = [record.clocks for record in results.records if record.clocks]
    if not states:
        return "Clocks: not read."
    speeds = sorted({int(float(state["sm_mhz"])) for state in states})
    held = ", ".join(sorted({state["throttle"] for state in states}))
    return f"SM clock {speeds[0]} to {speeds[-1]} MHz; reasons to hold it back: {held}."


def goals_table(results: Results, goals: Sequence[Goal] = (*GOALS, *STEP_GOALS)) -> str:
    """Every goal beside what was measured."""
    rows = [goal.row(results) for goal in goals]
    return _table([row | {"measured": _number(row["measured"])} for row in rows])


def plot(results: Results, folder: Path) -> list[str]:
    """At most five pictures; none where matplotlib is missing or nothing was timed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    timed = [record for record in results.records if record.median_us is not None]
    names = []
    for name, ops in PICTURES.items():
        shown = [record for record in timed if record.op in ops]
        if shown:
            figure = (_plot_lines if name == "decode" else _plot_bars)(pyplot, shown)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            names.append(f"{name}.png")
    return names


def _plot_lines(pyplot: Any, records: list[Record]) -> Any:
    """Share of the copy bandwidth against batch: a panel per number of slots, one of steps."""
    panels = sorted({_slots(record) for record in records})
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False)
    figure.set_size_inches(3.2 * len(panels) + 2, 4)
    colors = pyplot.get_cmap("tab20").colors
    contestants = list(dict.fromkeys(record.contestant for record in records))
    for axis, slots in zip(axes[0], panels, strict=True):
        for name, color in zip(contestants, colors, strict=False):
            here = [x for x in records if x.contestant == name and _slots(x) == slots]
            here.sort(key=lambda record: record.shape["batch"])
            batches = [record.shape["batch"] for record in here]
            shares = [100 * (record.copy_share or 0) for record in here]
            width = 2.5 if name in OURS else 1
            axis.plot(batches, shares, "o-", color=color, markersize=3, linewidth=width, label=name)
        title = f"{slots:g} slots" if slots < math.inf else "whole step"
        axis.set(title=title, xlabel="batch", ylim=(0, 110))
        axis.set_xscale("log", base=2)
    axes[0][0].set_ylabel("% of the copy bandwidth")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _slots(record: Record) -> float:
    """By what panels are told apart; infinite for a whole step, whose panel comes last."""
    return math.inf if record.op == STEP else record.shape["slots"]


def _plot_bars(pyplot: Any, records: list[Record]) -> Any:
    """Time of everybody in every case."""
    labels = [f"{record.op} {record.shape_text}: {record.contestant}" for record in records]
    times = [record.median_us for record in records]
    colors = ["tab:blue" if record.contestant in OURS else "tab:gray" for record in records]
    figure, axis = pyplot.subplots(figsize=(8, 0.32 * len(records) + 1))
    bars = axis.barh(labels, times, color=colors)
    axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axis.set(xscale="log", xlabel="us per launch")
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    return figure


def _figures(record: Record) -> dict[str, str]:
    spread = ""
    if record.median_us is not None:
        spread = f"{_number(record.p20_us)} - {_number(record.p80_us)}"
    return {
        "op": record.op,
        "shape": record.shape_text,
        "contestant": record.contestant,
        "us": _number(record.median_us),
        "p20 - p80": spread,
        "drift %": _number(_percent(record.drift)),
        "wall us": _number(record.wall_us),
        "GB/s": _number(record.gb_per_s),
        "% of copy": _number(_percent(record.copy_share)),
        "TFLOP/s": _number(record.tflop_per_s),
        "max error": _number(record.max_error),
        "status": record.status if record.note is None else f"{record.status}: {record.note}",
    }


def steps_table(records: Iterable[Record]) -> str:
    """Whole decode steps, as a table."""
    return _table([_step_figures(record) for record in records])


def _step_figures(record: Record) -> dict[str, str]:
    def scaled(value: float | None, scale: float) -> str:
        return "" if value is None else _number(value / scale)

    spread = f"{scaled(record.p20_us, 1e3)} - {scaled(record.p80_us, 1e3)}"
    return {
        "step": record.shape_text,
        "contestant": record.contestant,
        "ms": scaled(record.median_us, 1e3),
        "p20 - p80": "" if record.p20_us is None else spread,
        "tokens/s": _number(record.tokens_per_s),
        "GB": scaled(record.peak_bytes, 1e9),
        "% of floor": _number(_percent(record.copy_share)),
        "compile": " ".join(f"{name}={count}" for name, count in record.compile.items()),
        "error": _number(record.relative_error),
        "status": record.status if record.note is None else f"{record.status}: {record.note}",
    }


def _served(record: Record) -> dict[str, str]:
    return {
        "load": record.shape_text,
        "contestant": record.contestant,
        "GiB of cache": _number(None if record.bytes is None else record.bytes / 2**30),
        "tokens/s": _number(record.tokens_per_s),
        "GB": _number(None if record.peak_bytes is None else record.peak_bytes / 1e9),
        "other tokens %": _number(_percent(record.max_error)),
        "status": record.status if record.note is None else f"{record.status}: {record.note}",
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [
        [str(cell).replace("|", "/").replace("\n", " ") for cell in row.values()] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
