"""draw what a policy keeps of a text"""

from __future__ import annotations

import argparse

from trimkv_kernels.commands import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", required=True, help="folder for the pictures and the page")
    _options.add_model(parser)
    _options.add_device(parser)
    _options.add_text_file(parser, "facts and a question")
    _options.add_policy(parser)
    _options.add_sizes(parser, budget=64, buffer=1)
    parser.add_argument(
        "--prompt-length",
        type=_options.count,
        default=1,
        help="tokens of the first call, the prompt",
    )
    parser.add_argument(
        "--layers", type=layer_numbers, help="only these, such as 0,3-5; default: all"
    )


def run(options: argparse.Namespace) -> None:
    """Draw, and print what was written."""
    from trimkv_kernels.inspection import inspect_text

    written = inspect_text(
        options.out,
        model=options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        text_file=options.text_file,
        policy=options.policy,
        gates=options.gates,
        budget=options.budget,
        buffer=options.buffer,
        prompt_length=options.prompt_length,
        layers=options.layers,
        progress=True,
    )
    for path in written:
        print(path)


def layer_numbers(text: str) -> tuple[int, ...]:
    """``"0,3-5"`` to ``(0, 3, 4, 5)``, as the type of an argument."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdigit() for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(
                f"must be numbers and ranges such as 0,3-5, got {text!r}"
            )
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(found))
