"""write gates in another layout"""

from __future__ import annotations

import argparse

from trimkv_kernels.gates.checkpoint import LAYOUTS, convert_gates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", help="folder or hub id of gates, of either layout")
    parser.add_argument("destination", help="folder to write")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write")
    parser.add_argument("--revision", help="revision of the source on the hub")


def run(options: argparse.Namespace) -> None:
    """Convert."""
    convert_gates(options.source, options.destination, layout=options.to, revision=options.revision)
