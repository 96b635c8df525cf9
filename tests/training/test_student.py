"""Teacher and student in one model: against stock forwards, documents apart, and traces left."""

import copy
import math
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

import trimkv_kernels as tk
from conftest import make_qwen3
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.training import GateModel, capacity_loss
from trimkv_kernels.training.packing import Packing


def make_gates(bias: float = 2.0, **changes: Any) -> RetentionGates:
    """Gates whose betas are spread out."""
    torch.manual_seed(1)
    options = {"kind": "rg", "hidden_size": 64, "intermediate_size": 16, "num_layers": 3,
               "num_kv_heads": 2, "bias_init": bias, **changes}  # fmt: skip
    gates = RetentionGates(GateConfig(**options))
    with torch.no_grad():
        for gate in gates.layers:
            gate.linear1.weight.mul_(20)
            gate.linear2.weight.mul_(20)
    return gates


def make_model(qwen3: Qwen3ForCausalLM, bias: float = 2.0, **options: Any) -> GateModel:
    model = GateModel(qwen3, make_gates(bias), **{"budget": 4, **options})
    return model.train()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def grads(model: GateModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.gates.parameters())))


def stock_student(model: Qwen3ForCausalLM, gates: RetentionGates, ids: Tensor) -> Tensor:
    """Logits of one document under retention-gated attention, through a 4-D mask per layer.

    Every KV head has its own mask, so the eager attention of transformers is given one of
    ``[1, num_heads, seq, seq]``, layer by layer.
    """
    age = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    hooks = []

    def mask(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        log_beta = gates(layer, kwargs["hidden_states"])
        bias = (log_beta[:, :, None, :] * age).masked_fill(age < 0, -math.inf)
        kwargs["attention_mask"] = bias.repeat_interleave(2, dim=1)
        return args, kwargs

    model.config._attn_implementation = "eager"
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        hooks.append(
            attention.register_forward_pre_hook(
                lambda *a, index=index: mask(index, *a), with_kwargs=True
            )
        )
    logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


def test_losses_and_gradients_against_stock_attention(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    """The student's fading attention as a mask of transformers' eager attention."""
    model = make_model(qwen3, base_loss="fwkl_rvkl_ntp", capacity_weight=0.7)
    ids = tokens(1, 20)
    with model.attached():
        outputs = model(ids)
        found = grads(model, outputs["loss"])

    gates = make_gates()
    teacher = stock(ids).logits[0, :-1].log_softmax(-1)
    student = stock_student(stock, gates, ids)[0, :-1].log_softmax(-1)
    base = (
        F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        + F.kl_div(teacher, student, log_target=True, reduction="batchmean")
        + F.nll_loss(student, ids[0, 1:])
    ) / 3
    torch.testing.assert_close(outputs["base_loss"], base, rtol=2e-5, atol=0)
    capacity = capacity_loss(outputs["log_beta"], budget=4)
    torch.testing.assert_close(outputs["capacity_loss"], capacity, rtol=1e-6, atol=0)
    # capacity's own gradient is tested elsewhere: take it out
    expected = torch.autograd.grad(base, list(gates.parameters()))
    with model.attached():
        model.capacity_weight = 0.0
        found = grads(model, model(ids)["loss"])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-3, atol=1e-5)


def test_gates_that_forget_nothing_are_the_teacher(qwen3: Qwen3ForCausalLM) -> None:
    model = make_model(qwen3, bias=100.0, base_loss="fwkl_rvkl")
    with model.attached():
        outputs = model(tokens(2, 16))
    assert outputs["fwkl"].abs() < 1e-6
    assert outputs["rvkl"].abs() < 1e-6


def test_dropout_is_off() -> None:
    model = make_model(make_qwen3(attention_dropout=0.5), bias=100.0, base_loss="fwkl")
    with model.attached():
        assert model.train()(tokens(2, 16))["fwkl"].abs() < 1e-6


def packed_and_padded() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch of four rows, and its five documents alone."""
    ids = tokens(4, 24)
    labels = ids.clone()
    labels[:, ::3] = -100
    position_ids = torch.arange(24).repeat(4, 1)
    mask = torch.ones(4, 24, dtype=torch.int64)
    position_ids[1, 10:] -= 10
    mask[2, :7], mask[3, 18:] = 0, 0
    position_ids[2] = (torch.arange(24) - 7).clamp(min=1)  # transformers numbers left pads 1
    position_ids[2, 7:] = torch.arange(17)
    places = [(0, 0, 24), (1, 0, 10), (1, 10, 24), (2, 7, 24), (3, 0, 18)]
    alone = [{"input_ids": ids[r : r + 1, a:b], "labels": labels[r : r + 1, a:b]}
             for r, a, b in places]  # fmt: skip
    batch = {"input_ids": ids, "labels": labels, "position_ids": position_ids,
             "attention_mask": mask}  # fmt: skip
    return batch, alone


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_and_padded_batch_equals_its_documents(
    qwen3: Qwen3ForCausalLM, implementation: str
) -> None:
    qwen3.set_attn_implementation(implementation)
    model = make_model(qwen3, capacity_weight=0.0)
    batch, alone = packed_and_padded()
    with model.attached():
        outputs = model(**batch)
        found = grads(model, outputs["loss"])
        total, count, log_beta = torch.zeros(()), 0, []
        for document in alone:
            one = model(**document)
            number = int((document["labels"][:, 1:] != -100).sum())
            total, count = total + number * one["loss"], count + number
            log_beta.append(one["log_beta"])
        expected = grads(model, total / count)
    torch.testing.assert_close(outputs["loss"], total / count, rtol=1e-5, atol=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(outputs["log_beta"][1:2, ..., 10:], log_beta[2])
    torch.testing.assert_close(outputs["log_beta"][2:3, ..., 7:], log_beta[3])


def test_capacity_of_padded_batch_ignores_padding(qwen3: Qwen3ForCausalLM) -> None:
    model = make_model(qwen3, budget=2)
    batch, _ = packed_and_padded()
    with model.attached(), torch.no_grad():
        outputs = model(**batch)
        other = batch["input_ids"].clone()
        other[2, :7] = 5
        other[3, 18:] = 6
        changed = model(**{**batch, "input_ids": other})
    assert outputs["capacity_loss"] > 0
    torch.testing.assert_close(outputs["capacity_loss"], changed["capacity_loss"], rtol=0, atol=0)
    torch.testing.assert_close(outputs["base_loss"], changed["base_loss"], rtol=1e-6, atol=0)


def test_teacher_in_one_row_is_the_same(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How packed batches reach FlashAttention, run here on SDPA."""
    model = make_model(qwen3)
    batch, _ = packed_and_padded()
    packing = Packing.of(
        (4, 24),
        batch["input_ids"].device,
        position_ids=batch["position_ids"],
        valid=batch["attention_mask"],
    )
    text = {"input_ids": batch["input_ids"], "position_ids": packing.position}
    expected = model._teacher(text, packing)
    called: list[torch.Size] = []
    qwen3.model.register_forward_pre_hook(
        lambda _, args, kwargs: called.append(kwargs["input_ids"].shape), with_kwargs=True
    )

    class Name(str):
        def __contains__(self, part: str) -> bool:
            return part == "flash" or super().__contains__(part)

    monkeypatch.setattr(
        qwen3.model.config, "_attn_implementation_internal", Name("sdpa"), raising=True
    )
    found = model._teacher(text, packing)
    assert called == [(1, 96)]
    real = packing.valid
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(qwen3: Qwen3ForCausalLM) -> None:
    batch, _ = packed_and_padded()
    results = []
    for checkpointing in (False, True):
        model = make_model(copy.deepcopy(qwen3))
        with model.attached():
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.train()
            calls = []
            first = model.model.model.layers[1].self_attn.q_proj
            first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            loss = model(**batch)["loss"]
            results.append([loss.detach(), *grads(model, loss)])
        assert len(calls) == (3 if checkpointing else 2)  # teacher, student, and once more
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_base_model_is_as_it_was(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    qwen3.train()
    qwen3.model.embed_tokens.weight.requires_grad_(False)
    before = {name: module.__dict__.keys() - {"training"} for name, module in qwen3.named_modules()}
    modes = [module.training for module in qwen3.modules()]
    flags = [p.requires_grad for p in qwen3.parameters()]
    model = GateModel(qwen3, make_gates(), budget=4)
    with suppress(KeyError), model.attached():
        model.gradient_checkpointing_enable()
        model.train()
        assert not any(p.requires_grad for p in qwen3.parameters())
        model(tokens(1, 12))["loss"].backward()
        assert all(p.grad is None for p in qwen3.parameters())
        raise KeyError  # an error in training is no reason to leave traces
    after = {name: module.__dict__.keys() - {"training"} for name, module in qwen3.named_modules()}
    assert {k: v - before[k] for k, v in after.items() if v - before[k]} == {}
    assert [module.training for module in qwen3.modules()] == modes
    assert [p.requires_grad for p in qwen3.parameters()] == flags
    ids = tokens(1, 10)
    with torch.no_grad():
        assert torch.equal(qwen3.eval()(ids).logits, stock(ids).logits)
    tk.patch(qwen3).unpatch()


def test_every_gate_parameter_gets_a_gradient(qwen3: Qwen3ForCausalLM) -> None:
    model = make_model(qwen3)
    with model.attached():
        model(tokens(2, 16))["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.gates.parameters())


def test_state_dict_holds_the_gates_alone(qwen3: Qwen3ForCausalLM) -> None:
    model = make_model(qwen3)
    state = model.state_dict()
    assert state.keys() == {f"gates.{name}" for name in model.gates.state_dict()}
    other = GateModel(qwen3, make_gates(5.0), budget=4)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other.gates.layers[2].bias, model.gates.layers[2].bias)
    del state["gates.layers.1.bias"]
    with pytest.raises(RuntimeError, match=r"gates.layers.1.bias"):
        other.load_state_dict(state)


def test_autocast(qwen3: Qwen3ForCausalLM) -> None:
    model = make_model(qwen3)
    with model.attached():
        full = model(tokens(2, 16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(tokens(2, 16))
        low["loss"].backward()
    assert low["loss"].dtype == torch.float32
    torch.testing.assert_close(low["capacity_loss"], full["capacity_loss"], rtol=0.05, atol=0.05)
    torch.testing.assert_close(low["ntp"], full["ntp"], rtol=0.05, atol=0.1)


def test_bad_models(qwen3: Qwen3ForCausalLM) -> None:
    gates = make_gates()
    with pytest.raises(TypeError, match="model must contain one of"):
        GateModel(torch.nn.Linear(1, 1), gates, budget=4)
    with pytest.raises(TypeError, match="model must be a Qwen3ForCausalLM, on whose logits"):
        GateModel(qwen3.model, gates, budget=4)
    with tk.patch(qwen3), pytest.raises(ValueError, match="already patched"):
        GateModel(qwen3, gates, budget=4)
    with pytest.raises(ValueError, match="num_layers is 3 in the gates and 2 in the base model"):
        GateModel(make_qwen3(num_hidden_layers=2), gates, budget=4)
    with pytest.raises(ValueError, match="scope must be one of"):
        GateModel(qwen3, gates, budget=4, scope="layer")


def test_protected_positions_do_not_fade_and_count_in_full(qwen3: Qwen3ForCausalLM) -> None:
    ids = tokens(1, 20)
    whole = make_model(qwen3, base_loss="fwkl", sinks=2, recent=5, budget=8)
    with whole.attached():
        outputs = whole(ids)
    log_beta, held = outputs["log_beta"].double(), outputs["held"]
    assert not log_beta[..., :2].any()
    assert (log_beta[..., 2:] < 0).all()
    age = (torch.arange(20)[:, None] - torch.arange(20) - 5).clamp(min=0)
    weight = (log_beta[..., None, :] * age).exp().tril()
    torch.testing.assert_close(held.double(), weight.sum(-1), rtol=1e-5, atol=0)


def test_a_row_that_never_fades_has_gradients_all_the_same(qwen3: Qwen3ForCausalLM) -> None:
    model = make_model(qwen3, base_loss="fwkl", recent=30, budget=40)
    with model.attached():
        outputs = model(tokens(1, 20))
        assert all(not grad.any() for grad in grads(model, outputs["loss"]))
    assert outputs["fwkl"].abs() < 1e-6
