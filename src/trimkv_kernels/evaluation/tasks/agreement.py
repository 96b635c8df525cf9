"""How long a continuation stays the same as with the full cache."""

from __future__ import annotations

from collections.abc import Sequence

from trimkv_kernels.evaluation.reader import Reader
from trimkv_kernels.evaluation.tasks.base import Case, Material, Task, register_task

_NEW = 64


@register_task("agreement")
class Agreement(Task):
    """The share of a greedy continuation that comes before it first differs from the full cache's.

    The prompts are excerpts of the text.
    """

    def cases(self, material: Material) -> list[Case]:
        return [Case(tokens, None, new=_NEW) for tokens in material.excerpts()]

    def measure(self, cases: Sequence[Case], reader: Reader) -> list[float]:
        reader.answers(cases)
        return reader.agreements()
