"""Packed batches for the tests of the ops that train gates."""

import torch
from torch import Tensor

Rows = list[list[tuple[int, int]]]  # per row, (id, length) of its documents; a pad's id is negative


def pack(rows: Rows) -> tuple[Tensor, list[tuple[int, slice]]]:
    """Document ids ``[batch, seq]`` int32, and each document's row and place."""
    ids, places = [], []
    for row, documents in enumerate(rows):
        begin = 0
        for name, length in documents:
            if name >= 0:
                places.append((row, slice(begin, begin + length)))
            begin += length
        ids.append([name for name, length in documents for _ in range(length)])
    return torch.tensor(ids, dtype=torch.int32), places


def layout(kind: str, seq: int) -> Rows:
    """Two rows of ``seq`` tokens."""
    if kind == "whole":
        return [[(0, seq)], [(0, seq)]]
    if kind == "padded":  # on the left, and on both sides
        pad = seq // 3
        return [[(-1, pad), (0, seq - pad)], [(-1, pad), (7, seq - 2 * pad), (-1, pad)]]
    if kind == "packed":  # ids go up, down, and meet 128; a pad lies between two documents
        a, b = seq // 4, seq // 2
        return [[(127, a), (128, b), (129, seq - a - b)], [(5, b), (-3, 1), (2, seq - b - 1)]]
    assert kind == "short"  # more documents than 128, of one to three tokens
    lengths = [1 + i % 3 for i in range(seq)]
    return [_fill(list(enumerate(lengths)), seq), _fill(list(enumerate(lengths[1:])), seq)]


def _fill(documents: list[tuple[int, int]], seq: int) -> list[tuple[int, int]]:
    filled: list[tuple[int, int]] = []
    for name, length in documents:
        left = seq - sum(taken for _, taken in filled)
        if left > 0:
            filled.append((name, min(length, left)))
    return filled


def whole_rows(batch: int, seq: int) -> list[tuple[int, slice]]:
    """The places of rows that hold one document each."""
    return [(row, slice(0, seq)) for row in range(batch)]
