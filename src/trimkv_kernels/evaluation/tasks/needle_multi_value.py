"""Several numbers for one word in a long text, all of which are asked for."""

from __future__ import annotations

from trimkv_kernels.evaluation.tasks._haystack import hide, pick_keys, pick_number
from trimkv_kernels.evaluation.tasks.base import AnswerTask, Case, Material, register_task

_VALUES = 4
_BEFORE = "Some special numbers are hidden in the following text. Remember all of them."


@register_task("needle_multi_value")
class NeedleMultiValue(AnswerTask):
    """RULER's needles with one key: the share of the numbers that are in the answer."""

    def cases(self, material: Material) -> list[Case]:
        made = []
        for index in range(material.samples):
            rng = material.rng(self.name, index)
            (key,) = pick_keys(rng, 1)
            numbers = [pick_number(rng) for _ in range(_VALUES)]
            needles = [f"One of the special numbers for {key} is {number}." for number in numbers]
            after = f"What are all the special numbers for {key} that the text mentions?"
            prompt = hide(material, rng, needles, before=_BEFORE, after=after)
            made.append(Case(prompt, numbers, new=80))
        return made

    def grade(self, case: Case, answer: str) -> float:
        plain = answer.replace(",", "")
        return sum(number in plain for number in case.truth) / len(case.truth)
