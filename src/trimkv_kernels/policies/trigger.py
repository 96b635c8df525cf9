"""When a head is cut back to its budget."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WhenFull:
    """A head is cut when it has filled ``budget + buffer`` slots, as trimkv 0.1.5 does.

    Args:
        buffer: New tokens that a head takes after an eviction before the next one.
    """

    buffer: int

    def num_slots(self, budget: int) -> int:
        """Slots that a head needs, so that it is never full when a call starts."""
        return budget + self.buffer

    def is_due(self, length: int, budget: int) -> bool:
        """Whether a head with ``length`` filled slots is cut."""
        return length >= self.num_slots(budget)
