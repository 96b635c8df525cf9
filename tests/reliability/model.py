"""The contract of a bounded cache in plain Python: what each head keeps, and what attention gives.

A head is a dictionary from position to pair. Nothing here knows how a cache stores or moves pairs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # key and value, [head_dim] fp64
Name = tuple[int, int]  # layer and KV head


@dataclass
class Token:
    """A row's token: its position, and its pair in every head."""

    position: int
    pairs: dict[Name, Pair]


Columns = list[Token | None]  # of one row; None is padding


@dataclass
class Row:
    """One sequence: tokens seen, the pairs that each head keeps, the columns that wait."""

    heads: dict[Name, dict[int, Pair]]
    t: int = 0
    waiting: Columns = field(default_factory=list)


class Model:
    """A cache of ``layers`` times ``kv_heads`` heads.

    Args:
        policy: ``"key_norm"`` or ``"streaming_llm"``.
        is_shared: Whether all heads of a row share their budgets.
        rows: Rows.
        layers, kv_heads, budget, buffer, sinks, recent: As the cache's.
    """

    def __init__(
        self, policy: str, *, is_shared: bool, rows: int, layers: int, kv_heads: int, budget: int,
        buffer: int, sinks: int, recent: int,
    ) -> None:  # fmt: skip
        self.policy, self.is_shared = policy, is_shared
        self.budget, self.buffer, self.sinks, self.recent = budget, buffer, sinks, recent
        self.names = [(layer, head) for layer in range(layers) for head in range(kv_heads)]
        self.rows = [self._fresh() for _ in range(rows)]
        self.is_holding = False
        self.is_masked = False  # a call since the last insertion came with a mask
        self.undoable = 0  # tokens that every row took since the last eviction

    def _fresh(self) -> Row:
        return Row({name: {} for name in self.names})

    def call(self, query: Tensor, key: Tensor, value: Tensor, valid: list[list[bool]]) -> Tensor:
        """One call and its eviction.

        Args:
            query: ``[layers, batch, heads, new, head_dim]`` fp64.
            key, value: ``[layers, batch, kv_heads, new, head_dim]`` fp64.
            valid: ``[batch][new]``.

        Returns:
            As ``query``, 0 for padding.
        """
        output, added = torch.zeros_like(query), []
        for b, row in enumerate(self.rows):
            columns: Columns = []
            for column, is_real in enumerate(valid[b]):
                if not is_real:
                    columns.append(None)
                    continue
                at = (b, slice(None), column)
                pairs = {(x, h): (key[x][at][h], value[x][at][h]) for x, h in self.names}
                columns.append(Token(row.t, pairs))
                row.t += 1
            self._attend(output[:, b], query[:, b], row, columns)
            if self.is_holding:
                row.waiting += columns
            added.append(columns)
        if not self.is_holding:
            self._insert(added)
        return output

    def _attend(self, output: Tensor, query: Tensor, row: Row, columns: Columns) -> None:
        group = query.shape[1] // (1 + max(head for _, head in self.names))
        before = [token for token in row.waiting if token is not None]
        for column, token in enumerate(columns):
            if token is None:
                continue
            before = [*before, token]
            for layer, head in self.names:
                pairs = [*row.heads[layer, head].values()]
                pairs += [earlier.pairs[layer, head] for earlier in before]
                keys, values = (torch.stack(x) for x in zip(*pairs, strict=True))
                own = slice(head * group, (head + 1) * group)
                logits = query[layer, own, column] @ keys.T * keys.shape[1] ** -0.5
                output[layer, own, column] = logits.softmax(-1) @ values

    def _insert(self, added: list[Columns]) -> None:
        """Store the columns of each row, then cut what is full."""
        is_padded = self.is_masked or any(token is None for row in added for token in row)
        self.is_masked = False
        self.undoable = 0 if is_padded else self.undoable + len(added[0])
        scopes = [self.names] if self.is_shared else [[name] for name in self.names]
        for row, columns in zip(self.rows, added, strict=True):
            for token in columns:
                for name in self.names if token is not None else ():
                    row.heads[name][token.position] = token.pairs[name]
            for scope in scopes:
                self._cut(row, scope)

    def _cut(self, row: Row, scope: list[Name]) -> None:
        held = [(name, position) for name in scope for position in row.heads[name]]
        if len(held) < len(scope) * (self.budget + self.buffer):
            return
        self.undoable = 0
        best = sorted(held, key=lambda pair: self._score(row, *pair), reverse=True)
        for name, position in best[len(scope) * self.budget :]:
            del row.heads[name][position]

    def _score(self, row: Row, name: Name, position: int) -> float:
        if position < self.sinks or position >= row.t - self.recent:
            return float("inf")
        if self.policy == "streaming_llm":
            return float(position)
        return -float(row.heads[name][position][0].norm())

    def settle(self, drop: int, *, one_by_one: bool = False) -> None:
        width = len(self.rows[0].waiting)
        if not 0 <= drop <= width:
            raise ValueError("fewer tokens wait")
        kept = []
        for row in self.rows:
            row.t -= sum(token is not None for token in row.waiting[width - drop :])
            kept.append(row.waiting[: width - drop])
            row.waiting = []
        if drop == width:  # nothing of the calls is left
            self.is_masked = False
        if not one_by_one:
            if kept[0]:
                self._settle_call(kept)
            return
        for column in range(width - drop):
            self._settle_call([columns[column : column + 1] for columns in kept])

    def _settle_call(self, kept: list[Columns]) -> None:
        """Insert, with the clock as it was when the last of these tokens had come."""
        clocks = [row.t for row in self.rows]
        for row, columns in zip(self.rows, kept, strict=True):
            row.t = max((x.position + 1 for x in columns if x is not None), default=row.t)
        self._insert(kept)
        for row, t in zip(self.rows, clocks, strict=True):
            row.t = t

    def crop(self, count: int) -> None:
        if self.is_holding:
            return self.settle(count)
        if count == 0:
            return None
        if not 0 < count <= self.undoable:
            raise ValueError("something was evicted since")
        self.undoable -= count
        for row in self.rows:
            row.t -= count
            for held in row.heads.values():
                for position in [p for p in held if p >= row.t]:
                    del held[position]
        return None

    def reset(self, rows: list[int] | None = None) -> None:
        self.undoable = 0
        if rows is None:
            self.is_holding = self.is_masked = False
        for b in range(len(self.rows)) if rows is None else rows:
            width = len(self.rows[b].waiting)
            self.rows[b] = self._fresh()
            self.rows[b].waiting = [] if rows is None else [None] * width

    def select(self, index: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[b]) for b in index]

    def positions(self) -> list[list[list[list[int]]]]:
        """By layer, row and head, sorted."""
        return [
            [[sorted(row.heads[x, h]) for x, h in self.names if x == layer] for row in self.rows]
            for layer in range(1 + self.names[-1][0])
        ]
