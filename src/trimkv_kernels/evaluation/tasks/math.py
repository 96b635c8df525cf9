"""Competition mathematics with a boxed answer (Hendrycks et al., arXiv 2103.03874)."""

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

_ASK = "Solve this problem and put the final answer in \\boxed{}.\n\n"
_NEW = 512


@register_task("math")
class Math(AnswerTask):
    """1 if the last box holds the right answer. Spaces and styling do not count.

    The data are lines with ``problem`` and ``answer``: a local file, or HuggingFaceH4/MATH-500 on
    the hub. Prompts are as long as the problems are; ``length`` is not used.
    """

    def cases(self, material: Material) -> list[Case]:
        rows = material.rows(self.name, lambda: from_hub("HuggingFaceH4/MATH-500", "test"))
        return [
            Case(
                material.question(_ASK + str(field_of(row, "problem", self.name))),
                plain(str(field_of(row, "answer", self.name))),
                new=_NEW,
            )
            for row in rows
        ]

    def grade(self, case: Case, answer: str) -> float:
        found = boxed(answer)
        return float(found is not None and plain(found) == case.truth)


def boxed(text: str) -> str | None:
    r"""The contents of the last ``\boxed{}`` of a text, with the braces inside it."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return None


def plain(answer: str) -> str:
    """An answer without spaces and styling."""
    answer = re.sub(r"\\(left|right|!|,|;|\s)", "", answer).replace("\\dfrac", "\\frac")
    answer = re.sub(r"\\text\{(.*?)\}", r"\1", answer)
    return re.sub(r"[\s$]|\.$", "", answer)
