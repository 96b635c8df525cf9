"""Read a long text on a fixed number of slots, and see what each policy still knows.

    python examples/demo.py                              # the package's small model and its texts
    python examples/demo.py --policy key_norm --budget 128,256
    python examples/demo.py --model Qwen/Qwen3-0.6B --prompt-file notes.txt --budget 1024

After each text of the package the model is asked for every fact in it, with `generate()`, in
several turns on one cache. Recall is the share of right answers. Your own text is
continued instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

import trimkv_kernels as tk
from trimkv_kernels.embedded import (
    FIRST_HELD_OUT_SEED,
    RecallText,
    embedded_model,
    make_recall_text,
)
from trimkv_kernels.loading import ModelSource

FULL = "full cache"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    policy: str
    budget: int | None
    right: int | None
    seen: int
    slots: int
    bytes_held: int
    bytes_full: int
    tokens_per_second: float
    text: str = ""


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    if arguments.model is None:
        model, tokenizer = embedded_model()
    else:
        source = ModelSource(arguments.model)
        model, tokenizer = source.load_model(), source.load_tokenizer()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    texts, prompt = [], ""
    if arguments.prompt_file is not None:
        prompt = arguments.prompt_file.read_text(encoding="utf-8")
    elif arguments.model is not None:
        raise SystemExit("--model needs --prompt-file: the embedded text is for the embedded model")
    else:
        first = FIRST_HELD_OUT_SEED + arguments.seed
        texts = [make_recall_text(arguments.tokens, seed=first + i) for i in range(arguments.texts)]
    runs = [(FULL, None)] + [(p, b) for p in arguments.policy for b in arguments.budget]
    rows = []
    for policy, budget in (progress := tqdm(runs, disable=None, leave=False)):
        progress.set_description(f"{policy} {budget or ''}")
        with caches_for(model, policy, budget) as new_cache:
            if texts:
                row = ask_all(model, tokenizer, texts, new_cache, policy, budget)
            else:
                row = continue_text(
                    model, tokenizer, prompt, new_cache(), policy, budget, arguments.new
                )
        rows.append(row)
    print(table(rows, texts))


@contextmanager
def caches_for(model: Any, policy: str, budget: int | None) -> Iterator[Callable[[], Any]]:
    """A function that makes the caches of a run: stock ones without a budget, else bounded."""
    if budget is None:
        yield lambda: DynamicCache(config=model.config)
        return
    with tk.patch(model, policy, budget=budget, buffer=max(1, budget // 8)) as handle:
        yield handle.new_cache


def ask_all(
    model: Any,
    tokenizer: Any,
    texts: list[RecallText],
    new_cache: Callable[[], Any],
    policy: str,
    budget: int | None,
) -> Row:
    """Read each text and answer its questions. The cache of the last text is measured."""
    right, tokens, seconds = 0, 0, 0.0
    for text in texts:
        cache = new_cache()
        answers = ask(model, tokenizer, text, cache)
        right, tokens, seconds = right + answers[0], tokens + answers[1], seconds + answers[2]
    return measure(cache, policy, budget, right, tokens / seconds)


def ask(model: Any, tokenizer: Any, text: RecallText, cache: Any) -> tuple[int, int, float]:
    """Right answers, the tokens read and written after the text, and the seconds they took."""
    ids = tokenizer(text.text, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    right, context, start = 0, ids.shape[1], time.perf_counter()
    for question in text.questions:
        words = tokenizer(" ".join(question.prompt), return_tensors="pt").input_ids
        ids = torch.cat((ids, words.to(ids)), dim=1)
        answer_at = ids.shape[1]
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
            disable_compile=True,  # it would take longer than the demo
        )
        right += tokenizer.decode(ids[0, answer_at]).strip() == question.answer
    return right, ids.shape[1] - context, time.perf_counter() - start


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    cache: Any,
    policy: str,
    budget: int | None,
    new: int,
) -> Row:
    """Let the model continue the user's own text."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
    )
    seconds = time.perf_counter() - start
    added = output[0, ids.shape[1] :]
    row = measure(cache, policy, budget, None, len(added) / seconds)
    return Row(**{**vars(row), "text": tokenizer.decode(added, skip_special_tokens=True)})


def measure(cache: Any, policy: str, budget: int | None, right: int | None, speed: float) -> Row:
    """Slots and bytes of what the cache holds."""
    if budget is None:
        seen = cache.get_seq_length()
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return Row(policy, None, right, seen, seen, held, held, speed)
    stats = cache.stats()
    slots = int(stats.slots_used.max())
    seen = max(stats.tokens_seen)
    return Row(policy, budget, right, seen, slots, stats.bytes_held, stats.bytes_full, speed)


def table(rows: list[Row], texts: list[RecallText]) -> str:
    """The rows as text, and below them what was generated."""
    header = ("policy", "budget", "recall", "tokens seen", "slots", "KV bytes", "of full", "tok/s")
    cells = [header]
    questions = sum(len(text.questions) for text in texts)
    for row in rows:
        recall = "-" if row.right is None else f"{row.right / questions:.1%}"
        cells.append(
            (
                row.policy,
                str(row.budget or "-"),
                recall,
                f"{row.seen:,}",
                f"{row.slots:,}",
                f"{row.bytes_held:,}",
                f"{row.bytes_held / row.bytes_full:.1%}",
                f"{row.tokens_per_second:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    if texts:
        lengths = f"{len(texts[0].words):,} tokens"
        lines.append(f"\n{len(texts)} texts of {lengths} and {questions} questions")
    for row in rows:
        if row.text:
            lines.append(f"\n--- {row.policy} {row.budget or ''}\n{row.text}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id of a supported model, or smollm2")
    parser.add_argument("--prompt-file", type=Path, help="your own text, UTF-8")
    parser.add_argument(
        "--policy",
        type=lambda names: names.split(","),
        help="comma-separated policies",
    )
    parser.add_argument(
        "--budget",
        type=lambda sizes: [int(size) for size in sizes.split(",")],
        default=[64, 256, 1024],
        help="comma-separated budgets, pairs per head",
    )
    parser.add_argument("--tokens", type=int, default=2048, help="length of an embedded text")
    parser.add_argument("--texts", type=int, default=4, help="how many embedded texts to read")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate on your own text")
    parser.add_argument("--seed", type=int, default=0, help="which embedded texts")
    arguments = parser.parse_args()
    if arguments.policy is None:  # gates of these two ship with us, others may have none
        trained = ["trimkv"] if arguments.model in (None, "smollm2") else []
        arguments.policy = [*trained, "streaming_llm", "key_norm", "random"]
    return arguments


if __name__ == "__main__":
    main()
