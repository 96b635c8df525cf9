"""A policy of your own in ten lines: check it and compare it with StreamingLLM and random eviction.

    python examples/custom_policy.py
    python examples/custom_policy.py --budget 32,64 --tokens 1024

The small model that ships with the package reads texts on a few slots and is then asked for every
fact in them. Recall is the share of right answers. docs/write-a-policy.md explains what a policy
may be given.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

import trimkv_kernels as tk
from trimkv_kernels.testing import check_policy, embedded_model
from trimkv_kernels.testing.recall import FIRST_HELD_OUT_SEED, make_recall_text, recall


@tk.register_policy("large_values")
@dataclass(frozen=True)
class LargeValues(tk.RetentionPolicy):
    """Keep pairs whose value is large: the larger the value, the more it can add to an output."""

    needs = tk.Needs(score=("value",))

    def score(self, slots: tk.SlotView) -> Tensor:
        return slots.value.float().norm(dim=-1)  # [batch, num_kv_heads, num_slots]


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.disable_progress_bar()

    check_policy(LargeValues())
    print("large_values passes the conformance suite\n")

    model, tokenizer = embedded_model()
    seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + arguments.texts)
    texts = [make_recall_text(arguments.tokens, seed=seed) for seed in seeds]
    questions = sum(len(text.questions) for text in texts)
    print(f"{arguments.texts} texts of {arguments.tokens} tokens, {questions} questions")
    print(f"{'policy':15}{'budget':>8}{'recall':>9}{'slots':>7}")
    print(f"{'full cache':15}{'-':>8}{recall(model, tokenizer, texts):9.1%}{'all':>7}")
    for budget in arguments.budget:
        for name in ("large_values", "streaming_llm", "random"):
            with tk.patch(model, name, budget=budget, buffer=max(1, budget // 8)) as handle:
                share = recall(model, tokenizer, texts, new_cache=handle.new_cache)
            slots = budget + max(1, budget // 8)
            print(f"{name:15}{budget:8}{share:9.1%}{slots:7}")

    with tk.patch(model, "large_values", budget=arguments.budget[-1]) as handle:
        inputs = tokenizer(texts[0].prompt(texts[0].questions[0]), return_tensors="pt")
        cache = handle.new_cache()
        output = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=3, do_sample=False, disable_compile=True
        )
        prompt = inputs.input_ids.shape[1]
        print("\n...", tokenizer.decode(output[0, prompt - 5 :]))
        print(cache.stats())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget",
        type=lambda sizes: [int(size) for size in sizes.split(",")],
        default=[32, 64, 128],
        help="comma-separated budgets, pairs per head",
    )
    parser.add_argument("--tokens", type=int, default=768, help="length of a text")
    parser.add_argument("--texts", type=int, default=4, help="how many texts to read")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
