"""School mathematics with a number as the answer (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

import re

from trimkv_kernels.evaluation.tasks.base import (
    AnswerTask,
    Case,
    Material,
    field_of,
    from_hub,
    register_task,
)

_ASK = "Solve this step by step, and end with the answer as a number.\n\n"
_NEW = 256


@register_task("gsm8k")
class GSM8K(AnswerTask):
    """1 if the last number of the answer is right.

    The data are lines with ``question`` and ``answer``, with the result after ``####``: a local
    file or openai/gsm8k on the hub. ``length`` is not used.
    """

    def cases(self, material: Material) -> list[Case]:
        rows = material.rows(self.name, lambda: from_hub("openai/gsm8k", "test", "main"))
        made = []
        for row in rows:
            question = str(field_of(row, "question", self.name))
            truth = str(field_of(row, "answer", self.name)).rsplit("####", 1)[-1]
            made.append(Case(material.question(_ASK + question), number(truth), new=_NEW))
        return made

    def grade(self, case: Case, answer: str) -> float:
        return float(number(answer) == case.truth)


def number(text: str) -> float | None:
    """The last number in a text, or None."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return float(found[-1].replace(",", "").rstrip(".")) if found else None
