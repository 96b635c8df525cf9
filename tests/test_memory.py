"""What lives at the peak of a prompt: every storage counted, not the allocator."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import trimkv_kernels as tk
from conftest import make_qwen3

BUDGET = 32
SLOTS = {"budget": BUDGET, "buffer": 8, "sinks": 1, "recent": 4, "impl": "torch"}


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operators made and that are still alive; ``peak`` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(x, Tensor)}  # fmt: skip
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return output


def peak_of_a_prompt(
    length: int, *, chunk: int | None, layers: int = 3, policy: str = "random"
) -> int:
    model = make_qwen3(num_hidden_layers=layers)
    ids = torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(0))
    cache = tk.patch(model, policy, **SLOTS).new_cache()
    with torch.no_grad(), LiveBytes() as live:
        for part in ids.split(chunk or length, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
    assert cache.stats().budget_reached
    return live.peak


@pytest.mark.parametrize("policy", ["random", "key_norm", "h2o", "snap_kv"])
def test_a_chunked_prompt_needs_the_same_at_any_length(policy: str) -> None:
    short = peak_of_a_prompt(8 * BUDGET, chunk=32, policy=policy)
    long = peak_of_a_prompt(64 * BUDGET, chunk=32, policy=policy)
    assert long <= 1.01 * short


def test_generate_reads_a_prompt_in_chunks() -> None:
    """All that grows is what generate itself makes of the prompt: numbers per token, not states."""

    def peak(length: int) -> int:
        model = make_qwen3()
        ids = torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(0))
        tk.patch(model, "random", prefill_chunk=32, **SLOTS)
        with LiveBytes() as live:
            model.generate(ids, max_new_tokens=2, do_sample=False)
        return live.peak

    growth = (peak(64 * BUDGET) - peak(8 * BUDGET)) / (56 * BUDGET)
    states = 2 * 2 * 16 * 4  # key and value of one token in one layer
    assert growth < states / 2


def test_of_a_whole_prompt_one_layer_lives_at_a_time() -> None:
    """Twice the layers need more slots, and not one more state of the prompt."""
    length = 16 * BUDGET
    few, many = (peak_of_a_prompt(length, chunk=None, layers=n) for n in (3, 6))
    model = make_qwen3(num_hidden_layers=3)
    cache = tk.patch(model, "random", **SLOTS).new_cache()
    with torch.no_grad():
        model(torch.arange(3, 9)[None], past_key_values=cache)
    slots = sum(x.nbytes for x in cache.slots.storages[0].tensors())
    assert many - few == pytest.approx(slots, rel=0.02)


def test_the_full_cache_does_not_pass() -> None:
    """The same count sees the keys and values of every layer of a stock model."""

    def peak(layers: int) -> int:
        model = make_qwen3(num_hidden_layers=layers)
        ids = torch.randint(3, 96, (1, 16 * BUDGET), generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), LiveBytes() as live:
            model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        return live.peak

    prompt_states = 2 * 2 * 16 * BUDGET * 16 * 4  # of one layer
    assert peak(6) - peak(3) >= 3 * prompt_states
