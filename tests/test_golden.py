"""Parity with trimkv 0.1.5: kept positions exactly, logits within 1e-4, on both backends."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trimkv_kernels as tk
from conftest import GOLDEN

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    ("case", "impl"),
    [
        ("rg/per_step", "torch"),
        ("rg/buffered", "torch"),
        ("rg/short_prompt", "torch"),
        ("rg10/global", "torch"),
        ("rg/short_prompt", "triton"),
        pytest.param("rg/per_step", "triton", marks=pytest.mark.slow),
        pytest.param("rg/buffered", "triton", marks=pytest.mark.slow),
    ],
)
def test_golden(case: str, impl: str, device: str) -> None:
    """The gates of ``rg10`` choose the shared budget by themselves."""
    kind = case.split("/")[0]
    facts = json.loads(Path(GOLDEN, f"{case}.json").read_text())
    golden = load_file(GOLDEN / f"{case}.safetensors")
    model = tk.from_pretrained(
        GOLDEN / kind / "gates", budget=facts["memory_size"], buffer=facts["buffer_size"]
    ).to(device)
    policy = tk.TrimKV.from_pretrained(GOLDEN / kind / "gates")
    tk.unpatch(model)
    handle = tk.patch(
        model, policy, budget=facts["memory_size"], buffer=facts["buffer_size"], impl=impl
    )
    cache = handle.new_cache()
    prompt, steps = facts["prompt_len"], facts["steps"]
    calls = golden["tokens"].to(device).split([prompt, *[1] * steps], dim=1)
    for step, tokens in enumerate(calls):
        with torch.no_grad():
            logits = model(tokens, past_key_values=cache).logits[0, -1].cpu()
        torch.testing.assert_close(logits, golden["logits"][step], atol=1e-4, rtol=0)
        for layer in range(model.config.num_hidden_layers):
            kept = sorted_positions(cache.positions(layer)[0].cpu())
            assert kept == sorted_positions(golden["kept_positions"][step, layer]), (step, layer)


def sorted_positions(position: torch.Tensor) -> list[list[int]]:
    return [sorted(p for p in head if p >= 0) for head in position.tolist()]


def test_from_pretrained_loads_base_gates_and_budget() -> None:
    model = tk.from_pretrained(GOLDEN / "rg" / "gates")
    stock = AutoModelForCausalLM.from_pretrained(GOLDEN / "rg" / "base")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True)
    )
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 7)
    tk.unpatch(model)
