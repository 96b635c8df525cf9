"""Spans of positions to pin, known before a call: from the caller, and from the call's text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from trimkv_kernels.cache import BoundedKVCache
from trimkv_kernels.checks import Span, check_spans

Spans = list[list[Span]]


class SpanFinder(Protocol):
    """Finds what to pin in a prompt."""

    def find(self, input_ids: Tensor, valid: Tensor | None, seen: Sequence[int]) -> Spans:
        """The spans of positions to pin in each row of a call.

        Args:
            input_ids: ``[batch, q_len]``.
            valid: ``[batch, q_len]`` bool, False for left padding; None when all are real.
            seen: Real tokens of each row before the call.
        """
        ...


class PromptPins:
    """What the next call has to pin.

    Args:
        finders: Search every call of more than one token.
    """

    def __init__(self, finders: Sequence[SpanFinder] = ()) -> None:
        self.finders = tuple(finders)
        self._named: Spans | None = None  # by the caller, before there are slots
        self._found: Spans | None = None  # in the call under way

    def add(self, spans: Sequence[Sequence[Span]]) -> None:
        """Add spans of the caller, for each row.

        Raises:
            ValueError: a span is not a span, or the number of rows changed.
        """
        rows = [list(check_spans("spans", row)) for row in spans]
        if self._named is not None:
            self._check_rows(len(rows))
        self._named = rows if self._named is None else _joined(self._named, rows)

    def find(
        self,
        input_ids: Tensor | None,
        valid: Tensor | None,
        batch: int,
        slots: BoundedKVCache | None,
    ) -> None:
        """Search a call's text.

        Raises:
            ValueError: there is something to search for and no ``input_ids``, or the caller's
                spans have another number of rows.
        """
        self._found = None
        self._check_rows(batch)
        if not self.finders:
            return
        if input_ids is None:
            raise ValueError(
                "protect= of messages, images or text needs input_ids, got inputs_embeds"
            )
        seen = [0] * batch if slots is None else slots.t.tolist()
        self._found = _joined(*(x.find(input_ids, valid, seen) for x in self.finders))

    def apply(self, slots: BoundedKVCache) -> None:
        """Pin what was found and what the caller named.

        Raises:
            ValueError: a budget would not exceed the protected slots; nothing is pinned.
        """
        tables = [spans for spans in (self._named, self._found) if spans is not None]
        if tables:
            slots.pin(_joined(*tables))
            self.clear()

    def clear(self) -> None:
        """Forget what was found and what the caller named."""
        self._named = self._found = None

    def _check_rows(self, batch: int) -> None:
        if self._named is not None and len(self._named) != batch:
            raise ValueError(
                f"spans must have one list for each of {batch} rows, got {len(self._named)}"
            )


def _joined(*tables: Spans) -> Spans:
    """Several tables of spans, joined row by row."""
    return [[*itertools.chain(*rows)] for rows in zip(*tables, strict=True)]
