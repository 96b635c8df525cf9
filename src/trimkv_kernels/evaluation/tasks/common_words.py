"""A long list of words: which appear most often?"""

from __future__ import annotations

import random
import re

from trimkv_kernels.evaluation.tasks.base import AnswerTask, Case, Material, register_task

_COMMON, _OFTEN, _SELDOM = 5, 12, 2
_BEFORE = "Below is a numbered list of words. Some words appear much more often than others."
_AFTER = f"Which {_COMMON} words appear most often in the list?"
_STARTS = ("ba", "co", "di", "fe", "ga", "lo", "mu", "ni", "po", "ra", "si", "tu", "ve", "wo")
_ENDS = (
    "ber",
    "cket",
    "dle",
    "ffin",
    "gon",
    "lant",
    "mper",
    "nnet",
    "ppel",
    "rrow",
    "ssel",
    "ttle",
)


@register_task("common_words")
class CommonWords(AnswerTask):
    """RULER's common words: the share of them that are in the answer."""

    def cases(self, material: Material) -> list[Case]:
        return [self._case(material, index) for index in range(material.samples)]

    def _case(self, material: Material, index: int) -> Case:
        words = [start + end for start in _STARTS for end in _ENDS]
        material.rng(self.name, index).shuffle(words)
        common, others = words[:_COMMON], words[_COMMON:]

        def prompt(count: int) -> list[int]:
            listed = common * _OFTEN + others[:count] * _SELDOM
            random.Random(index).shuffle(listed)
            lines = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
            return material.question(f"{_BEFORE}\n\n{lines}\n\n{_AFTER}")

        fitting = [n for n in range(len(others) + 1) if len(prompt(n)) <= material.length]
        if not fitting:
            raise ValueError(
                f"length must be at least {len(prompt(0))} for task {self.name!r}, got "
                f"{material.length}"
            )
        return Case(prompt(fitting[-1]), common, new=40)

    def grade(self, case: Case, answer: str) -> float:
        said = set(re.findall(r"[a-z]+", answer.lower()))
        return sum(word in said for word in case.truth) / len(case.truth)
