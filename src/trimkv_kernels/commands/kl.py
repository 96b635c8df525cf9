"""divergence of a bounded cache from the full one on a text"""

from __future__ import annotations

import argparse

from trimkv_kernels.commands import _measure
from trimkv_kernels.commands._measure import add_arguments

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    """Print the measure."""
    _measure.run("kl", options)
