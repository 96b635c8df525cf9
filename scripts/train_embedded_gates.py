"""Train the retention gates of the small Qwen3 that ships with the package.

    python scripts/train_embedded_gates.py

It takes some minutes on two CPU cores, needs the extra ``train``, and writes the gates to
`src/trimkv_kernels/embedded/embedded_model/retention_gates`, where `patch` finds them. The data are
recall texts of `trimkv_kernels.embedded`, of at most 512 tokens with their questions. The loss
counts the answers only: a loss on all words teaches the gates to keep what predicts ordinary ones.

At the end the recall is printed, at 1/8, 1/16 and 1/32 of texts that were never trained on and are
longer: of 512 and 1,536 tokens, without their questions.

Data and initial weights follow from `--seed`. Sums are ordered by torch and depend on its version,
the CPU and the number of threads, so the very same weights are to be had on the same machine only.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import trimkv_kernels as tk
from trimkv_kernels import training
from trimkv_kernels.embedded import (
    EMBEDDED_MODEL,
    FIRST_HELD_OUT_SEED,
    embedded_model,
    encode,
    make_recall_text,
    recall,
)
from trimkv_kernels.gates.published import SHIPPED_FOLDER

FOLDER = EMBEDDED_MODEL / SHIPPED_FOLDER
# As seen from the gates' folder, wherever the package is installed.
BASE_MODEL = f"../../{EMBEDDED_MODEL.name}"

# At most 18 facts, each with a question of eight tokens: 512 in all.
NUM_TOKENS = 368
# Mostly dense: where a text has fewer facts than the budget has slots, there is little to learn.
SPACINGS = ((20, 28), (20, 28), (24, 90))
TEXTS_PER_STEP = 4
IGNORED = -100

# About as many as a text has statements worth keeping. Gates begin by keeping everything, and the
# less the budget makes facts fade, the longer they outlast what came just now.
TRAINED_BUDGET, BIAS_INIT = 14, 10.0
INTERMEDIATE_SIZE = 64
LEARNING_RATE, WARMUP_STEPS = 1e-2, 20
# What users get who name none.
BUDGET, BUFFER = 64, 16

HELD_OUT_SPACING = (20, 28)
HELD_OUT_LENGTHS = (512, 1536)
SHARES = (8, 16, 32)


def main() -> None:
    """Trains, saves and evaluates."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = embedded_model()
    started = time.monotonic()
    policy = train(model, tokenizer, args.steps, args.seed)
    policy.save_pretrained(args.out)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    if args.num_texts:
        print_recall(model, tokenizer, policy, args.num_texts)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train the gates of the embedded model.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--steps", type=int, default=300, help=f"of {TEXTS_PER_STEP} texts each")
    parser.add_argument("--num-texts", type=int, default=5, help="texts per figure, or 0")
    return parser.parse_args()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int,
    scope: str = "head",
) -> tk.TrimKV:
    """Trains new gates, and states the budget and buffer that users get.

    Scope ``"global"`` makes tied gates whose heads share the budget.
    """
    with tempfile.TemporaryDirectory() as folder:
        policy = training.train(
            model,
            rows_of(tokenizer, steps * TEXTS_PER_STEP, random.Random(seed)),
            budget=TRAINED_BUDGET,
            out=folder,
            seed=seed,
            scope=scope,
            max_steps=steps,
            per_device_train_batch_size=TEXTS_PER_STEP,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARMUP_STEPS,
            intermediate_size=INTERMEDIATE_SIZE,
            bias_init=BIAS_INIT,
            base_model=BASE_MODEL,
            data_name=f"recall texts of {NUM_TOKENS} tokens, loss on answers, M={TRAINED_BUDGET}",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
    policy.gates.config = replace(policy.gates.config, budget=BUDGET, buffer=BUFFER)
    return policy


def rows_of(
    tokenizer: PreTrainedTokenizerBase, count: int, rng: random.Random
) -> list[dict[str, Tensor]]:
    """Texts of mixed density with all their questions, and the answers as labels."""
    rows = []
    for _ in range(count):
        seed, spacing = rng.randrange(FIRST_HELD_OUT_SEED), rng.choice(SPACINGS)
        encoded = encode(make_recall_text(NUM_TOKENS, seed=seed, spacing=spacing), tokenizer)
        labels = torch.full_like(encoded.input_ids, IGNORED)
        labels[encoded.answer_positions] = encoded.answers
        rows.append({"input_ids": encoded.input_ids, "labels": labels})
    return rows


def print_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: tk.TrimKV, count: int
) -> None:
    """Prints the recall on texts that were never trained on, read 16 tokens at a time."""
    for num_tokens in HELD_OUT_LENGTHS:
        seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + count)
        texts = [make_recall_text(num_tokens, seed=s, spacing=HELD_OUT_SPACING) for s in seeds]
        print(f"{num_tokens:5} tokens, full cache: {recall(model, tokenizer, texts):.1%}")
        for share in SHARES:
            budget = num_tokens // share
            with tk.patch(model, policy, budget=budget, buffer=8, sinks=1, recent=2) as handle:
                found = recall(
                    model, tokenizer, texts, new_cache=handle.new_cache, context_chunk=16
                )
            print(f"{num_tokens:5} tokens, budget {budget:3}: {found:.1%}", flush=True)


if __name__ == "__main__":
    main()
