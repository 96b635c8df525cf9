"""Every contestant at every budget, in a few processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from tqdm import tqdm
from transformers.utils import logging

from compare.contestants import contestants
from compare.measure import FULL, Bench, Outcome, Protocol

Task = tuple[Protocol, str, int, int | None]  # contestant, length of the texts, budget

_benches: list[tuple[Protocol, Bench]] = []  # of this process


def plan(protocol: Protocol, names: Iterable[str]) -> list[Task]:
    """The full cache and every contestant, at every budget that the texts exceed."""
    names = list(names)
    tasks: list[Task] = []
    for num_tokens in protocol.budgets:
        tasks.append((protocol, FULL, num_tokens, None))
        for name in names:
            tasks += [(protocol, name, num_tokens, b) for b in protocol.bounding(num_tokens)]
    return tasks


def run_all(tasks: Sequence[Task], jobs: int) -> list[Outcome]:
    """The tasks' outcomes in their order, the same for any number of processes.

    Raises:
        RuntimeError: contestants did not hold the same bytes of keys and values.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they import torch
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_prepare) as pool:
        outcomes = list(tqdm(pool.map(_run, tasks), total=len(tasks), disable=None))
    check_equal_bytes(outcomes)
    return outcomes


def check_equal_bytes(outcomes: Iterable[Outcome]) -> None:
    """Raise unless all contestants held the same keys and values at each budget.

    Raises:
        RuntimeError: two of them did not.
    """
    first: dict[tuple[int, int | None], Outcome] = {}
    for outcome in outcomes:
        other = first.setdefault((outcome.num_tokens, outcome.budget), outcome)
        if outcome.kv_bytes != other.kv_bytes:
            raise RuntimeError(
                f"budget {outcome.budget}: {outcome.contestant} holds {outcome.kv_bytes:,} bytes "
                f"of keys and values, {other.contestant} {other.kv_bytes:,}"
            )


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _run(task: Task) -> Outcome:
    protocol, name, num_tokens, budget = task
    bench = _bench(protocol)
    torch.manual_seed(0)
    if budget is None:
        return bench.run_full(num_tokens)
    return bench.run(name, contestants()[name](budget), num_tokens, budget)


def _bench(protocol: Protocol) -> Bench:
    for known, bench in _benches:
        if known == protocol:
            return bench
    _benches.append((protocol, Bench(protocol)))
    return _benches[-1][1]
