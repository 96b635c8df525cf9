"""Rows that come and go: what a row computes does not depend on the other rows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import test_models as models
import trimkv_kernels as tk
import vision
from test_patch import BUDGET, batch, policy, trimkv
from trimkv_kernels.integrations import BoundedCache
from trimkv_kernels.integrations.rows_cache import RowsCache

# affine, trained, summed up by attention, observed, a window of queries, moments, recomputed
KINDS = ["streaming_llm", "trimkv", "h2o", "scissorhands", "snap_kv"]
KINDS += ["expected_attention", "lag_kv"]
PROMPTS = (11, 40, 7, 23)  # tokens; the second is cut at once


def patched(name: str, model: Qwen3ForCausalLM) -> tk.PatchHandle:
    if name != "shared":
        return tk.patch(model, policy(name, model), **BUDGET)
    return tk.patch(model, trimkv(model), allocation=tk.GlobalTopK(min_per_head=8), **BUDGET)


def prompt(number: int) -> Tensor:
    return batch((0,), PROMPTS[number], seed=number)[0]


def kept(cache: BoundedCache, row: int) -> list[list[list[int]]]:
    """The positions that a row holds, by layer and head."""
    heads = [cache.positions(layer)[row].sort(-1).values for layer in range(3)]
    return [[head[head >= 0].tolist() for head in layer] for layer in heads]


def alone(model: Qwen3ForCausalLM, handle: tk.PatchHandle, ids: Tensor, new: int) -> tuple:
    """The tokens of a request that has the model to itself, and what it kept."""
    cache = handle.new_cache()
    options = {"past_key_values": cache, "eos_token_id": (), "max_new_tokens": new}
    tokens = [int(token) for token in tk.decode_loop(model, ids, **options)]
    return tokens, kept(cache, 0)


@torch.no_grad()
def read(model: Qwen3ForCausalLM, handle: tk.PatchHandle, ids: Tensor) -> tuple[BoundedCache, int]:
    """A cache of one row that has read a prompt, and the token that follows."""
    cache = handle.new_cache()
    return cache, int(model(ids, past_key_values=cache).logits[0, -1].argmax())


@torch.no_grad()
def step(model: Qwen3ForCausalLM, cache: RowsCache, tokens: dict[int, int]) -> Tensor:
    """One token for some of the rows; the logits of all, ``[rows, vocabulary]``."""
    rows = cache.slots.batch_size
    ids, mask = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, 1, dtype=torch.long)
    for row, token in tokens.items():
        ids[row], mask[row] = token, 1
    return model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]


def serve(
    model: Qwen3ForCausalLM,
    handle: tk.PatchHandle,
    cache: RowsCache,
    new: list[int],
    start: list[int],
) -> dict[int, tuple]:
    """Four requests over the rows of ``cache``: each enters a free row after its step."""
    rows: list[int | None] = [None] * cache.slots.batch_size
    made: dict[int, list[int]] = {}
    done: dict[int, tuple] = {}
    steps = 0
    while len(done) < len(new):
        for number in range(len(new)):
            if number not in made and start[number] <= steps and None in rows:
                row = rows.index(None)
                source, token = read(model, handle, prompt(number))
                cache.put(row, source)
                rows[row], made[number] = number, [token]
        tokens = {row: made[number][-1] for row, number in enumerate(rows) if number is not None}
        logits = step(model, cache, tokens)
        steps += 1
        for row in tokens:
            number = rows[row]
            made[number].append(int(logits[row].argmax()))
            if len(made[number]) == new[number]:
                done[number] = made[number], kept(cache, row)
                cache.reset([row])
                rows[row] = None
    return done


@pytest.mark.parametrize("name", [*KINDS, "shared"])
def test_requests_over_rows_are_what_each_is_alone(name: str, qwen3: Qwen3ForCausalLM) -> None:
    handle = patched(name, qwen3)
    new = [50, 20, 33, 12]
    served = serve(qwen3, handle, handle.new_cache(rows=2), new, start=[0, 4, 9, 30])
    for number, count in enumerate(new):
        assert served[number] == alone(qwen3, handle, prompt(number), count)


@pytest.mark.parametrize("name", ["trimkv", "h2o", "snap_kv", "key_norm", "shared"])
def test_neighbours_do_not_change_a_bit(name: str, qwen3: Qwen3ForCausalLM) -> None:
    handle = patched(name, qwen3)
    runs = []
    for neighbours in ({}, {0: 1}, {0: 1, 2: 3}):  # free, evicting at once, evicting later
        cache = handle.new_cache(rows=3)
        tokens = {}
        for row, number in {1: 0, **neighbours}.items():
            source, tokens[row] = read(qwen3, handle, prompt(number))
            cache.put(row, source)
        runs.append([])
        for count in range(30):  # the first request evicts three times
            if count == 12:  # a neighbour leaves, and another prompt comes in its place
                cache.reset([0])
                tokens.pop(0, None)
                if neighbours:
                    read_into(qwen3, cache, {0: prompt(2)})
            logits = step(qwen3, cache, tokens)
            tokens |= {row: int(logits[row].argmax()) for row in tokens}
            runs[-1].append(logits[1])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@torch.no_grad()
def read_into(model: Qwen3ForCausalLM, cache: RowsCache, prompts: dict[int, Tensor]) -> Tensor:
    """Read prompts straight into rows, in one call that leaves the others as they are."""
    rows, length = cache.slots.batch_size, max(ids.shape[1] for ids in prompts.values())
    ids = torch.zeros(rows, length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in prompts.items():
        ids[row, length - own.shape[1] :], mask[row, length - own.shape[1] :] = own[0], 1
    return model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("name", [*KINDS, "shared"])
def test_prompts_are_read_into_rows_of_a_running_batch(name: str, qwen3: Qwen3ForCausalLM) -> None:
    handle = patched(name, qwen3)
    cache = handle.new_cache(rows=4)
    tokens = {3: int(read_into(qwen3, cache, {3: prompt(1)})[3].argmax())}
    made = {3: [tokens[3]]}
    for count in range(30):
        if count == 5:  # two more, left-padded to one length, while a row runs and one is free
            logits = read_into(qwen3, cache, {0: prompt(0), 2: prompt(3)})
            tokens |= {row: int(logits[row].argmax()) for row in (0, 2)}
            made |= {row: [tokens[row]] for row in (0, 2)}
        logits = step(qwen3, cache, tokens)
        tokens = {row: int(logits[row].argmax()) for row in tokens}
        for row, token in tokens.items():
            made[row].append(token)
    for row, number in {3: 1, 0: 0, 2: 3}.items():
        expected = alone(qwen3, handle, prompt(number), len(made[row]))
        assert (made[row], kept(cache, row)) == expected
    assert cache.slots.t[1] == 0
    assert (cache.positions(0)[1] == -1).all()


def test_a_row_takes_pins_and_figures_with_it(qwen3: Qwen3ForCausalLM) -> None:
    handle = patched("trimkv", qwen3)
    cache = handle.new_cache(rows=2)
    address = cache.slots.keys(0).data_ptr()
    source = handle.new_cache()
    source.pin([[(9, 12)]])
    with torch.no_grad():
        qwen3(prompt(1), past_key_values=source)
    cache.put(1, source)
    tokens = {1: 5}
    for _ in range(20):
        logits = step(qwen3, cache, tokens)
        tokens = {1: int(logits[1].argmax())}
    for layer in kept(cache, 1):
        assert all({9, 10, 11} <= set(head) for head in layer)
    stats = cache.stats()
    assert stats.tokens_seen == [0, 60]
    assert cache.slots.keys(0).data_ptr() == address
    cache.reset([1])
    other, _ = read(qwen3, handle, prompt(1))
    cache.put(1, other)  # without pins
    assert kept(cache, 1) == kept(other, 0)
    assert not all({9, 10, 11} <= set(head) for layer in kept(cache, 1) for head in layer)


def test_generate_takes_rows_as_any_cache(qwen3: Qwen3ForCausalLM) -> None:
    handle = patched("trimkv", qwen3)
    ids, mask = batch((5, 0), 20)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30}
    expected = qwen3.generate(ids, **options)
    cache = handle.new_cache(rows=2)
    assert torch.equal(qwen3.generate(ids, past_key_values=cache, **options), expected)
    source, _ = read(qwen3, handle, prompt(0))
    cache.put(0, source)  # the rows are of different lengths now
    with pytest.raises(ValueError, match="attention_mask must be the same as before"):
        qwen3.generate(expected.repeat(1, 2), past_key_values=cache, max_new_tokens=3)


def test_put_refuses_what_does_not_fit(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    handle = patched("trimkv", qwen3)
    cache = handle.new_cache(rows=2)
    source, _ = read(qwen3, handle, prompt(0))
    for row in (-1, 2):
        with pytest.raises(ValueError, match=rf"row must lie in \[0, 2\), got {row}"):
            cache.put(row, source)
    with pytest.raises(ValueError, match="source must be a cache of one row, got 2 rows"):
        cache.put(0, handle.new_cache(rows=2))
    with pytest.raises(RuntimeError, match=r"put\(\) of an unused cache"):
        cache.put(0, handle.new_cache())
    foreign = tk.patch(stock, "random", **BUDGET)
    with pytest.raises(TypeError, match="source must be a cache from this model's"):
        cache.put(0, read(stock, foreign, prompt(0))[0])
    with pytest.raises(ValueError, match=r"source must have the buffer of this cache, 6, got 5"):
        cache.slots.put(0, slots(buffer=5))
    with pytest.raises(ValueError, match=r"source must have the policy trimkv-\w+, got stream"):
        cache.slots.put(0, slots())
    source.activate_past_recording()
    with torch.no_grad():
        qwen3(torch.tensor([[5]]), past_key_values=source)
    with pytest.raises(ValueError, match=r"put\(\) must not meet unconfirmed tokens"):
        cache.put(0, source)
    assert cache.is_empty
    for rows in (0, True):
        with pytest.raises(ValueError, match="rows must be an int of at least 1"):
            handle.new_cache(rows=rows)


def slots(**changes: Any) -> tk.BoundedKVCache:
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "batch_size": 1}
    options = {**sizes, **BUDGET, "dtype": torch.float32, "device": "cpu", **changes}
    return tk.BoundedKVCache(tk.policies.make_policy("streaming_llm"), **options)


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (models.make, "Gemma 3", "with sliding-window layers"),
        (vision.make, "Qwen2-VL", "that reads images"),
    ],
)
def test_models_whose_rows_cannot_come_and_go_are_refused(
    make: Any, name: str, reason: str
) -> None:
    handle = tk.patch(make(name), "random", **BUDGET)
    with pytest.raises(ValueError, match=f"rows must be None for a model {reason}"):
        handle.new_cache(rows=2)
