"""Heads that share a budget, step after step: no pair is lost, mixed up or chosen otherwise.

1,000 steps, or as many as ``TRIMKV_DRIFT_STEPS`` says; `make soak` takes 100,000.
"""

import itertools
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import trimkv_kernels as tk
from test_shared_budgets import (
    ALLOCATIONS,
    HEADS,
    LAYERS,
    SHAPE,
    Oracle,
    check_pages,
    kept_sets,
    make_cache,
)
from trimkv_kernels import RetentionPolicy, TokenView
from trimkv_kernels.testing import Tokens

STEPS = int(os.environ.get("TRIMKV_DRIFT_STEPS", "1000"))
COLUMNS = 251  # tokens that come again and again; a prime
BUDGET, BUFFER = 12, 3
GROUP = SHAPE.num_heads // HEADS


@dataclass(frozen=True)
class Exact(RetentionPolicy):
    """Affine, in multiples of 1/32, so that a score is exact in float32 whatever the age.

    Some pairs never age. They stay for the whole run, as long as others do not score more.
    """

    sinks = 0
    recent = 0
    needs = tk.Needs(insert=("value",))

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        return terms(tokens.value.float(), tokens.layer)


def terms(value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Slope and offset of ``[batch, num_kv_heads, new, head_dim]``."""
    rate = torch.tensor([0.25, 2.0])[:, None] * (1 + layer)
    slope = (value[..., 0].abs() * 8 - 0.5).floor().clamp(min=0) / 8
    return -slope * rate, (value[..., 1] * 16).floor() / 32


@pytest.mark.parametrize("name", ["global", "floor", "adaptive", "threshold"])
def test_no_drift(name: str) -> None:
    """Kept sets in float64 at every step; outputs, keys and pages after every hundredth."""
    tokens, allocation = Tokens.random(SHAPE, COLUMNS, (0, 0)), ALLOCATIONS[name]
    cache = make_cache(Exact(), allocation, batch_size=2, budget=BUDGET, buffer=BUFFER)
    oracles = [make_oracle(tokens, allocation, row) for row in range(2)]
    worst, evicted = 0.0, 0
    for step in range(STEPS):
        column = step % COLUMNS
        output = tokens.feed(cache, column, column + 1)
        is_checked = step % 100 == 0 or step == STEPS - 1
        held = [[list(head) for head in itertools.chain(*x.kept)] for x in oracles]
        for row, oracle in enumerate(oracles):
            oracle.call(1)
            assert kept_sets(cache, row) == oracle.kept, (step, row)
            if is_checked:
                expected = attention(tokens, row, held[row], step)
                worst = max(worst, float((output[:, row, :, 0].double() - expected).abs().max()))
        evicted += sum(map(len, held[0])) > sum(map(len, itertools.chain(*oracles[0].kept)))
        if is_checked:
            check_pages(cache)
            check_keys(cache, tokens)
    assert evicted > STEPS // 10
    # 15 values of at most 10 in float32, and a softmax of logits of at most 60
    assert worst < 60 * 10 * 15 * torch.finfo(torch.float32).eps
    assert cache.t.tolist() == [STEPS, STEPS]
    print(f"{name}: {STEPS} steps, {evicted} evictions, outputs within {worst:.1e}")


def make_oracle(tokens: Tokens, allocation: tk.GlobalTopK, row: int) -> Oracle:
    slope, offset = (
        torch.stack(each)[:, row].tolist()
        for each in zip(
            *(terms(tokens.inputs["value"][layer], layer) for layer in range(LAYERS)), strict=True
        )
    )

    def score(layer: int, head: int, position: int, t: int) -> float:
        column = position % COLUMNS
        return slope[layer][head][column] * (t - position) + offset[layer][head][column]

    return Oracle(score, allocation, BUDGET, BUFFER)


def attention(tokens: Tokens, row: int, held: list[list[int]], step: int) -> Tensor:
    """``[layers, num_heads, head_dim]`` float64: of a step, over what heads held and itself."""
    outputs = torch.zeros(LAYERS, SHAPE.num_heads, SHAPE.head_dim, dtype=torch.float64)
    for layer, head in itertools.product(range(LAYERS), range(SHAPE.num_heads)):
        own = layer * HEADS + head // GROUP
        columns = [p % COLUMNS for p in (*held[own], step)]
        key, value = (
            tokens.inputs[x][layer, row, head // GROUP, columns].double() for x in ("key", "value")
        )
        query = tokens.inputs["query"][layer, row, head, step % COLUMNS].double()
        outputs[layer, head] = (key @ query / SHAPE.head_dim**0.5).softmax(0) @ value
    return outputs


def check_keys(cache: tk.BoundedKVCache, tokens: Tokens) -> None:
    """Every pair is that of the token it says."""
    for layer, row, head in itertools.product(range(LAYERS), range(2), range(HEADS)):
        position = cache.positions(layer)[row, head]
        columns = (position[position >= 0] % COLUMNS).long()
        for name, held in (("key", cache.keys(layer)), ("value", cache.values(layer))):
            expected = tokens.inputs[name][layer, row, head, columns]
            assert torch.equal(held[row, head][position >= 0], expected)
