"""Small things to train on: the embedded model's recall texts, with a loss on the answers only."""

import json
from pathlib import Path

import torch
from torch import Tensor

from trimkv_kernels.embedded import embedded_model, encode, make_recall_text

_, TOKENIZER = embedded_model()


def recall_rows(count: int, num_tokens: int = 60) -> list[dict[str, Tensor]]:
    """Rows with labels at the answers."""
    rows = []
    for seed in range(count):
        encoded = encode(make_recall_text(num_tokens, seed=seed), TOKENIZER)
        labels = torch.full_like(encoded.input_ids, -100)
        labels[encoded.answer_positions] = encoded.answers
        rows.append({"input_ids": encoded.input_ids, "labels": labels})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Tensor]]) -> Path:
    """The rows as a file."""
    lines = [json.dumps({name: values.tolist() for name, values in row.items()}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path
