"""Weights by column: the same parameters and values, laid out otherwise, and put back."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

import trimkv_kernels as tk
from test_patch import BUDGET, batch
from trimkv_kernels.integrations import weights

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
WIDE = ("gate_proj.weight", "up_proj.weight")  # 96 x 64 in the tiny model; the others are not wide


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MIN_WEIGHTS", 1)


def by_column(model: nn.Module) -> list[str]:
    return [name for name, x in model.named_parameters() if not x.is_contiguous()]


def wide(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith(WIDE)]


@torch.no_grad()
def logits(model: nn.Module, cache: object = None) -> Tensor:
    ids, _ = batch((0,), 40)
    calls = ids.split([30, *[1] * 10], dim=1)
    if cache is None:
        return model(ids, use_cache=False).logits
    return torch.cat([model(x, past_key_values=cache).logits for x in calls], dim=1)


def test_parameters_stay_and_are_put_back(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    before, expected = dict(qwen3.named_parameters()), logits(stock)
    handle = tk.patch(qwen3, "full", budget=40, weights_by_column=True)
    assert by_column(qwen3) == wide(qwen3)
    for name, parameter in qwen3.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, stock.get_parameter(name))
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # no copy beside it
    got = logits(qwen3, handle.new_cache())
    # a sum of 96 products in another order, in each of 3 layers
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    handle.unpatch()
    assert by_column(qwen3) == []
    assert torch.equal(logits(qwen3), expected)


def test_without_it_nothing_is_touched(qwen3: Qwen3ForCausalLM) -> None:
    addresses = [x.data_ptr() for x in qwen3.parameters()]
    tk.patch(qwen3, **BUDGET)
    assert [x.data_ptr() for x in qwen3.parameters()] == addresses
    assert by_column(qwen3) == []


def test_a_file_is_what_it_was(
    tmp_path: Path, qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    tk.patch(qwen3, weights_by_column=True, **BUDGET)
    qwen3.save_pretrained(tmp_path)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert by_column(loaded) == []
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, stock.get_parameter(name))
    with tk.patch(loaded, weights_by_column=True, **BUDGET):  # as it comes from a file
        assert by_column(loaded) == wide(loaded)
    torch.save(qwen3.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(x, stock.state_dict()[name]) for name, x in state.items())


def test_copies_conversions_and_loading(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, weights_by_column=True, **BUDGET)
    twin = copy.deepcopy(qwen3)
    doubled = {name: 2 * x for name, x in stock.state_dict().items()}
    twin.load_state_dict(doubled)
    assert by_column(twin) == wide(twin)
    assert all(torch.equal(x, doubled[name]) for name, x in twin.named_parameters())
    assert all(torch.equal(x, stock.get_parameter(name)) for name, x in qwen3.named_parameters())
    twin.double().float()
    tk.unpatch(twin)
    assert by_column(twin) == []
    assert all(torch.equal(x, doubled[name]) for name, x in twin.named_parameters())
    assert by_column(qwen3) == wide(qwen3)  # the copy's undo was its own


def test_a_replaced_weight_is_not_undone(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, weights_by_column=True, **BUDGET)
    mlp = qwen3.model.layers[0].mlp
    mlp.up_proj = nn.Linear(64, 96, bias=False)
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight.detach().contiguous())
    kept = mlp.gate_proj.weight.data_ptr()
    handle.unpatch()
    assert by_column(qwen3) == []
    assert mlp.gate_proj.weight.data_ptr() == kept


def test_gradients_are_those_of_the_stock_model(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    tk.patch(qwen3, weights_by_column=True, **BUDGET)
    ids, _ = batch((0,), 20)
    for model in (qwen3, stock):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in qwen3.named_parameters():
        grad = stock.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)


class Adapted(nn.Linear):
    """As an adapter or a quantised layer: not a plain linear layer."""


def test_what_is_left_alone(qwen3: Qwen3ForCausalLM) -> None:
    first, second, third = (layer.mlp for layer in qwen3.model.layers)
    first.gate_proj = Adapted(64, 96, bias=False)
    first.up_proj.bfloat16()
    whole = torch.randn(2, 96, 64)
    second.gate_proj.weight, second.up_proj.weight = map(nn.Parameter, whole)  # one storage
    third.gate_proj.to("meta")
    with torch.inference_mode():
        third.up_proj = nn.Linear(64, 96, bias=False)
    patch = weights.InstancePatch()
    assert weights.lay_out_by_column(qwen3.model, patch) == 0
    assert patch.is_empty


def test_small_weights_stay(qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MIN_WEIGHTS", 96 * 64 + 1)
    tk.patch(qwen3, weights_by_column=True, **BUDGET)
    assert by_column(qwen3) == []
