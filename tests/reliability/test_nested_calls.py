"""A model's call inside another, or in another thread, does not touch the other's cache."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import GREEDY, ids, llama
from torch import Tensor

import trimkv_kernels as tk


def again(model: Any) -> list[Any]:
    """A stopping criterion that asks the model itself."""

    def score(input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        with torch.no_grad():
            model(input_ids[:, -3:])
        model.generate(input_ids[:, -3:], max_new_tokens=2, prompt_lookup_num_tokens=2, **GREEDY)
        return torch.zeros(1, dtype=torch.bool)

    return [score]


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}])
def test_a_criterion_that_calls_the_model(options: dict[str, int]) -> None:
    model = llama()
    handle = tk.patch(model, "streaming_llm", budget=8, buffer=2)
    text, more = torch.cat([ids(1, 6, 3)] * 3, 1), ids(1, 20, 8)
    results = []
    for criteria in ([], again(model)):
        cache = handle.new_cache()
        output = model.generate(
            text,
            past_key_values=cache,
            stopping_criteria=criteria,
            max_new_tokens=8,
            **options,
            **GREEDY,
        )
        assert cache.slots is not None
        assert not cache.slots.is_holding
        assert handle.stats().tokens_seen == cache.stats().tokens_seen
        with torch.no_grad():
            results.append((output, model(more, past_key_values=cache).logits))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_strict_looks_at_the_cache_of_the_call() -> None:
    """Guidance runs the model on a cache of its own, which never fills."""
    model, text = llama(), ids(1, 40)
    handle = tk.patch(model, "streaming_llm", budget=24, buffer=4, strict=True)
    model.generate(text, max_new_tokens=4, guidance_scale=1.5, **GREEDY)
    assert handle.stats().tokens_seen == [43]
    with pytest.raises(RuntimeError, match="never had to evict"):
        model.generate(text[:, :5], max_new_tokens=4, **GREEDY)


def test_threads_with_and_without_drafts() -> None:
    model = llama()
    tk.patch(model, "streaming_llm", budget=16, buffer=4)
    texts = [torch.cat([ids(1, 20, 3)] * 3, 1)[:, i:] for i in range(4)]
    expected = [model.generate(text, max_new_tokens=30, **GREEDY) for text in texts]
    results: list[Tensor | None] = [None] * 4

    def run(index: int) -> None:
        drafts = {"prompt_lookup_num_tokens": 4} if index % 2 else {}
        results[index] = model.generate(texts[index], max_new_tokens=30, **drafts, **GREEDY)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        assert got is not None
        assert torch.equal(got, want)
