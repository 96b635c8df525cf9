"""When a row is cut: a function of how many tokens it has seen, and of nothing else.

A row that decodes is cut when it has filled ``budget + buffer`` slots, and then after every
``buffer`` tokens. A prompt is read in pieces that end at the same tokens. So the pairs that a
request holds do not depend on how a scheduler cuts its prompt into chunks, on what it read in the
prompt and what it generated, or on whether it was thrown out and read again.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_kernels.checks import check_positive


@dataclass(frozen=True)
class Grid:
    """The schedule of a row. It is that of a cache whose ``prefill_chunk`` is its buffer.

    Args:
        budget: Pairs of each head that survive an eviction.
        buffer: New tokens that a full head takes before the next eviction.

    Raises:
        ValueError: a number is below 1, or the budget is no multiple of the buffer: reading in
            chunks and decoding would then evict at different tokens.
    """

    budget: int
    buffer: int

    def __post_init__(self) -> None:
        check_positive("budget", self.budget)
        check_positive("buffer", self.buffer)
        if self.budget % self.buffer:
            below = self.budget - self.budget % self.buffer
            near = " or ".join(str(x) for x in (below, below + self.buffer) if x)
            raise ValueError(
                f"budget must be a multiple of buffer={self.buffer}, got {self.budget}: a prompt "
                f"is read in pieces that end where decoding evicts; take {near}"
            )

    @property
    def capacity(self) -> int:
        """Slots of a head."""
        return self.budget + self.buffer

    def is_cut(self, t: int) -> bool:
        """Whether a row is cut when it has seen ``t`` tokens."""
        return t >= self.capacity and t % self.buffer == 0

    def held(self, t: int) -> int:
        """Pairs of each head of a row that has seen ``t`` tokens, after a cut that is due."""
        return t if t < self.capacity else self.budget + t % self.buffer

    def evicted(self, t: int) -> int:
        """Evictions of a row that has seen ``t`` tokens."""
        return max(t - self.budget, 0) // self.buffer

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Tokens ``[start, stop)`` in pieces, each of which ends at a cut or at ``stop``."""
        pieces = []
        while start < stop:
            cut = max(self.capacity, start - start % self.buffer + self.buffer)
            pieces.append((start, min(cut, stop)))
            start = pieces[-1][1]
        return pieces
