"""Serve many prompts over a few rows of one cache, and see that memory stays as it is.

    python examples/rows.py                          # the package's small model and its texts
    python examples/rows.py --model Qwen/Qwen3-0.6B --rows 8 --budget 512 --buffer 128 prompts.txt

A file of prompts has one prompt on each line.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimkv_kernels as tk
from trimkv_kernels.embedded import FIRST_HELD_OUT_SEED, embedded_model, make_recall_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="?", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--model", help="a causal model; default: the package's own")
    parser.add_argument("--policy", help="default: trimkv where gates are at hand")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--budget", type=int, default=96)
    parser.add_argument("--buffer", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each request")
    args = parser.parse_args()

    if args.model is None:
        model, tokenizer = embedded_model()
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    texts = args.prompts.read_text().splitlines() if args.prompts else own_texts()
    prompts = [tokenizer(text, return_tensors="pt").input_ids.to(model.device) for text in texts]

    tk.patch(model, args.policy, budget=args.budget, buffer=args.buffer)
    batch = tk.RowBatch(model, rows=args.rows)
    held, start, made = batch.stats().bytes_held, time.perf_counter(), 0
    for request in batch.run(prompts, max_new_tokens=args.tokens, do_sample=False):
        made += len(request.tokens)
        answer = tokenizer.decode(request.tokens, skip_special_tokens=True)
        print(
            f"request {request.number} in row {request.row}: {len(request.prompt)} tokens read, "
            f"{request.finish_reason} after {len(request.tokens)}: {answer[:40]!r}"
        )
    seconds = time.perf_counter() - start
    assert batch.stats().bytes_held == held
    print(f"{made} tokens in {seconds:.1f} s, {held / 1e6:.1f} MB of cache before and after")


def own_texts() -> list[str]:
    """Texts of different lengths, each with a question about a fact in it."""
    texts = [make_recall_text(100 + 60 * n, seed=FIRST_HELD_OUT_SEED + n) for n in range(6)]
    return [text.prompt(text.questions[0]) for text in texts]


if __name__ == "__main__":
    with torch.inference_mode():
        main()
