"""A number from the first turn of a conversation, asked for at its end."""

from __future__ import annotations

import random

from trimkv_kernels.evaluation.tasks._haystack import pick_keys, pick_number
from trimkv_kernels.evaluation.tasks.base import AnswerTask, Case, Material, register_task

_THEMES = (
    ("What could I cook with rice and beans?", "Rice and beans go well with onions and garlic."),
    ("How do I keep a plant alive?", "Water it when the soil is dry and give it light."),
    ("Which season is best for hiking?", "Autumn is mild, and the paths are quiet."),
    ("How can I sleep better?", "Go to bed at the same hour and leave the phone outside."),
    ("What makes a good letter?", "Say what you mean, briefly, and read it once more."),
    ("Is tea better than coffee?", "Tea is milder; many people like coffee in the morning."),
    ("How do birds find their way?", "They use the sun, the stars and the field of the earth."),
    ("Why is the sea salty?", "Rivers carry salts from rocks to the sea, and they stay there."),
)


@register_task("conversation")
class Conversation(AnswerTask):
    """1 if the number that the user named in the first turn is in the last answer."""

    def cases(self, material: Material) -> list[Case]:
        return [self._case(material, index) for index in range(material.samples)]

    def _case(self, material: Material, index: int) -> Case:
        rng = material.rng(self.name, index)
        (key,), number = pick_keys(rng, 1), pick_number(rng)
        turns = [f"Please remember that the number of my {key} is {number}.", "I will remember it."]
        last = f"What is the number of my {key}?"
        while len(material.question(*turns, *(themes := _theme(rng)), last)) <= material.length:
            turns += themes
        return Case(material.question(*turns, last), number, new=32)

    def grade(self, case: Case, answer: str) -> float:
        return float(case.truth in answer.replace(",", ""))


def _theme(rng: random.Random) -> tuple[str, str]:
    return rng.choice(_THEMES)
