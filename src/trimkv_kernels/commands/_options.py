"""Options that several commands have, each declared once."""

from __future__ import annotations

import argparse

from trimkv_kernels.loading import DTYPES


def add_model(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--model``, ``--revision`` and ``--dtype``."""
    default = "" if required else "; default: the small one in this package"
    parser.add_argument("--model", required=required, help=f"folder, hub id or smollm2{default}")
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument("--dtype", default="auto", help=f"dtype of the model: {', '.join(DTYPES)}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", default="cpu", help="device of the model, such as cuda")


def add_text_file(parser: argparse.ArgumentParser, default: str) -> None:
    """``--text-file``; ``default`` says what is read without it."""
    parser.add_argument("--text-file", help=f"UTF-8 text; default: {default}")


def add_policy(parser: argparse.ArgumentParser) -> None:
    """``--policy`` and ``--gates``."""
    parser.add_argument("--policy", help="registered name; default: what patch() chooses")
    add_gates(parser, "folder or hub id of gates, for trimkv")


def add_gates(parser: argparse.ArgumentParser, what: str) -> None:
    """``--gates``."""
    parser.add_argument("--gates", help=what)


def add_sizes(
    parser: argparse.ArgumentParser, *, budget: int | None = None, buffer: int | None = None
) -> None:
    """``--budget`` and ``--buffer``; None leaves them to ``patch()``."""
    for name, value, what in (
        ("--budget", budget, "pairs kept per head"),
        ("--buffer", buffer, "new tokens between evictions"),
    ):
        shown = "as patch()" if value is None else value
        parser.add_argument(name, type=count, default=value, help=f"{what}; default: {shown}")


def count(text: str) -> int:
    """An int of at least 1, as the type of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, got {text!r}")
    return int(text)
