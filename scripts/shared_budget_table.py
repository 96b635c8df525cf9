"""Recall of the embedded model where heads share a budget, and where each has its own.

    python scripts/shared_budget_table.py

Trains tied gates (`rg10`) with one budget for all heads, by the recipe of `train_embedded_gates.py`,
and prints the table of docs/comparison.md: these gates with a shared budget and with a budget per
head, and SnapKV and KeyDiff with and without `AdaptiveHeads`. It takes some minutes on two cores.
"""

from __future__ import annotations

import argparse

import torch

import trimkv_kernels as tk
from train_embedded_gates import HELD_OUT_SPACING, train
from trimkv_kernels.embedded import FIRST_HELD_OUT_SEED, embedded_model, make_recall_text, recall
from trimkv_kernels.policies import RetentionPolicy, make_policy
from trimkv_kernels.policies.allocation import Allocation, Uniform

SIZES = ((512, 32), (512, 16), (1536, 96), (1536, 48))
CHUNK, BUFFER, TEXTS = 16, 4, 5


def main() -> None:
    """Trains and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = embedded_model()
    tied = train(model, tokenizer, args.steps, seed=0, scope="global")
    print("| policy | budget | " + " | ".join(f"{b} of {n:,}" for n, b in SIZES) + " |")
    print("| --- | --- |" + " ---: |" * len(SIZES))
    for name, allocation in contestants():
        figures = []
        for num_tokens, budget in SIZES:
            policy = tied if name == "trimkv, tied gates" else untrained(name, budget)
            figures.append(100 * measure(model, tokenizer, policy, allocation, num_tokens, budget))
        label = "per head" if allocation == Uniform() else f"`{allocation}`"
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        print(f"| {name} | {label} | {cells} |", flush=True)


def contestants() -> list[tuple[str, Allocation]]:
    """Names of policies, each with an allocation."""
    tied = [Uniform(), tk.GlobalTopK(), tk.GlobalTopK(min_per_head=4), tk.AdaptiveHeads()]
    pairs = [("trimkv, tied gates", allocation) for allocation in tied]
    for name in ("snap_kv", "key_diff"):
        pairs += [(name, Uniform()), (name, tk.AdaptiveHeads())]
    return pairs


def untrained(name: str, budget: int) -> RetentionPolicy:
    """A policy with the options that `make compare` gives it."""
    options = {"window": min(32, budget // 2)} if name == "snap_kv" else {}
    return make_policy(name, **options)


def measure(
    model: object,
    tokenizer: object,
    policy: RetentionPolicy,
    allocation: Allocation,
    num_tokens: int,
    budget: int,
) -> float:
    """Recall on held-out texts, read in chunks, the first token and the last two protected."""
    seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + TEXTS)
    texts = [make_recall_text(num_tokens, seed=seed, spacing=HELD_OUT_SPACING) for seed in seeds]
    options = {"budget": budget, "buffer": BUFFER, "sinks": 1, "recent": 2}
    with tk.patch(model, policy, allocation=allocation, **options) as handle:
        return recall(model, tokenizer, texts, new_cache=handle.new_cache, context_chunk=CHUNK)


if __name__ == "__main__":
    main()
