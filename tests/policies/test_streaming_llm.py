"""StreamingLLM in the cache: the kept sets of the authors' code."""

import pytest
import torch

from trimkv_kernels import BoundedKVCache
from trimkv_kernels.policies import make_policy


def kept_after(calls: list[int], budget: int) -> set[int]:
    cache = BoundedKVCache(
        make_policy("streaming_llm"),
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        batch_size=1,
        budget=budget,
        buffer=1,
        sinks=1,
        dtype=torch.float32,
        device="cpu",
        impl="torch",
    )
    for new in calls:
        token = torch.zeros(1, 1, new, 8)
        cache.attend(0, token, token, token)
        cache.evict()
    return {p for p in cache.positions(0)[0, 0].tolist() if p >= 0}


@pytest.mark.parametrize("calls", [[6], [1] * 6, [2, 1, 3]])
def test_sinks_and_window(calls: list[int]) -> None:
    """One sink and a window of 3; a budget smaller by one is the authors' ``evict_for_space(1)``,
    which makes room for the next token beforehand."""
    assert kept_after(calls, budget=4) == {0, 3, 4, 5}
    assert kept_after(calls, budget=3) == {0, 4, 5}


def test_steps_behind_a_full_cache() -> None:
    """Tokens 4 to 7 after a prompt of 4 take the places of 1 to 3, then of one another."""
    assert [kept_after([4] + [1] * steps, budget=4) for steps in range(1, 5)] == [
        {0, 2, 3, 4},
        {0, 3, 4, 5},
        {0, 4, 5, 6},
        {0, 5, 6, 7},
    ]
