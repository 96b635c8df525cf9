"""Divergence from the full cache's predictions on a text."""

from __future__ import annotations

from collections.abc import Sequence

from trimkv_kernels.evaluation.reader import Reader
from trimkv_kernels.evaluation.tasks.base import Material, Task, register_task


@register_task("kl")
class KL(Task):
    """Mean of KL(full || bounded) over the predictions after the first eviction.

    The interval takes blocks of 64 predictions as independent.
    """

    unit = "nats"
    higher_is_better = False

    def cases(self, material: Material) -> list[list[int]]:
        return material.excerpts()

    def measure(self, cases: Sequence[list[int]], reader: Reader) -> list[float]:
        return [block for tokens in cases for block in reader.divergences(tokens)]
