"""Many requests on one device: rows of a bounded cache, and batches on a full one, in equal bytes.

Rows take the next request as soon as one is free. A full cache reads as many prompts at once as fit
with their answers, and generates until all of them have theirs. Both decode greedily on the same
random weights. An error is the share of the first request's tokens that are others than those it
has alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import trimkv_kernels as tk
from decode_cases import Case, Models, sized

from . import measure, outcome
from .outcome import Record

ROWS, FULL = "rows", "full_generate"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a device.

    Attributes:
        case: The model, its prompts (``setting.prompt`` tokens) and a row's budget and buffer.
        cache_bytes: For the caches of all requests that run at once.
        requests: How many there are.
        new: Tokens of each answer.
    """

    case: Case
    cache_bytes: int
    requests: int
    new: int

    @property
    def rows(self) -> int:
        """Requests that run at once in rows; one more row reads prompts."""
        setting = self.case.setting
        row = (setting.budget + setting.buffer) * self.case.pair_bytes
        return max(self.cache_bytes // row - 1, 1)

    @property
    def batch(self) -> int:
        """Requests that run at once on a full cache."""
        request = (self.case.setting.prompt + self.new) * self.case.pair_bytes
        return max(self.cache_bytes // request, 1)


def load(device: torch.device, toy: bool) -> Load:
    """The shape of Qwen3-0.6B with 1 GiB for caches; a toy on the CPU for the dry run."""
    name, prompt, new, requests = ("toy", 40, 8, 5) if toy else ("qwen3-0.6b", 1536, 256, 64)
    setting = replace(sized(name, 16 if toy else 256), prompt=prompt, buffer=8 if toy else 64)
    case = Case(
        model=name,
        setting=setting,
        batch=requests,
        entries=(),
        device=device,
        dtype=torch.float32 if toy else torch.bfloat16,
    )
    size = 100 * case.pair_bytes if toy else 2**30
    return Load(case=case, cache_bytes=size, requests=requests, new=new)


def run(job: Load, deadline: float, timed: bool) -> Iterator[list[Record]]:
    """Serve the requests both ways; the records of each as it ends."""
    with torch.no_grad():
        models = Models(job.case)
    for name, running, serve in ((ROWS, job.rows, _in_rows), (FULL, job.batch, _in_batches)):
        record = _blank(job, name, running)
        if timed and time.monotonic() > deadline:
            record.status, record.note = outcome.NOT_RUN, "the part's time was up"
        else:
            with torch.no_grad():
                _measure(job, models, serve, record, timed)
        measure.free_memory()
        yield [record]


def _blank(job: Load, name: str, running: int) -> Record:
    setting = job.case.setting
    shape: dict[str, Any] = {"model": job.case.model, "prompt": setting.prompt, "new": job.new}
    shape |= {"requests": job.requests, "running": running}
    if name == ROWS:
        shape |= {"budget": setting.budget, "buffer": setting.buffer}
    dtype = str(job.case.dtype).removeprefix("torch.")
    record = Record(outcome.REQUESTS, name, shape, dtype, outcome.OK)
    record.bytes, record.launches = job.cache_bytes, job.requests * job.new
    return record


def _measure(
    job: Load,
    models: Models,
    serve: Callable[[Load, Models, int, int], list[Tensor]],
    record: Record,
    timed: bool,
) -> None:
    if timed:
        serve(job, models, min(2, job.requests), 4)  # kernels are compiled
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    answers = serve(job, models, job.requests, job.new)
    if timed:
        torch.cuda.synchronize()
        record.tokens_per_s = job.requests * job.new / (time.perf_counter() - begin)
        record.peak_bytes = torch.cuda.max_memory_allocated()
    alone = serve(replace(job, cache_bytes=0), models, 1, job.new)  # one at a time
    record.max_error = float((answers[0] != alone[0]).float().mean())


def _in_rows(job: Load, models: Models, requests: int, new: int) -> list[Tensor]:
    model, _ = models.patched(job.case.setting.buffer)
    batch = tk.RowBatch(model, job.rows)
    finished = list(batch.run(models.prompt[:requests], max_new_tokens=new, eos_token_id=None))
    return [torch.tensor(x.tokens) for x in sorted(finished, key=lambda x: x.number)]


def _in_batches(job: Load, models: Models, requests: int, new: int) -> list[Tensor]:
    answers: list[Tensor] = []
    for prompts in models.prompt[:requests].split(job.batch):
        output = models.stock.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=DynamicCache(config=models.stock.config),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers += output[:, prompts.shape[1] :].cpu().unbind()
    return answers
