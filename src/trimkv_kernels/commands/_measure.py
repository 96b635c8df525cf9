"""The common part of ``perplexity`` and ``kl``."""

from __future__ import annotations

import argparse
import json

from trimkv_kernels.commands import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a measure."""
    _options.add_model(parser)
    _options.add_device(parser)
    _options.add_text_file(parser, "one in words that the small model knows")
    _options.add_policy(parser)
    _options.add_sizes(parser)
    parser.add_argument(
        "--chunk",
        type=_options.count,
        default=1,
        help="tokens read at a time; the buffer's size is faster and, if it divides the budget, "
        "evicts at the same tokens as 1 does (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(measure: str, options: argparse.Namespace) -> None:
    """Print a measure of a text."""
    from dataclasses import asdict

    from trimkv_kernels.evaluation import measure_text

    result = measure_text(
        measure,
        model=options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        text_file=options.text_file,
        policy=options.policy,
        gates=options.gates,
        budget=options.budget,
        buffer=options.buffer,
        chunk=options.chunk,
        progress=True,
    )
    print(json.dumps(asdict(result)) if options.json else result)
