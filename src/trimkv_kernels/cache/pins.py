"""Spans of positions that are never evicted, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Rows
from trimkv_kernels.checks import Span, check_protected, check_spans


class Pins:
    """The protected spans of each row.

    Args:
        protect: Spans that every row has.
        batch_size: Rows.
        device: Where the table is.

    Attributes:
        table: ``[batch, max_spans, 2]`` int32 of ``(start, stop)``, filled up with empty spans;
            None if no row has any.
    """

    def __init__(self, protect: Sequence[Span], batch_size: int, device: torch.device) -> None:
        self._protect, self._device = list(protect), device
        self._spans: list[list[Span]] | None
        self.table: Tensor | None = None
        self._set([self._protect] * batch_size)

    @property
    def spans(self) -> list[list[Span]]:
        """The spans of each row, read from the device if the host does not know them."""
        if self._spans is None:
            self._spans = _read(self.table, self._batch_size)
        return self._spans

    def add(
        self, spans: Sequence[Sequence[Span]], budgets: Sequence[int], sinks: int, recent: int
    ) -> None:
        """Protect more positions of each row.

        Raises:
            ValueError: not one list for each row, a span is not a span, or a budget would not
                exceed the protected slots. The spans stay as they were.
        """
        if len(spans) != self._batch_size:
            raise ValueError(
                f"spans must have one list for each of {self._batch_size} rows, got {len(spans)}"
            )
        rows = [
            sorted({*row, *check_spans("spans", more)})
            for row, more in zip(self.spans, spans, strict=True)
        ]
        for row in rows:
            check_protected(budgets, sinks, recent, row)
        if rows != self._spans:
            self._set(rows)

    def reset(self, rows: Rows | None = None) -> None:
        """Back to the spans that every row has, for all rows or for some."""
        if self.table is None:
            return
        freed = range(self._batch_size) if rows is None else rows.known
        if freed is None and rows is not None:
            freed = rows.index.tolist()
        spans = list(self.spans)
        for row in freed or ():
            spans[row] = self._protect
        self._set(spans, 0 if rows is None else self._width)

    def select(self, rows: Rows) -> Pins:
        """Pins whose row ``i`` is row ``rows[i]`` of these."""
        twin = Pins(self._protect, len(rows), self._device)
        if self.table is not None:
            twin.table = self.table.index_select(0, rows.index)
            known = None if self._spans is None else rows.known
            twin._spans = None if known is None else [self.spans[row] for row in known]
        return twin

    def put(self, row: int, source: Pins) -> None:
        """A row becomes what the only row of other pins is."""
        if self.table is None and source.table is None:
            return
        spans = list(self.spans)
        spans[row] = source.spans[0]
        self._set(spans, self._width)

    def load(self, table: Tensor | None) -> None:
        """Take a table that was saved."""
        self.table, self._spans = table, None

    def covers(self, position: Tensor) -> Tensor | None:
        """Where ``position`` ``[batch, ...]`` lies in a protected span; None without spans."""
        if self.table is None:
            return None
        start, stop = (
            x.reshape(x.shape[0], *(1,) * (position.dim() - 1), x.shape[1])
            for x in self.table.to(position.device).unbind(dim=2)
        )
        return ((position[..., None] >= start) & (position[..., None] < stop)).any(dim=-1)

    @property
    def _width(self) -> int:
        """Spans of a row that the table has room for."""
        return 0 if self.table is None else self.table.shape[1]

    def _set(self, spans: Sequence[list[Span]], least: int = 0) -> None:
        """Take the spans of each row. The table gets room for at least ``least`` of a row."""
        self._batch_size = len(spans)
        self._spans = list(spans)
        most = max(least, *map(len, spans))
        filled_up = [row + [(0, 0)] * (most - len(row)) for row in spans]
        table = None
        if most > 0:
            table = torch.tensor(filled_up, dtype=torch.int32, device=self._device)
        if table is None or self.table is None or table.shape != self.table.shape:
            self.table = table
        else:
            self.table.copy_(table)  # a captured step reads it


def _read(table: Tensor | None, batch_size: int) -> list[list[Span]]:
    if table is None:
        return [[] for _ in range(batch_size)]
    return [[(start, stop) for start, stop in row if start < stop] for row in table.tolist()]
