"""What is measured: the cases of each part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .case import QWEN3_4B, TOY, Case, Heads
from .slot_cases import DecodeCase, EvictCase, ExtendCase, FillCase, RaggedCase
from .training_cases import RetentionCase, SumCase


def decode_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """D1 to D8 and B1 of the goals."""
    if toy:
        yield DecodeCase(**_common(device), batch=2, slots=24, against_flex=True)
        for skewed in (False, True):
            yield RaggedCase(**_common(device), batch=2, slots=24, skewed=skewed)
        return
    for batch in (1, 8, 64):
        for skewed in (False, True):
            common = _common(device, QWEN3_4B)
            yield RaggedCase(**common, batch=batch, slots=1024, skewed=skewed)
    for slots in (1024, 4096, 512, 2048):
        for batch in (1, 4, 8, 16, 64):
            flex = slots in (1024, 4096) and batch in (1, 8, 64)
            common = _common(device, QWEN3_4B)
            yield DecodeCase(**common, batch=batch, slots=slots, against_flex=flex)


def evict_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """E1 to C2 of the goals, and the step at which nobody has anything to evict."""
    common, size = _common(device), (9, 1, 3)
    if not toy:
        common, size = _common(device, QWEN3_4B), (1024, 1, 128)
    budget, one, many = size
    yield EvictCase(**common, batch=2 if toy else 8, budget=budget, buffer=one)
    yield EvictCase(**common, batch=2 if toy else 4, budget=budget, buffer=many)
    yield EvictCase(**common, batch=2 if toy else 4, budget=budget, buffer=many, full=False)
    tokens = 20 if toy else 4096
    yield FillCase(**common, batch=2, tokens=tokens, budget=budget, buffer=many)


def extend_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """X1 and X2 of the goals, a long call on a long cache, a few draft tokens."""
    if toy:
        yield ExtendCase(**_common(device), batch=2, slots=9, tokens=7, against_flex=True)
        return
    common = _common(device, QWEN3_4B)
    yield ExtendCase(**common, batch=4, slots=1024, tokens=1024, against_flex=True)
    yield ExtendCase(**common, batch=1, slots=4096, tokens=512)
    yield ExtendCase(**common, batch=8, slots=1024, tokens=8)


def retention_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """T1 to T4 of the goals, and the shorter sequence of a quick look."""
    common = _common(device, TOY if toy else QWEN3_4B)
    long, short = (40, 16) if toy else (8192, 2048)
    for backward in (False, True):
        yield RetentionCase(**common, seq=long, backward=backward, against_flex=True)
        yield RetentionCase(**common, seq=long, backward=backward, mode="scale")
    if not toy:
        for backward in (False, True):
            yield RetentionCase(**common, batch=4, seq=short, backward=backward)


def sum_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """R1 and R2 of the goals."""
    common = _common(device, TOY if toy else QWEN3_4B) | {"dtype": torch.float32}
    many, few = ((6, 80), (2, 130)) if toy else ((288, 16384), (8, 131072))
    yield SumCase(**common, rows=many[0], seq=many[1], backward=True, against_all_pairs=True)
    for backward in (False, True):
        yield SumCase(**common, rows=few[0], seq=few[1], backward=backward)


CASES = {
    "decode": decode_cases,
    "evict": evict_cases,
    "extend": extend_cases,
    "retention": retention_cases,
    "sum": sum_cases,
}


def _common(device: torch.device, heads: Heads = TOY) -> dict[str, Any]:
    """A GPU's cases are in bf16; a CPU's in fp32, where a wrong formula cannot hide."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"device": device, "heads": heads, "dtype": dtype}
