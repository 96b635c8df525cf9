"""Repetitive texts, where many scores are equal by construction: rounding must not choose."""

from __future__ import annotations

import pytest
import torch
from tiny import ids, kept, llama

import trimkv_kernels as tk
from trimkv_kernels.integrations.discovery import find_parts
from trimkv_kernels.policies import available_policies, example_policy

TEXTS = {"three": [5, 6, 7], "one": [5], "mixed": [5, 6, 5, 7, 5, 8]}


@pytest.mark.parametrize("policy", [name for name in available_policies() if name != "full"])
def test_a_left_padded_row_keeps_what_it_keeps_alone(policy: str) -> None:
    model = llama(num_hidden_layers=2)
    handle = tk.patch(model, example_policy(policy, find_parts(model).shape()), budget=12, buffer=3)
    for repeated in TEXTS.values():
        text = torch.tensor([(repeated * 40)[:37]])
        batch = torch.cat([torch.cat([torch.zeros(1, 11, dtype=torch.long), text], 1), ids(1, 48)])
        mask = (batch > 0).long()
        position = (mask.cumsum(1) - 1).clamp(min=0)
        together, alone = handle.new_cache(), handle.new_cache()
        with torch.no_grad():
            for start, stop in ((0, 42), *((i, i + 1) for i in range(42, 48))):
                model(
                    batch[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=position[:, start:stop],
                    past_key_values=together,
                )
                model(text[:, max(0, start - 11) : stop - 11], past_key_values=alone)
                assert kept(together) == kept(alone)


def test_the_newer_of_equal_keys_stays() -> None:
    """Layer 0's keys of one token have one norm; a worked case of the rule for ties."""
    model = llama(num_hidden_layers=1)
    options = {"budget": 4, "buffer": 2, "sinks": 0, "recent": 0}
    cache = tk.patch(model, "key_norm", **options).new_cache()
    with torch.no_grad():
        model(torch.tensor([[5] * 20]), past_key_values=cache)
    assert kept(cache) == [[16, 17, 18, 19]] * 2
