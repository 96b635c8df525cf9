"""A chain of assignments in a long text: which variables have a value?"""

from __future__ import annotations

import random
import re
import string
from itertools import pairwise

from trimkv_kernels.evaluation.tasks._haystack import hide
from trimkv_kernels.evaluation.tasks.base import AnswerTask, Case, Material, register_task

_VARIABLES = 5
_BEFORE = "Variables are assigned in the following text. Keep track of their values."


@register_task("variable_tracking")
class VariableTracking(AnswerTask):
    """RULER's chain: the share of its variables that are in the answer."""

    def cases(self, material: Material) -> list[Case]:
        made = []
        for index in range(material.samples):
            rng = material.rng(self.name, index)
            names, value = _names(rng), str(rng.randrange(10_000, 100_000))
            chain = [f"VAR {names[0]} = {value}."]
            chain += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
            after = f"Which {_VARIABLES} variables have the value {value}? Name all of them."
            prompt = hide(material, rng, chain, before=_BEFORE, after=after, ordered=True)
            made.append(Case(prompt, names, new=48))
        return made

    def grade(self, case: Case, answer: str) -> float:
        words = set(re.findall(r"[A-Z]+", answer))
        return sum(name in words for name in case.truth) / len(case.truth)


def _names(rng: random.Random) -> list[str]:
    found: set[str] = set()
    while len(found) < _VARIABLES:
        found.add("".join(rng.choices(string.ascii_uppercase, k=5)))
    return sorted(found, key=lambda _: rng.random())
