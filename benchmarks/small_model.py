"""Decode steps and prompts of SmolLM2-135M's shape under several policies, on one CPU thread.

    python benchmarks/small_model.py               # about four minutes
    python benchmarks/small_model.py --cpu-time    # on a machine that is busy with other things

On a small model the share of the cache's own work is large. See `README.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import contest
import trimkv_kernels
from contest import TOY, Contestant, Setting, fixed_threads, run_rounds
from decode import RESULTS, cpu_name
from gpu import measure, outcome, report
from gpu.goals import Goal
from gpu.outcome import Record, Results
from trimkv_kernels.loading import share_weights

PROMPT = "prompt"
FULL = "full"
PLAIN, WITH_MASS = ("streaming_llm", "key_norm"), ("h2o",)
SETTING = Setting(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    budget=256,
    buffer=64,
    warmup=2,
    steps=64,
    threads=1,
)
SHORT, LONG = 100, 3000


def _slowest(op: str, policies: Sequence[str], prompt: int) -> Callable[[Results], float]:
    """The largest time of some policies over the stock model's."""

    def measured(results: Results) -> float:
        stock = results.us(op, FULL, prompt=prompt)
        return max(results.us(op, policy, prompt=prompt) for policy in policies) / stock

    return measured


def _speedup(policies: Sequence[str], prompt: int) -> Callable[[Results], float]:
    slowest = _slowest(outcome.STEP, policies, prompt)
    return lambda results: 1 / slowest(results)


def goals(short: int, long: int) -> list[Goal]:
    """What is to be reached: ratios to the stock model in the same run."""
    step = outcome.STEP
    return [
        Goal("S1", f"step after {short} tokens / stock", "x", True, 1.05, None,
             _slowest(step, PLAIN, short)),
        Goal("S1", f"the same with attention mass, after {short} tokens", "x", True, 1.15, None,
             _slowest(step, WITH_MASS, short)),
        Goal("S2", f"stock / step after {long} tokens", "x", False, 1.6, None,
             _speedup(PLAIN, long)),
        Goal("S2", f"the same with attention mass, after {long} tokens", "x", False, 1.3, None,
             _speedup(WITH_MASS, long)),
        Goal("S3", f"prompt of {long} tokens with attention mass / stock", "x", True, 1.5, None,
             _slowest(PROMPT, WITH_MASS, long)),
    ]  # fmt: skip


def make_model(setting: Setting, longest: int) -> nn.Module:
    """A Llama with random weights."""
    torch.manual_seed(0)
    return contest.make_model(replace(setting, prompt=longest), (LlamaConfig, LlamaForCausalLM))


def measure_length(
    setting: Setting, models: dict[str, tuple[nn.Module, Callable[[], Any]]], prompt: int
) -> list[Record]:
    """Every contestant reads a prompt of this length, once, and then they decode in turns."""
    ids = torch.randint(setting.vocab_size, (1, prompt))
    contestants, records = {}, []
    for name, (model, new_cache) in models.items():
        evicts = name != FULL and prompt > setting.budget
        contestant = Contestant(model, new_cache(), setting.buffer if evicts else None)
        records.append(record(PROMPT, name, prompt, [_read(setting, contestant, ids)]))
        contestants[name] = contestant
    run_rounds(setting, contestants, ids[:, -1:].clone())
    for name, contestant in contestants.items():
        step = record(outcome.STEP, name, prompt, contestant.seconds)
        step.median_us = 1e3 * contestant.figures(setting.warmup)["amortised"]
        records.append(step)
    return records


def _read(setting: Setting, contestant: Contestant, ids: Tensor) -> float:
    start = setting.clock()
    contestant.model(ids, past_key_values=contestant.cache, use_cache=True, logits_to_keep=1)
    return setting.clock() - start


def record(op: str, contestant: str, prompt: int, seconds: Sequence[float]) -> Record:
    """A series of times; a single one has no spread."""
    kept = Record(op, contestant, {"prompt": prompt}, "float32", outcome.OK)
    times = [1e6 * x for x in seconds]
    kept.replays, kept.median_us = len(times), times[0]
    if len(times) > 1:
        kept.set_timing(measure.summarize(times), {}, None)
    return kept


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="small_model.py", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a toy: only checks that it runs")
    parser.add_argument("--cpu-time", action="store_true", help="the thread's own CPU clock")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_small_model.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse(argv)
    setting, lengths = SETTING, (SHORT, LONG)
    if arguments.toy:
        setting, lengths = replace(TOY, threads=1), (8, 48)
    setting = replace(setting, cpu_time=arguments.cpu_time)
    load, results = os.getloadavg()[0], Results()
    stock = make_model(setting, max(lengths))
    models: dict[str, tuple[nn.Module, Callable[[], Any]]] = {FULL: (stock, DynamicCache)}
    bounded = copy.deepcopy(stock)  # its weights will lie by column, and stock's by row
    for policy in (*PLAIN, *WITH_MASS):
        model = share_weights(bounded)
        sizes = {"budget": setting.budget, "buffer": setting.buffer}
        handle = trimkv_kernels.patch(model, policy, pack_weights=True, **sizes)
        models[policy] = model, handle.new_cache
    with fixed_threads(setting.threads), torch.no_grad():
        for prompt in lengths:
            results.records += measure_length(setting, models, prompt)
    for kept in results.records:
        print(
            f"{kept.op:9} {kept.shape_text:12} {kept.contestant:14} {kept.median_us / 1e3:10.2f} ms"
        )
    chosen = goals(*lengths)
    print(report.goals_table(results, chosen))
    found = {
        "benchmark": "small_model",
        "date": datetime.now(UTC).date().isoformat(),
        **measure.machine(torch.device("cpu")),
        "device": cpu_name(),
        "command": " ".join(["python", *sys.argv]),
        "load": [round(figure, 2) for figure in (load, os.getloadavg()[0])],
        "setting": asdict(setting),
        "goals": [goal.row(results) for goal in chosen],
        "records": [asdict(kept) for kept in results.records],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
