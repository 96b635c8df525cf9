"""Assisted decoding gives the model's own greedy text, also once something was evicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GREEDY, ids, kept, llama

import trimkv_kernels as tk

OPTIONS = {"budget": 16, "buffer": 6, "sinks": 2, "recent": 3}
POLICIES = ("streaming_llm", "h2o", "key_norm", "snap_kv", "scissorhands", "expected_attention")


def drafts(kind: str, model: Any) -> dict[str, Any]:
    return {
        "lookup": {"prompt_lookup_num_tokens": 4},
        "early_exit": {"assistant_early_exit": 2},
        "model": {"assistant_model": llama()},
        "itself": {"assistant_model": model},
    }[kind]


@pytest.mark.parametrize("kind", ["lookup", "early_exit", "model", "itself"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_text_is_the_models_own(policy: str, kind: str) -> None:
    model, text = llama(), torch.cat([ids(1, 10)] * 3, 1)
    handle = tk.patch(model, policy, **OPTIONS)
    plain, assisted = handle.new_cache(), handle.new_cache()
    call = {"max_new_tokens": 24, **GREEDY}
    expected = model.generate(text, past_key_values=plain, **call)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    got = model.generate(text, past_key_values=assisted, **drafts(kind, model), **call)
    assert torch.equal(got, expected)
    assert kept(assisted) == kept(plain)
    if (kind, policy) == (
        "model",
        "streaming_llm",
    ):  # the same weights: its drafts are taken, so there are fewer calls
        assert len(calls) < 24
    assert not assisted.slots.is_holding


@pytest.mark.parametrize("chunk", [None, 7])
def test_two_turns(chunk: int | None) -> None:
    model, text, more = llama(), ids(1, 30), ids(1, 9, 5)
    handle = tk.patch(model, "h2o", prefill_chunk=chunk, **OPTIONS)
    results = []
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        cache = handle.new_cache()
        call = {"past_key_values": cache, "max_new_tokens": 15, **options, **GREEDY}
        first = model.generate(text, **call)
        results.append(model.generate(torch.cat([first, more], 1), **call))
    assert torch.equal(*results)


def test_a_cache_without_room_to_spare_takes_what_fits() -> None:
    """With `full`, drafts may not ask for more room than the text does."""
    model, text = llama(), torch.cat([ids(1, 10)] * 3, 1)
    tk.patch(model, "full", budget=49, buffer=1)
    call = {"max_new_tokens": 20, **GREEDY}
    expected = model.generate(text, **call)
    assert torch.equal(model.generate(text, prompt_lookup_num_tokens=8, **call), expected)


@pytest.mark.parametrize("kind", ["lookup", "early_exit"])
def test_the_model_is_whole_after_a_draft_that_raises(kind: str) -> None:
    model, text = llama(), torch.cat([ids(1, 10)] * 3, 1)
    handle = tk.patch(model, "streaming_llm", **OPTIONS)
    call = {"max_new_tokens": 24, **GREEDY}
    expected = model.generate(text, **call)
    count = 0

    def fail(*args: object) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fail)
    cache = handle.new_cache()
    with pytest.raises(KeyboardInterrupt):
        model.generate(text, past_key_values=cache, **drafts(kind, model), **call)
    hook.remove()
    assert model.config.num_hidden_layers == 3
    assert torch.equal(model.generate(text, **call), expected)
    with pytest.raises(ValueError, match=r"broken off.*call reset\(\)"):
        model.generate(text, past_key_values=cache, **call)
    cache.reset()
    assert torch.equal(model.generate(text, past_key_values=cache, **call), expected)


def test_drafts_of_every_policy_without_parameters() -> None:
    """The patched model's own text, whatever the policy observes."""
    model, text = llama(num_hidden_layers=2), torch.cat([ids(1, 10)] * 3, 1)
    call = {"max_new_tokens": 12, **GREEDY}
    for name in sorted(set(tk.available_policies()) - {"full", *POLICIES}):
        try:
            handle = tk.patch(model, name, **OPTIONS)
        except (TypeError, ValueError):
            continue  # it needs gates of this model
        with handle:
            expected = model.generate(text, **call)
            got = model.generate(text, prompt_lookup_num_tokens=4, **call)
            assert torch.equal(got, expected), name
