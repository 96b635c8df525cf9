"""measure policies and budgets on tasks

A table, results.json and a plot are written to --out. Each figure is written as soon as it is
measured, so a run that is started again continues where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimkv_kernels.commands import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    _options.add_model(parser)
    _options.add_device(parser)
    parser.add_argument(
        "--policies",
        required=True,
        type=names,
        help="comma-separated names; snap_kv+adaptive_heads shares the budget out (uniform, "
        "global_top_k, adaptive_heads, layer_preference)",
    )
    parser.add_argument("--budgets", required=True, type=counts, help="pairs per head: 64,128")
    parser.add_argument("--tasks", required=True, type=names, help="comma-separated names")
    parser.add_argument("--out", required=True, help="folder for table, JSON, plot and cells")
    parser.add_argument(
        "--length", type=counts, default=(1000,), help="tokens of prompts and texts: 1000,2000"
    )
    parser.add_argument("--samples", type=_options.count, default=10, help="cases of a task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    _options.add_text_file(parser, "made sentences; kl, perplexity and agreement need one")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=task_file,
        metavar="TASK=FILE",
        help="questions of a task: JSON lines, or a JSON list",
    )
    _options.add_gates(parser, "folder or hub id of gates, for trimkv")
    parser.add_argument("--buffer", type=_options.count, default=64, help="new tokens per eviction")
    parser.add_argument("--chunk", type=_options.count, default=64, help="tokens read at a time")
    parser.add_argument("--batch", type=_options.count, default=4, help="prompts answered at once")


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from trimkv_kernels.evaluation.report import has_matplotlib, table
    from trimkv_kernels.evaluation.suite import Grid, evaluate
    from trimkv_kernels.loading import ModelSource

    grid = Grid(
        policies=options.policies,
        budgets=options.budgets,
        tasks=options.tasks,
        lengths=options.length,
        samples=options.samples,
        seed=options.seed,
        buffer=options.buffer,
        chunk=options.chunk,
        batch=options.batch,
        gates=options.gates,
        text_file=options.text_file,
        data=dict(options.data),
    )
    source = ModelSource(options.model, options.revision, options.dtype, options.device)
    print(table(evaluate(grid, source, options.out, progress=True)))
    if not has_matplotlib():
        print("no plot: it needs matplotlib, pip install 'trimkv-kernels[inspect]'")


def names(text: str) -> tuple[str, ...]:
    """``"a,b"`` to ``("a", "b")``, as the type of an argument."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(found):
        raise argparse.ArgumentTypeError(f"must be names such as a,b, got {text!r}")
    return found


def counts(text: str) -> tuple[int, ...]:
    """``"64,128"`` to ``(64, 128)``, as the type of an argument."""
    return tuple(dict.fromkeys(_options.count(part.strip()) for part in text.split(",")))


def task_file(text: str) -> tuple[str, Path]:
    """``"gsm8k=test.jsonl"``, as the type of an argument."""
    task, sign, file = text.partition("=")
    if not (task and sign and file):
        raise argparse.ArgumentTypeError(f"must be TASK=FILE, got {text!r}")
    return task, Path(file)
