"""Autocast and dtypes: as the stock model, or refused."""

from __future__ import annotations

import pytest
import torch
from tiny import GREEDY, ids, llama

import trimkv_kernels as tk


@pytest.mark.parametrize("policy", ["streaming_llm", "key_norm", "h2o"])
def test_autocast_with_a_full_budget_is_stock(policy: str) -> None:
    model, text = llama(), ids(2, 12)
    call = {"max_new_tokens": 8, **GREEDY}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        stock, logits = model.generate(text, **call), model(text).logits
        handle = tk.patch(model, policy, budget=32, buffer=4)
        cache = handle.new_cache()
        got = model.generate(text, past_key_values=cache, **call)
        # eight bits of mantissa, 48 terms a sum
        torch.testing.assert_close(model(text).logits, logits, rtol=2**-5, atol=2**-3)
    assert cache.slots.dtype == torch.bfloat16
    assert torch.equal(got[:, :14], stock[:, :14])
    assert got.shape == stock.shape


def test_leaving_autocast_needs_another_cache() -> None:
    model, text = llama(), ids(1, 6)
    handle = tk.patch(model, "streaming_llm", budget=32, buffer=4)
    cache = handle.new_cache()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(text, past_key_values=cache)
        with pytest.raises(ValueError, match="must compute in torch.bfloat16.*torch.autocast"):
            model(text, past_key_values=cache)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(text, past_key_values=cache)
    assert cache.stats().tokens_seen == [12]


def test_double_precision_is_refused_at_patch() -> None:
    model = llama().double()
    with pytest.raises(ValueError, match=r"got torch.float64: .* model.float\(\)"):
        tk.patch(model, "streaming_llm")
    assert "forward" not in vars(model.model.layers[0].self_attn)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8() -> None:
    """Its linear layers have no parameters."""
    quantize = torch.ao.quantization.quantize_dynamic
    model, text = quantize(llama(), {torch.nn.Linear}, dtype=torch.qint8), ids(1, 5)
    stock = model.generate(text, max_new_tokens=6, **GREEDY)
    tk.patch(model, "streaming_llm", budget=16, buffer=4)
    assert torch.equal(model.generate(text, max_new_tokens=6, **GREEDY), stock)
