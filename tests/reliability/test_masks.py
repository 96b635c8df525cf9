"""Padding masks are right or refused, never ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GREEDY, ids, kept, llama
from torch import Tensor
from transformers import DynamicCache

import trimkv_kernels as tk
from trimkv_kernels import decode_loop


def ones(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor)


def run(kind: str, model: Any, text: Tensor, mask: Tensor, cache: Any, eos: int | None) -> Tensor:
    """The text with six more tokens."""
    call: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 6}
    if kind == "generate":
        return model.generate(text, do_sample=False, eos_token_id=eos, pad_token_id=0, **call)
    ends = () if eos is None else eos
    tokens = decode_loop(model, text, eos_token_id=ends, pad_token_id=0, **call)
    return torch.cat([text, torch.stack(list(tokens), 1)], 1)


@pytest.mark.parametrize("kind", ["generate", "decode_loop"])
@pytest.mark.parametrize("policy", ["full", "streaming_llm", "h2o", "key_norm"])
def test_turns_of_a_batch_whose_rows_end_and_are_padded(policy: str, kind: str) -> None:
    """Row 0 ends early, row 2 starts with padding and has a shorter second turn."""
    model, text = llama(), ids(3, 8)
    budget = {"budget": 64, "buffer": 1} if policy == "full" else {"budget": 12, "buffer": 4}
    free = model.generate(text, max_new_tokens=6, **GREEDY)
    eos = next(int(x) for x in free[0, 8:11] if x not in free[1:, 8:])
    handle = tk.patch(model, policy, **budget)
    mask = ones(text)
    mask[2, :3] = 0
    cache = handle.new_cache()
    first = run(kind, model, text, mask, cache, eos)
    end = 8 + int((first[0, 8:] == eos).nonzero()[0]) + 1
    mask = torch.cat([mask, ones(first[:, 8:])], 1)
    mask[0, end:] = 0
    more = ids(3, 3, 9)
    mask = torch.cat([mask, ones(more)], 1)
    mask[2, -3] = 0
    text = torch.cat([first, more], 1)
    together = run(kind, model, text, mask, cache, None)
    for row in range(3):
        alone = handle.new_cache()
        begin = 3 if row == 2 else 0
        own = run(kind, model, text[row : row + 1, begin:8], ones(text[:1, begin:8]), alone, eos)
        own = torch.cat([own, text[row : row + 1][:, first.shape[1] :][:, row // 2 :]], 1)
        own = run(kind, model, own, ones(own), alone, None)
        assert torch.equal(own[0, -6:], together[row, -6:])
        assert kept(alone) == kept(cache, row)


@pytest.mark.parametrize("kind", ["generate", "decode_loop"])
def test_one_prefix_with_left_padded_suffixes(kind: str) -> None:
    model, prefix, suffixes = llama(), ids(1, 12), ids(2, 5, 9)
    text = torch.cat([prefix.expand(2, -1), suffixes], 1)
    mask = ones(text)
    mask[0, 12:14] = 0
    with torch.no_grad():
        call = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        stock = model.generate(text, attention_mask=mask, **call)
    handle = tk.patch(model, "full", budget=64)
    cache = handle.new_cache()
    with torch.no_grad():
        model(prefix, past_key_values=cache)
        fork = cache.fork(2)
        model(suffixes, attention_mask=mask, past_key_values=cache.fork(2))
    assert torch.equal(run(kind, model, text, mask, fork, None)[:, 17:], stock[:, 17:])


def test_hidden_tokens_of_earlier_calls_are_refused() -> None:
    model, text, more = llama(), ids(1, 20), ids(1, 5, 8)
    whole = torch.cat([text, more], 1)
    mask = ones(whole)
    mask[0, 8:14] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text, past_key_values=cache)
        stock = model.generate(whole, past_key_values=cache, max_new_tokens=6, **GREEDY)
        cache = DynamicCache(config=model.config)
        model(text, past_key_values=cache)
    call = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    hidden = model.generate(whole, past_key_values=cache, **call)
    assert not torch.equal(stock, hidden), "the stock model takes notice of the mask"
    handle = tk.patch(model, "full", budget=64)
    cache = handle.new_cache()
    moved = torch.ones(1, 22, dtype=torch.long)
    moved[0, 1] = 0
    with torch.no_grad():
        model(text, attention_mask=torch.cat([ones(text[:, :1]) * 0, ones(text[:, 1:])], 1),
              past_key_values=cache)  # fmt: skip
        for bad in (mask, ones(whole), torch.cat([moved, ones(whole[:, :3])], 1)):
            with pytest.raises(ValueError, match=r"the same as before for the 20 tokens .* \[0\]"):
                model(more, attention_mask=bad, past_key_values=cache)
            call = {"attention_mask": bad, "past_key_values": cache, "max_new_tokens": 2}
            with pytest.raises(ValueError, match="the same as before for the 20 tokens"):
                model.generate(whole, **call, **GREEDY)
            with pytest.raises(ValueError, match="the same as before for the 20 tokens"):
                list(decode_loop(model, whole, **call))
        assert cache.stats().tokens_seen == [19]


def test_masks_of_other_kinds_and_lengths_are_refused() -> None:
    model, text = llama(), ids(1, 6)
    handle = tk.patch(model, "streaming_llm", budget=16, buffer=4)
    cache = handle.new_cache()
    with torch.no_grad():
        model(text, past_key_values=cache)
        for bad, message in (
            ({"full_attention": torch.zeros(1, 1, 6, 12)}, "must be a tensor .* got dict"),
            (torch.zeros(1, 1, 6, 12), "custom 4-D masks do not work"),
            (torch.zeros(1, 6, 12), "must have shape"),
            (torch.ones(1, 9), "must have 12 columns, one for each of 6 tokens so far and 6 new"),
            (torch.ones(1, 14), "must have 12 columns.* got 14"),
            (torch.ones(1, 5), "must have shape"),
        ):
            with pytest.raises(ValueError, match="attention_mask must"):
                model(text, attention_mask=bad, past_key_values=handle.new_cache())
            with pytest.raises(ValueError, match=message):
                model(text, attention_mask=bad, past_key_values=cache)
    assert cache.stats().tokens_seen == [6]


def test_a_text_that_was_seen_has_nothing_new() -> None:
    model, text = llama(), ids(1, 12)
    handle = tk.patch(model, "streaming_llm", budget=16, buffer=4)
    cache = handle.new_cache()
    with torch.no_grad():
        model(text, past_key_values=cache)
    for shorter in (text, text[:, :10]):
        with pytest.raises(ValueError, match="must hold more than the 12 tokens"):
            model.generate(shorter, past_key_values=cache, max_new_tokens=2, **GREEDY)


def test_right_padding_without_a_cache_to_keep() -> None:
    model, text = llama(), ids(2, 8)
    mask = ones(text)
    mask[0, 6:] = 0
    labels = text.masked_fill(mask == 0, -100)
    with torch.no_grad():
        stock = model(text, attention_mask=mask, labels=labels)
        tk.patch(model, "streaming_llm", budget=64, buffer=1)
        got = model(text, attention_mask=mask, labels=labels)
        assert got.past_key_values is None
        with pytest.raises(ValueError, match="must have 1 columns"):
            model(text[:, :1], attention_mask=ones(text), past_key_values=got.past_key_values)
    assert torch.equal(stock.loss, got.loss)
    assert torch.equal(stock.logits, got.logits)


def test_the_mask_of_a_step_is_the_stock_ones() -> None:
    """What wrappers such as prompt tuning put their own columns before."""
    model = llama()
    handle = tk.patch(model, "streaming_llm", budget=16, buffer=4)
    cache = handle.new_cache()
    with torch.no_grad():
        model(ids(1, 5), past_key_values=cache)
    inputs = model.prepare_inputs_for_generation(
        ids(1, 6), past_key_values=cache, attention_mask=torch.ones(1, 6, dtype=torch.long),
        next_sequence_length=1, is_first_iteration=False,
    )  # fmt: skip
    assert inputs["attention_mask"].shape == (1, 6)
