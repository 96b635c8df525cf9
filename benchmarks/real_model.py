"""A real language model on a long text: memory, and tokens per second, stock against bounded.

    python benchmarks/real_model.py --text-file essays.txt        # SmolLM2-135M, 8,000 tokens
    python benchmarks/real_model.py --text-file essays.txt --policies trimkv,snap_kv --tokens 2048

Each cache reads the same tokens in the same pieces. Then all write, in turns: a round of steps on
one, a round on the next.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import DynamicCache

import trimkv_kernels as tk
from decode import cpu_name
from trimkv_kernels.conversation import held_bytes
from trimkv_kernels.evaluation.contestants import Contestant, make_contestant
from trimkv_kernels.loading import ModelSource, read_text, share_weights


def main() -> None:
    """Measure, and print a table."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    source = ModelSource(options.model)
    tokenizer, stock = source.load_tokenizer(), source.load_model()
    ids = tokenizer(read_text(options.text_file), return_tensors="pt").input_ids
    if ids.shape[1] < options.tokens:
        raise SystemExit(f"text_file must have {options.tokens:,} tokens, got {ids.shape[1]:,}")
    ids = ids[:, : options.tokens]
    caches = {"full cache": (stock, DynamicCache(config=stock.config))}
    caches |= dict(bounded(share_weights(stock), name, options) for name in options.policies)
    reading = {name: read(*pair, ids, options.chunk) for name, pair in caches.items()}
    steps: dict[str, list[float]] = {name: [] for name in caches}
    with torch.inference_mode():
        for _ in range(options.rounds):
            for name, (one, cache) in caches.items():
                steps[name] += write(one, cache, ids[:, -1:], options.steps)
    print(f"| {options.tokens:,} tokens | KV bytes | reading, tokens/s | writing, tokens/s |")
    print("|---|---:|---:|---:|")
    for name, (_, cache) in caches.items():
        speed = f"{reading[name]:.0f} | {1 / median(steps[name]):.1f}"
        print(f"| {name} | {held_bytes(cache):,} | {speed} |")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{options.threads} CPU threads, {cpu_name()}, {stock.dtype}, {versions}")


def bounded(model: Any, name: str | None, options: argparse.Namespace) -> tuple[str, Any]:
    """A model patched with a policy and its cache, under the name in the table."""
    contestant = Contestant(None, None) if name is None else make_contestant(name, None)
    handle = tk.patch(
        model,
        contestant.policy,
        allocation=contestant.allocation,
        budget=options.budget,
        buffer=options.buffer,
    )
    title = name or handle.policy.name
    return f"{title}, budget {handle.options.budget}", (model, handle.new_cache())


def read(model: Any, cache: Any, ids: torch.Tensor, chunk: int) -> float:
    """Tokens per second of reading a text in pieces."""
    begin = time.perf_counter()
    with torch.inference_mode():
        for part in ids.split(chunk, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
    return ids.shape[1] / (time.perf_counter() - begin)


def write(model: Any, cache: Any, token: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each greedy step."""
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - begin)
    return seconds


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder, hub id or smollm2")
    parser.add_argument("--text-file", type=Path, required=True, help="UTF-8 text, long enough")
    parser.add_argument(
        "--policies",
        type=lambda names: names.split(","),
        default=[None],
        help="comma-separated, as `evaluate` names them; default: what patch() chooses",
    )
    parser.add_argument("--budget", type=int, help="pairs kept per head; default: as patch()")
    parser.add_argument("--buffer", type=int, help="new tokens between evictions")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--chunk", type=int, default=256, help="tokens read at a time")
    parser.add_argument("--steps", type=int, default=16, help="tokens written in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
