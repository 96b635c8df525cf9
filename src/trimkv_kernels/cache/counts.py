"""What the host knows about the slots without reading the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

from trimkv_kernels.cache.call import Rows
from trimkv_kernels.policies.trigger import WhenFull


class Extent(NamedTuple):
    """How many slots of a storage's heads are valid.

    Attributes:
        max_valid: No head has more valid slots than this.
        is_even: Every head is known to have exactly ``max_valid`` valid slots.
    """

    max_valid: int
    is_even: bool


class Counts:
    """Valid slots of each row, for every storage of a cache, and what follows from them.

    All heads of a row fill in step, so a row needs one number. If heads share a budget, this number
    is their mean. The host forgets the counts if only the device knows them: after a compiled or
    captured step, after rows were chosen on the device, and after an eviction that leaves a number
    of pairs that depends on the scores. It reads them before the next call of several tokens.

    Args:
        budgets: Pairs that a head keeps, by storage.
        trigger: When a head is cut to its budget.
        batch_size: Rows.
        exact: Of each storage, whether a cut leaves exactly its budget.

    Attributes:
        undoable: Tokens that every row took since the last eviction.
        is_empty: Nothing was inserted since all rows were freed at once. If only some rows are
            freed, ``seen`` stays, and the next call does not count as the first.
        awaits_evict: A step has filled slots since the last call of ``evict()``.
    """

    def __init__(
        self, budgets: Sequence[int], trigger: WhenFull, batch_size: int, exact: Sequence[bool]
    ) -> None:
        self._budgets, self._trigger = tuple(budgets), trigger
        self._batch_size, self._exact = batch_size, tuple(exact)
        self.reset()

    def reset(self, rows: Rows | None = None) -> None:
        """All rows, or some, hold nothing."""
        self.undoable, self.awaits_evict = 0, False
        if rows is None:
            zeros = [0] * self._batch_size
            self._num_valid: list[list[int]] | None = [zeros.copy() for _ in self._budgets]
            self._has_evicted = [False] * self._batch_size
            self.is_empty = True
            return
        if self._num_valid is None or rows.known is None:
            self.forget()
            return
        for row in rows.known:
            self._has_evicted[row] = False
            for counts in self._num_valid:
                counts[row] = 0

    @property
    def are_known(self) -> bool:
        return self._num_valid is not None

    @property
    def has_evicted(self) -> bool:
        """Whether the host knows of an eviction in a row since the row was freed."""
        return any(self._has_evicted)

    def forget(self) -> None:
        """Drop the counts. Reads and writes no tensor, because compiled steps call it."""
        self.undoable = 0
        self._num_valid = None

    def learn(self, num_valid: list[list[int]]) -> None:
        """Take the counts that the device has, ``[storage][row]``."""
        self._num_valid = num_valid

    def extent(self, storage: int, num_slots: int) -> Extent:
        """The :class:`Extent` of a storage with ``num_slots`` slots per head."""
        if self._num_valid is None:
            return Extent(num_slots, False)
        counts = self._num_valid[storage]
        return Extent(max(counts), len(set(counts)) == 1)

    def most_needed(self, storage: int, added: Sequence[int]) -> int | None:
        """The most slots that a row would fill with ``added`` more tokens; None if unknown."""
        if self._num_valid is None:
            return None
        return max(n + more for n, more in zip(self._num_valid[storage], added, strict=True))

    def is_due(self, storage: int, added: Sequence[int] | None = None) -> bool:
        """Whether a row may have to be cut, after ``added`` more tokens; True if unknown."""
        if self._num_valid is None:
            return True
        needed = self.most_needed(storage, [0] * self._batch_size if added is None else added)
        return needed is None or self._trigger.is_due(needed, self._budgets[storage])

    @property
    def may_be_full(self) -> bool:
        """Whether a head may have no slot for a step's token."""
        if self._num_valid is None:
            return self.awaits_evict
        return any(self.is_due(storage) for storage in range(len(self._budgets)))

    def room(self, *, never_evicts: bool) -> int:
        """How many more tokens every row takes before a head is cut.

        If no head is ever cut, this is the room up to the budget.

        Raises:
            RuntimeError: the host does not know.
        """
        if self._num_valid is None:
            raise RuntimeError("the counts must be known: learn_counts() first")
        most = (
            budget if never_evicts else self._trigger.num_slots(budget) for budget in self._budgets
        )
        return min(size - max(counts) for size, counts in zip(most, self._num_valid, strict=True))

    def add(self, added: Sequence[int] | None, columns: int, *, chosen: bool) -> None:
        """Count a call's tokens.

        Args:
            added: Real tokens of each row; None if the host does not know.
            columns: Tokens that can be taken back: 0 if some were padding.
            chosen: Whether the tokens that did not fit were dropped already.
        """
        self.awaits_evict = not chosen
        if added is None or self._num_valid is None:
            self.forget()
            return
        self.undoable = self.undoable + columns if columns else 0
        for counts in self._num_valid:
            counts[:] = [n + more for n, more in zip(counts, added, strict=True)]
        for storage in range(len(self._budgets)) if chosen else ():
            if self.are_known and self.is_due(storage):
                self.cut(storage)

    def after_step(self, added: Sequence[int]) -> Counts:
        """New counts, after ``added`` more tokens of each row. These do not change."""
        twin = copy.copy(self)
        twin._has_evicted = self._has_evicted.copy()
        if self._num_valid is not None:
            twin._num_valid = [
                [n + more for n, more in zip(counts, added, strict=True)]
                for counts in self._num_valid
            ]
        twin.undoable = 0
        return twin

    def cut(self, storage: int) -> None:
        """Note an eviction, in every row that was due."""
        self.undoable = 0
        if self._num_valid is None:
            return
        budget, counts = self._budgets[storage], self._num_valid[storage]
        for row, n in enumerate(counts):
            if self._trigger.is_due(n, budget):
                counts[row] = budget
                self._has_evicted[row] = True
                if not self._exact[storage]:
                    self._num_valid = None

    def take_back(self, columns: int) -> None:
        """Uncount the last tokens of every row."""
        self.undoable -= columns
        if self._num_valid is not None:
            for counts in self._num_valid:
                counts[:] = [n - columns for n in counts]

    def select(self, rows: Rows) -> Counts:
        """Counts whose row ``i`` is row ``rows[i]`` of these."""
        twin = Counts(self._budgets, self._trigger, len(rows), self._exact)
        twin.undoable, twin.is_empty = self.undoable, self.is_empty
        twin.awaits_evict = self.awaits_evict
        known = rows.known
        if known is None and self._is_uniform():
            known = [0] * len(rows)
        if known is None or self._num_valid is None:
            twin._num_valid = None
            twin._has_evicted = [self.has_evicted] * len(rows)
        else:
            twin._num_valid = [[counts[row] for row in known] for counts in self._num_valid]
            twin._has_evicted = [self._has_evicted[row] for row in known]
        return twin

    def put(self, row: int, source: Counts) -> None:
        """A row becomes what the only row of other counts is."""
        self.is_empty = self.is_empty and source.is_empty
        self.undoable = 0
        self._has_evicted[row] = source._has_evicted[0]
        if self._num_valid is None or source._num_valid is None:
            self.forget()
            return
        for counts, new in zip(self._num_valid, source._num_valid, strict=True):
            counts[row] = new[0]

    def _is_uniform(self) -> bool:
        """Whether all rows are known to have the same counts."""
        if self._num_valid is None:
            return False
        alike = all(len(set(counts)) == 1 for counts in self._num_valid)
        return alike and len(set(self._has_evicted)) == 1
