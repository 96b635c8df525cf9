"""One number in a long text, asked for at its end."""

from __future__ import annotations

from trimkv_kernels.evaluation.tasks._haystack import hide, pick_keys, pick_number
from trimkv_kernels.evaluation.tasks.base import AnswerTask, Case, Material, register_task

BEFORE = "A special number is hidden in the following text. Remember it: you will be asked for it."


def needle(key: str, number: str) -> str:
    """The sentence with the number."""
    return f"The special number for {key} is {number}."


def ask(key: str) -> str:
    """The question for a number."""
    return f"What is the special number for {key} that the text mentions?"


@register_task("needle_single")
class NeedleSingle(AnswerTask):
    """RULER's single needle: 1 if the number is in the answer."""

    def cases(self, material: Material) -> list[Case]:
        made = []
        for index in range(material.samples):
            rng = material.rng(self.name, index)
            (key,), number = pick_keys(rng, 1), pick_number(rng)
            prompt = hide(material, rng, [needle(key, number)], before=BEFORE, after=ask(key))
            made.append(Case(prompt, number, new=32))
        return made

    def grade(self, case: Case, answer: str) -> float:
        return float(case.truth in answer.replace(",", ""))
