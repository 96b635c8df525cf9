"""Perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimkv_kernels.evaluation.reader import Reader
from trimkv_kernels.evaluation.tasks.base import Material, Task, register_task


@register_task("perplexity")
class Perplexity(Task):
    """Exponential of the mean next-token loss over a whole text.

    The interval takes blocks of 64 predictions as independent.
    """

    unit = "perplexity"
    higher_is_better = False

    def cases(self, material: Material) -> list[list[int]]:
        return material.excerpts()

    def measure(self, cases: Sequence[list[int]], reader: Reader) -> list[float]:
        return [block for tokens in cases for block in reader.losses(tokens)]

    def figure(self, mean: float) -> float:
        return math.exp(mean)
