"""What ``trimkv-kernels evaluate`` writes: a table, all figures as JSON, and a plot."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from trimkv_kernels.files import write_files

if TYPE_CHECKING:
    from trimkv_kernels.evaluation.suite import Cell

# If the full cache solves a smaller share than this, accuracies say little.
_SOLVED = 0.2


def write_report(out: Path, cells: Sequence[Cell], setting: dict[str, Any]) -> None:
    """Write ``results.md``, ``results.json`` and, with matplotlib, ``plot.png``."""
    results = {
        "setting": setting,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        # the answers are only in the cells
        "cells": [
            {name: value for name, value in asdict(cell).items() if name != "answers"}
            for cell in cells
        ],
    }
    files: dict[str, bytes | str] = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "results.md": table(cells) + "\n",
    }
    if has_matplotlib():
        files["plot.png"] = plot(cells)
    write_files(out, files)


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a table for each task and length, policies by what they need.

    If the full cache solves less than a fifth of the cases, a second table has the agreement with
    its answers.
    """
    parts = []
    for panel in _panels(cells):
        first = panel[0]
        parts.append(_table(panel, f"{first.task}, {first.length} tokens, {first.unit}", "figure"))
        if first.agreement is not None and first.figure < _SOLVED:
            title = (
                f"{first.task}, {first.length} tokens: the full cache solves "
                f"{first.figure:.0%}, so this is the agreement with its answers"
            )
            parts.append(_table(panel, title, "agreement"))
    return "\n\n".join(parts)


def _table(panel: Sequence[Cell], title: str, what: str) -> str:
    full, *bounded = panel
    budgets = sorted({cell.budget for cell in bounded if cell.budget is not None})
    lines = [
        f"### {title}",
        "",
        "| policy | needs | " + " | ".join(map(str, budgets)) + " | KV bytes | tokens/s |",
        "| --- | --- |" + " ---: |" * (len(budgets) + 2),
    ]
    shown = _shown(full, what) + (" everywhere" if budgets else "")
    spread = ["", *[""] * max(len(budgets) - 1, 0)][: len(budgets)]
    columns = [shown, *spread[1:]] if budgets else [shown]
    lines.append(
        f"| {full.policy} | {full.group} | {' | '.join(columns)} | {full.kv_bytes:,} | "
        f"{full.tokens_per_second:.0f} |"
    )
    for policy in dict.fromkeys(cell.policy for cell in _grouped(bounded)):
        row = {cell.budget: cell for cell in bounded if cell.policy == policy}
        columns = [_shown(row[b], what) if b in row else "-" for b in budgets]
        sizes = " / ".join(f"{row[b].kv_bytes:,}" for b in budgets if b in row)
        speed = " / ".join(f"{row[b].tokens_per_second:.0f}" for b in budgets if b in row)
        group = next(iter(row.values())).group
        lines.append(f"| {policy} | {group} | {' | '.join(columns)} | {sizes} | {speed} |")
    return "\n".join(lines)


def _shown(cell: Cell, what: str) -> str:
    if what == "agreement":
        return f"{cell.agreement:.1%}"
    if cell.unit == "share":
        return f"{cell.figure:.1%} [{cell.low:.0%}, {cell.high:.0%}]"
    return f"{cell.figure:.4g} [{cell.low:.3g}, {cell.high:.3g}]"


def plot(cells: Sequence[Cell]) -> bytes:
    """Quality over memory, a panel for each task and length, as a PNG."""
    from matplotlib.figure import Figure

    panels = _panels(cells)
    figure = Figure(figsize=(6, 3.6 * len(panels)), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, number)
        full, *bounded = panel
        axes.axhline(full.figure, color="black", linestyle=":", label=full.policy)
        for policy in dict.fromkeys(cell.policy for cell in _grouped(bounded)):
            row = sorted(
                (cell for cell in bounded if cell.policy == policy), key=lambda c: c.kv_bytes
            )
            errors = [
                [max(cell.figure - cell.low, 0) for cell in row],
                [max(cell.high - cell.figure, 0) for cell in row],
            ]
            memory = [cell.kv_bytes / 1e6 for cell in row]
            style = {"trained": "-", "needs attention": "--"}.get(row[0].group, "-.")
            figures = [cell.figure for cell in row]
            axes.errorbar(memory, figures, yerr=errors, label=policy, linestyle=style, marker="o")
        axes.set_title(f"{full.task}, {full.length} tokens")
        axes.set_xlabel("KV cache of one row, MB")
        axes.set_ylabel(full.unit)
        axes.legend(fontsize="x-small")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110, metadata={"Software": None})
    return written.getvalue()


def _panels(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells of one task and length, the full cache first."""
    panels: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        panels.setdefault((cell.task, cell.length), []).append(cell)
    return [sorted(panel, key=lambda cell: cell.budget is not None) for panel in panels.values()]


def _grouped(cells: Sequence[Cell]) -> list[Cell]:
    """Cells in the order of what their policies need: nothing, attention, training."""
    order = ("needs nothing", "needs attention", "trained")
    return sorted(cells, key=lambda cell: order.index(cell.group))
