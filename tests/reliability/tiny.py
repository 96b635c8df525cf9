"""A random Llama of three small layers, and what the tests of reliability ask of its caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

GREEDY = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [0]}  # 0 is padding


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def ids(rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, length), generator=generator)


def kept(cache: Any, row: int = 0) -> list[list[int]]:
    """Positions that each head of a row holds."""
    return [
        sorted(p for p in head if p >= 0)
        for layer in range(len(cache))
        for head in cache.positions(layer)[row].tolist()
    ]
