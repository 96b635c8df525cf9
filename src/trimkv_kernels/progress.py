"""A progress bar for loops that take more than two seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_DELAY = 2.0  # seconds before a bar appears


def count_off(
    items: Iterable[Item], what: str, *, total: int, shown: bool = True, scale: int = 1
) -> Iterable[Item]:
    """The items, counted on a bar that appears on a terminal after two seconds.

    Args:
        items: To go through.
        what: Text before the bar.
        total: How many there are.
        shown: False shows no bar.
        scale: How much an item counts, such as the tokens of a chunk.
    """
    return tqdm(
        items,
        desc=what,
        total=total,
        unit="it" if scale == 1 else "tokens",
        unit_scale=False if scale == 1 else scale,
        delay=_DELAY,
        leave=False,
        disable=None if shown else True,  # None: off if standard error is not a terminal
    )
