"""Several numbers in a long text, one of which is asked for."""

from __future__ import annotations

from trimkv_kernels.evaluation.tasks._haystack import hide, pick_keys, pick_number
from trimkv_kernels.evaluation.tasks.base import AnswerTask, Case, Material, register_task
from trimkv_kernels.evaluation.tasks.needle_single import BEFORE, ask, needle

_KEYS = 4


@register_task("needle_multi_key")
class NeedleMultiKey(AnswerTask):
    """RULER's needle among others: 1 if the number asked for is in the answer."""

    def cases(self, material: Material) -> list[Case]:
        made = []
        for index in range(material.samples):
            rng = material.rng(self.name, index)
            numbers = {key: pick_number(rng) for key in pick_keys(rng, _KEYS)}
            asked = rng.choice(list(numbers))
            needles = [needle(key, number) for key, number in numbers.items()]
            prompt = hide(material, rng, needles, before=BEFORE, after=ask(asked))
            made.append(Case(prompt, numbers[asked], new=32))
        return made

    def grade(self, case: Case, answer: str) -> float:
        return float(case.truth in answer.replace(",", ""))
