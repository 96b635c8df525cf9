"""next-token loss of a text on a bounded cache"""

from __future__ import annotations

import argparse

from trimkv_kernels.commands import _measure
from trimkv_kernels.commands._measure import add_arguments

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    """Print the measure."""
    _measure.run("perplexity", options)
