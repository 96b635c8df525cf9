"""Packed weights: the same parameters and values, laid out otherwise, and put back."""

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

import trimkv_kernels as tk
from conftest import make_qwen3
from test_patch import BUDGET, batch, trimkv
from trimkv_kernels.integrations import weights
from trimkv_kernels.integrations.discovery import find_parts
from trimkv_kernels.integrations.weights import side_by_side
from trimkv_kernels.policies import make_policy

ATTENTION, MLP = weights.SAME_INPUT
packed = functools.partial(tk.patch, pack_weights=True)


@pytest.fixture(
    params=[
        "row",
        pytest.param("column", marks=pytest.mark.skipif(
            not torch.backends.mkl.is_available(), reason="needs MKL"
        )),
    ],
    autouse=True,
)  # fmt: skip
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small weights lie by column too, or none do, as on a GPU."""
    monkeypatch.setattr(weights, "MIN_WEIGHTS", 1 if request.param == "column" else 2**62)
    return request.param


def packs(model: nn.Module) -> list[list[nn.Linear]]:
    """Layers that read the same input."""
    return [
        [getattr(part, name) for name in names]
        for part in model.modules()
        for names in weights.SAME_INPUT
        if hasattr(part, names[0])
    ]


def together(model: nn.Module) -> list[bool]:
    return [side_by_side([layer.weight for layer in pack]) is not None for pack in packs(model)]


def is_plain(model: nn.Module) -> bool:
    """Whether every parameter lies alone, by row."""
    return all(
        x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes for x in model.parameters()
    )


@torch.no_grad()
def logits(model: nn.Module, cache: object = None) -> Tensor:
    ids, _ = batch((0,), 40)
    calls = ids.split([30, *[1] * 10], dim=1)
    if cache is None:
        return model(ids, use_cache=False).logits
    return torch.cat([model(x, past_key_values=cache).logits for x in calls], dim=1)


def assert_close(got: Tensor, expected: Tensor) -> None:
    # a sum of 96 products in another order, in each of 3 layers
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_parameters_stay_and_are_put_back(
    layout: str, qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    before, expected = dict(qwen3.named_parameters()), logits(stock)
    handle = packed(qwen3, "full", budget=40)
    assert all(together(qwen3))
    assert qwen3.model.layers[0].mlp.up_proj.weight.is_contiguous() == (layout == "row")
    # no copy beside them
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in qwen3.parameters()}
    assert sum(x.nbytes() for x in storages.values()) == sum(x.nbytes for x in stock.parameters())
    for name, parameter in qwen3.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, stock.get_parameter(name))
    assert_close(logits(qwen3, handle.new_cache()), expected)
    handle.unpatch()
    assert is_plain(qwen3)
    assert not any("forward" in part.__dict__ for part in qwen3.modules())
    assert not any(part._state_dict_hooks for part in qwen3.modules())
    assert torch.equal(logits(qwen3), expected)


def test_layers_with_one_input_are_one_product(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = packed(qwen3, trimkv(qwen3), **BUDGET)
    cache, calls, linear = handle.new_cache(), [], torch.nn.functional.linear
    logits(qwen3, cache)

    def counting(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(weight.shape)
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    with torch.no_grad():
        qwen3(torch.tensor([[5]]), past_key_values=cache)
    layers, gate = len(qwen3.model.layers), handle.policy.gates.layers[0].linear1.weight
    attention, mlp = qwen3.model.layers[0].self_attn, qwen3.model.layers[0].mlp
    queries = sum(len(getattr(attention, name).weight) for name in ATTENTION) + len(gate)
    ups = sum(len(getattr(mlp, name).weight) for name in MLP)
    assert [shape for shape in calls if len(shape) == 2].count((queries, 64)) == layers
    assert calls.count((ups, 64)) == layers
    # with o, down, and the gate's second layer
    assert len(calls) == 5 * layers + 1
    assert all(pack._pending is None for pack in handle._packs)  # no activation is held


def test_gates_lie_with_queries_and_are_put_back(qwen3: Qwen3ForCausalLM) -> None:
    gates = trimkv(qwen3).gates
    before = {name: x.clone() for name, x in gates.named_parameters()}
    plain = tk.patch(qwen3, make_policy("trimkv", gates=gates), **BUDGET)
    expected = logits(qwen3, plain.new_cache())
    plain.unpatch()
    with packed(qwen3, make_policy("trimkv", gates=gates), **BUDGET) as handle:
        attention = qwen3.model.layers[1].self_attn
        four = [*(getattr(attention, name) for name in ATTENTION), gates.layers[1].linear1]
        assert side_by_side([layer.weight for layer in four]) is not None
        assert_close(logits(qwen3, handle.new_cache()), expected)
        twin = make_qwen3()  # with the same gates, which lie with the first model's queries
        with packed(twin, make_policy("trimkv", gates=gates), **BUDGET) as other:
            assert_close(logits(twin, other.new_cache()), expected)
    assert is_plain(gates)
    assert all(torch.equal(x, before[name]) for name, x in gates.named_parameters())


def test_without_it_nothing_is_touched(qwen3: Qwen3ForCausalLM) -> None:
    addresses = [x.data_ptr() for x in qwen3.parameters()]
    tk.patch(qwen3, **BUDGET)
    assert [x.data_ptr() for x in qwen3.parameters()] == addresses
    assert not any(together(qwen3))


def test_biases_stay_apart() -> None:
    model = make_qwen3(attention_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias)
    expected = logits(model)
    with packed(model, "full", budget=40) as handle:
        assert all(together(model))
        assert_close(logits(model, handle.new_cache()), expected)


def test_a_file_is_what_it_was(
    tmp_path: Path, qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    def check(model: PreTrainedModel) -> None:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, stock.get_parameter(name))

    packed(qwen3, **BUDGET)
    qwen3.save_pretrained(tmp_path / "packed")
    stock.save_pretrained(tmp_path / "stock")
    sizes = [(tmp_path / x / "model.safetensors").stat().st_size for x in ("packed", "stock")]
    assert sizes[0] == sizes[1]
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "packed")
    check(loaded)
    with packed(loaded, **BUDGET):  # as it comes from a file
        assert all(together(loaded))
    check(loaded)
    state = qwen3.state_dict()
    torch.save(state, tmp_path / "state.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "state.safetensors")
    for saved in (torch.load(tmp_path / "state.pt"), load_file(tmp_path / "state.safetensors")):
        assert all(torch.equal(x, stock.state_dict()[name]) for name, x in saved.items())


def test_copies_and_loading(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    packed(qwen3, "full", budget=40)
    twin = copy.deepcopy(qwen3)
    doubled = {name: 1.5 * x for name, x in stock.state_dict().items()}
    twin.load_state_dict(doubled)
    stock.load_state_dict(doubled)
    handle = next(x for x in twin.model.__dict__.values() if isinstance(x, tk.PatchHandle))
    assert_close(logits(twin, handle.new_cache()), logits(stock))
    assert all(together(twin))
    tk.unpatch(twin)
    assert is_plain(twin)
    assert all(torch.equal(x, doubled[name]) for name, x in twin.named_parameters())
    assert all(together(qwen3))  # the copy's undo was its own
    assert not any(part._state_dict_hooks for part in twin.modules())


def merged(model: nn.Module) -> None:
    """As PEFT does when it merges an adapter with care: a new tensor in the same parameter."""
    weight = model.model.layers[1].self_attn.k_proj.weight
    weight.data = weight.data + 1


def in_place(model: nn.Module) -> None:
    model.model.layers[1].self_attn.k_proj.weight.data += 1


def replaced(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    torch.manual_seed(1)
    mlp.gate_proj.weight = nn.Parameter(torch.randn(mlp.gate_proj.weight.shape))


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()}, assign=True)


def converted(model: nn.Module) -> None:
    model.double().float()


CHANGES = (merged, in_place, replaced, assigned, converted)


@pytest.mark.parametrize("change", CHANGES, ids=[x.__name__ for x in CHANGES])
def test_weights_that_change_are_read_as_they_are(
    change: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    qwen3, stock = make_qwen3(), make_qwen3()
    handle = packed(qwen3, "full", budget=40)
    cache = handle.new_cache()
    change(qwen3)
    change(stock)
    expected = logits(stock)
    assert_close(logits(qwen3, cache), expected)
    caplog.set_level("INFO", "trimkv_kernels")
    again = handle.new_cache()
    assert all(together(qwen3))
    assert ("again" in caplog.text) == (change is not in_place)
    assert_close(logits(qwen3, again), expected)
    handle.unpatch()
    assert is_plain(qwen3)
    assert torch.equal(logits(qwen3), expected)


def test_a_compiled_step_reads_them_as_they_are() -> None:
    qwen3, stock = make_qwen3(), make_qwen3()
    torch._dynamo.reset()
    handle = packed(qwen3, trimkv(qwen3), impl="torch", budget=40)
    step = torch.compile(qwen3, backend="aot_eager", fullgraph=True)
    ids, cache = torch.randint(3, 96, (1, 24)), handle.new_cache()
    with torch.no_grad():
        qwen3(ids[:, :20], past_key_values=cache)
        for i in range(20, 24):
            if i == 22:  # between two steps
                merged(qwen3)
                merged(stock)
            got = step(
                ids[:, i : i + 1],
                past_key_values=cache,
                position_ids=torch.tensor([[i]]),
                cache_position=torch.tensor([i]),  # what transformers 5.0 would derive
            )
            if i < 22:
                assert_close(got.logits[:, -1], stock(ids[:, : i + 1]).logits[:, -1])
    assert all(pack._pending is None for pack in handle._packs)
    # the stock model with the same change, on the pairs that came before it
    unpacked = make_qwen3()
    with tk.patch(unpacked, trimkv(unpacked), impl="torch", budget=40) as plain, torch.no_grad():
        cache = plain.new_cache()
        unpacked(ids[:, :22], past_key_values=cache)
        merged(unpacked)
        expected = unpacked(ids[:, 22:], past_key_values=cache).logits[:, -1]
    assert_close(got.logits[:, -1], expected)


def test_two_models_may_share_packed_weights(qwen3: Qwen3ForCausalLM) -> None:
    twin, expected = copy.deepcopy(qwen3), logits(qwen3)
    for name, parameter in qwen3.named_parameters():
        module, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(module), attribute, parameter)
    first, second = (packed(model, "full", budget=40) for model in (qwen3, twin))
    assert len(first._packs) == len(second._packs)
    for handle in (first, second):
        assert_close(logits(qwen3, first.new_cache()), expected)
        assert_close(logits(twin, second.new_cache()), expected)
        if handle is first:
            first.unpatch()
            assert_close(logits(twin, second.new_cache()), expected)
            first = packed(qwen3, "full", budget=40)
    second.unpatch()
    first.unpatch()
    assert is_plain(qwen3)
    assert torch.equal(logits(twin), expected)


def test_a_replaced_layer_is_not_undone(qwen3: Qwen3ForCausalLM) -> None:
    handle = packed(qwen3, **BUDGET)
    mlp = qwen3.model.layers[0].mlp
    own = mlp.up_proj = nn.Linear(64, 96, bias=False)
    logits(qwen3, handle.new_cache())
    handle.unpatch()
    assert mlp.up_proj is own
    assert is_plain(qwen3)


def test_gradients_are_those_of_the_stock_model(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    packed(qwen3, **BUDGET)
    ids, _ = batch((0,), 20)
    for model in (qwen3, stock):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in qwen3.named_parameters():
        grad = stock.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)


def test_autocast_is_that_of_the_stock_model(qwen3: Qwen3ForCausalLM) -> None:
    def run(**options: object) -> Tensor:
        patched = tk.patch(qwen3, "full", budget=40, **options)
        with patched as handle, torch.autocast("cpu", torch.bfloat16):
            return logits(qwen3, handle.new_cache())

    torch.testing.assert_close(run(pack_weights=True), run(), atol=0.05, rtol=0.05)


class Adapted(nn.Linear):
    """As an adapter or a quantised layer: not a plain linear layer."""


def test_what_is_left_alone(qwen3: Qwen3ForCausalLM) -> None:
    qwen3.lm_head.to("meta")
    first, second, third = qwen3.model.layers
    for layer in qwen3.model.layers:
        layer.self_attn.k_proj = Adapted(64, 32, bias=False)
        layer.self_attn.q_proj.to("meta")
    first.mlp.gate_proj = Adapted(64, 96, bias=False)
    first.mlp.up_proj.to("meta")
    whole = torch.randn(2, 96, 64)
    second.mlp.up_proj.weight, second.mlp.gate_proj.weight = map(nn.Parameter, whole)
    third.mlp.gate_proj.to("meta")
    with torch.inference_mode():
        third.mlp.up_proj = nn.Linear(64, 96, bias=False)
    assert weights.packed_layers(find_parts(qwen3), make_policy("streaming_llm")) == []


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_layers_may_be_called_in_any_order(order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, size) for size in (12, 4, 4)]
    states = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = [layer(states) for layer in layers]
        patch = weights.InstancePatch()
        weights.PackedLayers(layers).install(patch)
        for i in (*order, *order, order[0], order[0], *order):
            torch.testing.assert_close(layers[i](states), expected[i])
            torch.testing.assert_close(layers[i](states + 1), layers[i](states.clone() + 1))
        states += 1
        torch.testing.assert_close(
            layers[order[0]](states), expected[order[0]] + layers[order[0]].weight.sum(1)
        )
        patch.restore()
