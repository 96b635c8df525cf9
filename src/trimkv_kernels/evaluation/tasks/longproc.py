"""Long procedures written out step by step: LongProc (Ye et al., arXiv 2501.05414).

The data are its published files, such as ``path_traversal_0.5k.json``, from
github.com/princeton-pli/LongProc. The prompts here are our own and shorter, so figures are not
those of the paper. ``length`` is not used.
"""

from __future__ import annotations

import json
import re
from typing import Any

from trimkv_kernels.evaluation.tasks.base import (
    AnswerTask,
    Case,
    Material,
    field_of,
    register_task,
)

_NEW = 768


class _LongProc(AnswerTask):
    def cases(self, material: Material) -> list[Case]:
        def nowhere() -> list[dict[str, Any]]:
            raise ValueError(
                f"task {self.name!r} reads a published file: fetch it from "
                f"github.com/princeton-pli/LongProc and pass data {self.name}=FILE"
            )

        return [self._case(material, row) for row in material.rows(self.name, nowhere)]

    def _case(self, material: Material, row: dict[str, Any]) -> Case:
        raise NotImplementedError


@register_task("path_traversal")
class PathTraversal(_LongProc):
    """The share of a route's steps that are right, in order, before the first wrong one."""

    def _case(self, material: Material, row: dict[str, Any]) -> Case:
        start, end = field_of(row, "question_repr", self.name)
        ask = (
            f"{field_of(row, 'context_nl', self.name)}\n\nGive the route from {start} to {end}, "
            "one step a line, each as: From A, take a train to B."
        )
        steps = [s for s in field_of(row, "answer_nl", self.name).splitlines() if s.strip()]
        return Case(material.question(ask), [_step(step) for step in steps], new=_NEW)

    def grade(self, case: Case, answer: str) -> float:
        said = [step for step in map(_step, answer.splitlines()) if step is not None]
        right = 0
        for step, expected in zip(said, case.truth, strict=False):
            if step != expected:
                break
            right += 1
        return right / len(case.truth)


@register_task("countdown")
class Countdown(_LongProc):
    """1 if the last lines are a calculation that uses each number once and gives the target."""

    def _case(self, material: Material, row: dict[str, Any]) -> Case:
        numbers, target = field_of(row, "nums", self.name), field_of(row, "target", self.name)
        ask = (
            f"Combine the numbers {', '.join(map(str, numbers))} by +, -, * and / to get {target}. "
            "Use each number once. Try the possibilities step by step, then write Solution: and "
            "the steps, one a line, such as 3 + 4 = 7."
        )
        return Case(material.question(ask), (numbers, target), new=_NEW)

    def grade(self, case: Case, answer: str) -> float:
        numbers, target = case.truth
        lines = re.findall(r"(\d+)\s*([-+*/])\s*(\d+)\s*=\s*(\d+)", answer)
        return float(solves(lines[-(len(numbers) - 1) :], numbers, target))


@register_task("tom_tracking")
class TheoryOfMind(_LongProc):
    """1 if the last line of the answer that states the belief has the right place."""

    def _case(self, material: Material, row: dict[str, Any]) -> Case:
        ask = (
            f"{field_of(row, 'story_components', self.name)}\n\n"
            f"{field_of(row, 'story', self.name)}\n\n{field_of(row, 'question', self.name)} Go "
            "through the steps one by one, and end with a line that says: Answer: the place."
        )
        return Case(material.question(ask), self._place(row).lower(), new=_NEW)

    def _place(self, row: dict[str, Any]) -> str:
        """The right place. The published answer is a JSON object without its first brace."""
        answer = field_of(row, "answer", self.name)
        try:
            (line,) = answer
            (place,) = json.loads("{" + line.strip().removesuffix("}") + "}").values()
        except (TypeError, ValueError, AttributeError):
            raise ValueError(
                f"the data of task {self.name!r} must have an 'answer' such as "
                f"""['"belief": "place"}}'], got {answer!r}"""
            ) from None
        return str(place)

    def grade(self, case: Case, answer: str) -> float:
        _, found, said = answer.lower().rpartition("answer:")
        return float(bool(found) and case.truth.removeprefix("the ") in said)


def solves(steps: list[tuple[str, str, str, str]], numbers: list[int], target: int) -> bool:
    """Whether steps ``(left, sign, right, result)`` use each number once and end at the target."""
    there = list(numbers)
    for left, sign, right, result in steps:
        for number in (int(left), int(right)):
            if number not in there:
                return False
            there.remove(number)
        a, b, made = int(left), int(right), int(result)
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]
        if value != made:
            return False
        there.append(made)
    return there == [target]


def _step(line: str) -> tuple[str, str, str] | None:
    """``(from, by, to)`` of a line of a route."""
    found = re.search(r"From (.+?), take an? (\w+) to (.+?)\.?\s*$", line)
    return None if found is None else (found[1], found[2], found[3])
