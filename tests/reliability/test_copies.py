"""Copies, pickles and lifetimes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from tiny import GREEDY, ids, kept, llama

import trimkv_kernels as tk


def test_a_deep_copy_is_patched_and_unpatched_by_itself() -> None:
    model, text = llama(), ids(1, 30)
    stock = model.generate(text, max_new_tokens=6, **GREEDY)
    handle = tk.patch(model, "streaming_llm", budget=8, buffer=2)
    bounded = model.generate(text, max_new_tokens=6, **GREEDY)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(text, max_new_tokens=6, **GREEDY), bounded)
    tk.unpatch(twin)
    assert torch.equal(twin.generate(text, max_new_tokens=6, **GREEDY), stock)
    assert torch.equal(model.generate(text, max_new_tokens=6, **GREEDY), bounded)
    assert handle.stats().tokens_seen == [35]
    other = copy.deepcopy(model)
    with pytest.raises(TypeError, match="one of another patch"):
        other(text, past_key_values=handle.new_cache())
    for name in ("_pre_hooks", "_hooks"):
        assert not getattr(twin.model, f"_forward{name}")


def test_pickles_work_or_say_how() -> None:
    model, text = llama(), ids(1, 12)
    handle = tk.patch(model, "streaming_llm", budget=8, buffer=2)
    for write in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cannot be pickled: call unpatch\(model\) first"):
            write(model)
        with pytest.raises(TypeError, match=r"cannot be pickled.*save\(path\)"):
            write(handle.new_cache())
    with pytest.raises(TypeError, match="would share its slots"):
        copy.copy(handle.new_cache())
    tk.unpatch(model)
    loaded = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, model(text).logits)


def test_a_finished_generate_frees_its_slots_at_once() -> None:
    model, text = llama(), torch.cat([ids(1, 10)] * 2, 1)
    tk.patch(model, "streaming_llm", budget=16, buffer=4)
    gc.collect()
    gc.disable()
    try:
        alive = []
        make = tk.PatchHandle._make_slots

        def spy(self: tk.PatchHandle, *args: object, **options: object) -> object:
            slots = make(self, *args, **options)
            alive.append(weakref.ref(slots))
            return slots

        tk.PatchHandle._make_slots = spy  # type: ignore[assignment, method-assign]
        for options in (
            {},
            {"prompt_lookup_num_tokens": 3, "eos_token_id": 2},  # 4.57 cannot do without an eos
            {"assistant_model": model},
            {"num_beams": 2},
            {"return_dict_in_generate": True},
        ):
            model.generate(text, max_new_tokens=5, **{**GREEDY, **options})
            assert alive
            assert not any(slots() is not None for slots in alive), options
        with torch.no_grad():
            model(text)
        list(tk.decode_loop(model, text, max_new_tokens=4))
        assert not any(slots() is not None for slots in alive)
    finally:
        gc.enable()
        tk.PatchHandle._make_slots = make  # type: ignore[method-assign]


def test_what_was_handed_out_stays() -> None:
    model, text = llama(), ids(1, 30)
    handle = tk.patch(model, "streaming_llm", budget=8, buffer=2)
    cache = handle.new_cache()
    with torch.no_grad():
        output = model(text, past_key_values=cache)
        length, positions, stats = cache.get_seq_length(), cache.positions(0), cache.stats()
        layer_length = cache.layers[0].get_seq_length()
        before = positions.clone(), stats.slots_used.clone(), output.logits.clone()
        for i in range(5):
            model(text[:, i : i + 1], past_key_values=cache)
    assert int(length) == int(layer_length) == 30
    assert stats.tokens_seen == [30]
    for got, want in zip((positions, stats.slots_used, output.logits), before, strict=True):
        assert torch.equal(got, want)
    fork = cache.fork(1)
    was = kept(cache)
    with torch.no_grad():
        model(text, past_key_values=fork)
    assert kept(cache) == was != kept(fork)
