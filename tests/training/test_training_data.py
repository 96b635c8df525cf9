"""Rows from jsonl files, packing and batching."""

import json
from pathlib import Path

import pytest
import torch

from trimkv_kernels.training import collate, pack, read_jsonl


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def tokenize(text: str) -> list[int]:
    return [len(word) for word in text.split()] + [99]


def lists(row: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in row.items()}


def test_texts_are_packed_and_rows_are_not(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"text": "a bb ccc"},
        {"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "position_ids": [0, 1, 0]},
        "",
        {"text": "a"},
        {"text": "a a a a a a a a"},
    )
    rows = [lists(row) for row in read_jsonl(path, tokenize=tokenize, context=6)]
    assert rows == [
        {"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "position_ids": [0, 1, 0]},
        {"input_ids": [1, 2, 3, 99, 1, 99], "position_ids": [0, 1, 2, 3, 0, 1]},
        {"input_ids": [1, 1, 1, 1, 1, 1], "position_ids": [0, 1, 2, 3, 4, 5]},
        {"input_ids": [1, 1, 99], "position_ids": [0, 1, 2]},
    ]


def test_packing_keeps_every_token_in_order() -> None:
    documents = [list(range(100 * n, 100 * n + n % 7 + 1)) for n in range(40)]
    rows = pack(documents, 16)
    assert all(len(row["input_ids"]) <= 16 for row in rows)
    tokens = [token for row in rows for token in row["input_ids"].tolist()]
    assert tokens == [token for document in documents for token in document]
    starts = sum(int((row["position_ids"] == 0).sum()) for row in rows)
    assert starts == len(documents)


def test_collate() -> None:
    batch = collate(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
            {"input_ids": torch.tensor([4, 5]), "position_ids": torch.tensor([0, 0])},
        ]
    )
    assert lists(batch) == {
        "input_ids": [[1, 2, 3], [4, 5, 0]],
        "labels": [[-100, 2, 3], [4, 5, -100]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert batch["input_ids"].dtype == torch.int64


def test_collate_of_one_length_has_no_mask() -> None:
    batch = collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert lists(batch) == {"input_ids": [[1, 2], [3, 4]]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[1]", "line 2: a training row must be a dictionary with input_ids"),
        ({"text": 3}, "line 2: text must be a string, got int"),
        ({"text": "a", "id": 1}, "line 2: a training row must be .* got \\['id', 'text'\\]"),
        ({"input_ids": [1, 2], "labels": [1]}, "line 2: labels of a training row must be integers"),
        ({"input_ids": [0.5, 2]}, "line 2: input_ids of a training row must be integers"),
        ({"input_ids": [1] * 9}, "line 2: 9 tokens, and context is 8: cut it, or raise context"),
        ({"input_ids": ["a"]}, "line 2: "),
    ],
)
def test_bad_lines(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "a b"}, line)
    with pytest.raises(ValueError, match=f"data.jsonl, {message}"):
        read_jsonl(path, tokenize=tokenize, context=8)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file .*missing.jsonl"):
        read_jsonl(tmp_path / "missing.jsonl", context=8)
    with pytest.raises(ValueError, match="data must have rows to train on, and .* has none"):
        read_jsonl(write(tmp_path / "empty.jsonl", ""), context=8)
    with pytest.raises(ValueError, match="line 1: a row of text needs a tokenizer"):
        read_jsonl(write(tmp_path / "text.jsonl", {"text": "a"}), context=8)
