"""Rows to train gates on: from a jsonl file, or any dataset of dictionaries.

A row has ``input_ids``, and optionally ``labels`` (the token at each position, -100 where it does
not count) and ``position_ids`` (of packed documents), each one-dimensional. A line of a file is
such a row, or ``{"text": ...}``, which is tokenised and packed with its neighbours.

A row for a vision-language model also has what its processor returned beside the tokens, such as
``pixel_values``, see :func:`image_row`. It is one document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.training.packing import IGNORED, Packing

Row = dict[str, Tensor]
_PADDING = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "mm_token_type_ids": 0}
# Outputs of a processor with one entry for each image, video or patch.
_IMAGES = (
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "second_per_grid_ts",
)


def read_jsonl(
    path: str | Path, *, tokenize: Callable[[str], Sequence[int]] | None = None, context: int
) -> list[Row]:
    """Read training rows.

    Args:
        path: The file, one JSON object a line.
        tokenize: From a text to its token ids, an end-of-text token included; needed for texts.
        context: Tokens a row may have. Texts are packed into rows of at most this length, each with
            positions from 0. A longer text is cut into documents of this length.

    Returns:
        Rows of int64 tensors.

    Raises:
        ValueError: there is no such file, a line is not a row, or no line holds a token; the
            message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data must be a jsonl file, and there is no file {path}")
    rows: list[Row] = []
    texts: list[Sequence[int]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found = _parse(line.decode("utf-8"), tokenize, context)
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if isinstance(found, dict):
                rows.append(found)
            elif found:
                texts.append(found)
    rows += pack(texts, context)
    if not rows:
        raise ValueError(f"data must have rows to train on, and {path} has none")
    return rows


def pack(documents: Iterable[Sequence[int]], context: int) -> list[Row]:
    """Put documents one after the other into rows, in order.

    Args:
        documents: Token ids of each.
        context: Tokens a row may have; a longer document is cut into several.

    Returns:
        Rows with ``input_ids`` and ``position_ids``. A document that does not fit starts a new row.
    """
    rows: list[Row] = []
    tokens: list[int] = []
    positions: list[int] = []
    for piece in _cut(documents, context):
        if tokens and len(tokens) + len(piece) > context:
            rows.append(_packed(tokens, positions))
            tokens, positions = [], []
        tokens.extend(piece)
        positions.extend(range(len(piece)))
    if tokens:
        rows.append(_packed(tokens, positions))
    return rows


def image_row(encoded: Mapping[str, Any], labels: Sequence[int] | Tensor | None = None) -> Row:
    """A row from what a vision-language model's processor gave for one text.

    Args:
        encoded: With ``return_tensors="pt"``: ``input_ids`` ``[1, length]`` and what the processor
            returned beside them.
        labels: ``length`` integers, the token at each position, -100 where it does not count; None
            counts all tokens except image tokens.

    Raises:
        ValueError: there are several texts, the text is padded, or something is not known here.
    """
    row = {name: torch.as_tensor(values) for name, values in encoded.items()}
    mask = row.pop("attention_mask", None)
    if row["input_ids"].dim() != 2 or len(row["input_ids"]) != 1:
        raise ValueError(
            f"encoded must be one text, input_ids [1, length], got {list(row['input_ids'].shape)}"
        )
    if mask is not None and not mask.all():
        raise ValueError("encoded must not be padded: rows are padded when they are put together")
    for name in set(row) & set(_PADDING):
        row[name] = row[name][0]
    return check_row(row if labels is None else {**row, "labels": torch.as_tensor(labels)})


def collate(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Put rows into one batch, padded on the right.

    Args:
        rows: Rows as described in this module, of tensors or lists.

    Returns:
        The same keys, ``[batch, seq]`` int64, and ``attention_mask`` if rows differ in length.
        A row without ``labels`` among rows with them counts everywhere. Tensors of images are
        joined row after row.

    Raises:
        ValueError: a row lacks ``input_ids``, has another key, or lengths differ within it; or rows
            with images are put together with packed documents.
    """
    found = [check_row(row) for row in rows]
    names = {name for row in found for name in row}
    lengths = [len(row["input_ids"]) for row in found]
    seq = max(lengths)
    batch = {
        name: torch.stack([_fit(_get(row, name), seq, _PADDING[name]) for row in found])
        for name in _PADDING
        if name in names
    }
    images = [name for name in _IMAGES if name in names]
    if images and "position_ids" in names:
        raise ValueError(
            f"rows with {images} cannot be put together with packed rows, which have position_ids: "
            "give rows of the two kinds to runs of their own, or leave position_ids out"
        )
    for name in images:
        batch[name] = torch.cat([row[name] for row in found if name in row])
    if min(lengths) < seq:
        batch["attention_mask"] = (torch.arange(seq) < torch.tensor(lengths)[:, None]).long()
    return batch


def check_row(row: Mapping[str, Any]) -> Row:
    """Return a row as tensors, int64 where there is one number for each token.

    Raises:
        ValueError: as for :func:`collate`.
    """
    known = {*_PADDING, *_IMAGES}
    if not isinstance(row, Mapping) or "input_ids" not in row or not set(row) <= known:
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"a training row must be a dictionary with input_ids and optionally labels and "
            f"position_ids, or pixel_values and the rest of image_row(), got {got}"
        )
    found = {name: _tensor(name, values) for name, values in row.items()}
    expected = found["input_ids"].shape
    for name in [name for name in found if name in _PADDING]:
        values = found[name]
        if values.dim() != 1 or values.shape != expected or values.is_floating_point():
            raise ValueError(
                f"{name} of a training row must be integers of one dimension, as many as "
                f"input_ids has, got shape {list(values.shape)} and dtype {values.dtype}"
            )
        found[name] = values.long()
        bad = (values < 0) & (values != IGNORED) if name == "labels" else values < 0
        if bool(bad.any()):
            also = f" or {IGNORED}" if name == "labels" else ""
            raise ValueError(
                f"{name} of a training row must be at least 0{also}, got {int(values[bad][0])}"
            )
    return found


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} of a training row must be numbers: {error}") from error


def check_dataset(dataset: Any, *, budget: int, context: int | None) -> int:
    """Check that a dataset can train gates, and find its context.

    Args:
        dataset: Rows. A dataset that cannot be indexed is not read.
        budget: Tokens a head may hold. Some document must be longer than this.
        context: Length of the longest row. None reads all rows to find it.

    Returns:
        The context.

    Raises:
        ValueError: no row has a label to predict, no document is longer than the budget, a row is
            malformed, or ``context`` is needed and missing.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        if context is None:
            raise ValueError(
                "context must be given for a dataset that cannot be indexed: "
                "the length of its longest row, in tokens"
            )
        return context
    rows: Iterator[Row] = (check_row(dataset[index]) for index in range(len(dataset)))
    longest = targets = document = 0
    for row in rows:
        length, predicted, span = _measure(row)
        longest, targets, document = (
            max(longest, length),
            targets + predicted,
            max(document, span),
        )
        if context is not None and targets and document > budget:
            break
    if not targets:
        raise ValueError(
            f"data must have labels to predict, and none of its {len(dataset)} rows has one: "
            "two tokens at least, the second with a label other than -100"
        )
    if document <= budget:
        raise ValueError(
            f"budget {budget} is never exceeded: the longest document has {document} tokens. "
            "Train on longer texts, or with a smaller budget"
        )
    return longest if context is None else context


def _measure(row: Row) -> tuple[int, int, int]:
    """Length, positions that predict a label, and the longest document."""
    tokens = row["input_ids"][None]
    position = row.get("position_ids")
    packing = Packing.of(
        (1, tokens.shape[1]),
        tokens.device,
        position_ids=None if position is None else position[None],
    )
    target = packing.targets(row.get("labels", row["input_ids"])[None])
    span = int(packing.position.max()) + 1 if tokens.shape[1] else 0
    return tokens.shape[1], int((target != IGNORED).sum()), span


def _parse(
    line: str, tokenize: Callable[[str], Sequence[int]] | None, context: int
) -> Row | Sequence[int]:
    data = json.loads(line)
    if not isinstance(data, dict) or set(data) != {"text"}:
        row = check_row(data)
        length = len(row["input_ids"])
        if length > context:
            raise ValueError(f"{length} tokens, and context is {context}: cut it, or raise context")
        return row
    if not isinstance(data["text"], str):
        raise ValueError(f"text must be a string, got {type(data['text']).__name__}")
    if tokenize is None:
        raise ValueError("a row of text needs a tokenizer: pass one, or rows of input_ids")
    return tokenize(data["text"])


def _cut(documents: Iterable[Sequence[int]], context: int) -> Iterator[Sequence[int]]:
    for document in documents:
        for start in range(0, len(document), context):
            yield document[start : start + context]


def _packed(tokens: list[int], positions: list[int]) -> Row:
    return {"input_ids": torch.tensor(tokens), "position_ids": torch.tensor(positions)}


def _get(row: Row, name: str) -> Tensor:
    """A row's values, or their defaults."""
    tokens = row["input_ids"]
    if name == "position_ids" and name not in row:
        return torch.arange(len(tokens))
    return row.get(name, torch.zeros_like(tokens) if name == "mm_token_type_ids" else tokens)


def _fit(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=fill)
