"""Texts with hidden sentences, in the manner of RULER (arXiv 2404.06654)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from trimkv_kernels.evaluation.tasks.base import Material

# The text if no file is given.
_FILLER = (
    "The road along the river was quiet in the morning.",
    "A baker opened the shutters and set out the bread.",
    "Two boats waited at the pier for the tide.",
    "The hills were green after a week of rain.",
    "Someone had left a bicycle beside the gate.",
    "The clock of the town hall was a little late.",
    "Children played near the fountain until noon.",
    "A letter lay unopened on the kitchen table.",
    "The train stopped at every village in the valley.",
    "In the evening the windows of the library were lit.",
)
_KEYS = (
    "anchor", "basil", "candle", "dolphin", "engine", "feather", "glacier", "hammer", "island",
    "jasmine", "kettle", "ladder", "marble", "needle", "orchid", "pepper", "quiver", "ribbon",
    "saddle", "temple", "umbrella", "violet", "walnut", "yarn",
)  # fmt: skip


def pick_keys(rng: random.Random, count: int) -> list[str]:
    """Different words, to be asked for later."""
    return rng.sample(_KEYS, count)


def pick_number(rng: random.Random) -> str:
    """A number that nobody could guess."""
    return str(rng.randrange(10**6, 10**7))


def hide(
    material: Material,
    rng: random.Random,
    needles: Sequence[str],
    *,
    before: str,
    after: str,
    ordered: bool = False,
) -> list[int]:
    """A prompt of at most ``material.length`` tokens: needles between the sentences of a text.

    Args:
        material: Its text is the haystack.
        rng: For the places of the needles.
        needles: Sentences to hide.
        before, after: Text before and after the haystack.
        ordered: Whether the needles keep their order.

    Raises:
        ValueError: the length leaves no room for the needles.
    """
    sentences = _sentences(material, rng)
    places = [rng.random() for _ in needles]
    if ordered:
        places.sort()

    def prompt(count: int) -> list[int]:
        text = list(sentences[:count])
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            text.insert(round(place * count), needle)
        return material.question(f"{before}\n\n{' '.join(text)}\n\n{after}")

    if len(prompt(0)) > material.length:
        raise ValueError(
            f"length must leave room for the question, which alone has {len(prompt(0))} tokens, "
            f"got {material.length}"
        )
    low, high = 0, len(sentences)
    while low < high:  # the most sentences that fit
        middle = (low + high + 1) // 2
        if len(prompt(middle)) <= material.length:
            low = middle
        else:
            high = middle - 1
    return prompt(low)


def _sentences(material: Material, rng: random.Random) -> list[str]:
    """More sentences than fit, from a random place in the text on."""
    room = 8 * material.length  # letters
    if material.text is None:
        return [rng.choice(_FILLER) for _ in range(room // 40 + 1)]
    text = material.text
    if len(text) < room:
        text = text * (room // max(len(text), 1) + 1)
    start = rng.randrange(len(text) - room + 1)
    found = re.split(r"(?<=[.!?])\s+", text[start : start + room])
    return found[1:] or found
