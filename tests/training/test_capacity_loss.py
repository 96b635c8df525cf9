"""`capacity_loss` against the reference implementation, worked numbers and a float64 formula."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import GOLDEN
from trimkv_kernels.training import capacity_loss

pytestmark = pytest.mark.numeric

# Published numbers: S is [1, 1.904837, 2.425261, 3.098747, 3.008984] at a budget of 2.
WORKED = torch.tensor([-0.1, -0.5, -0.01, -2.0, -0.3])


def exact_loss(
    documents: list[Tensor], *, budget: int, scope: str, normalization: str, recent: int = 0
) -> Tensor:
    """The formula over separate documents ``[layers, heads, seq]``, in float64."""
    shares = []
    for log_beta in documents:
        flat = log_beta.double().flatten(0, 1)
        seq = flat.shape[-1]
        t = torch.arange(seq)
        ages = [(i - t[: i + 1] - recent).clamp(min=0) for i in t]
        held = torch.stack([(flat[:, : i + 1] * ages[i]).exp().sum(-1) for i in t], -1)
        heads = 1
        if scope == "global":
            heads, held = len(flat), held.sum(0, keepdim=True)
        over = torch.relu(held - budget * heads)
        if normalization == "paper":
            shares.append((over / (heads * (t + 1))).flatten())
        else:
            shares.append((over / torch.clamp(heads * (t - budget), min=1)).flatten())
    pooled = torch.cat(shares)
    if normalization == "paper":
        return pooled.mean()
    return pooled[pooled > 0].mean() if (pooled > 0).any() else pooled.sum()


def make_log_beta(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return -(torch.rand(*shape, generator=rng) ** 3)


@pytest.mark.parametrize(("case", "scope"), [("rg/capacity_local", "head"),
                                             ("rg10/capacity_global", "global")])  # fmt: skip
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_golden(case: str, scope: str, impl: str) -> None:
    facts = json.loads((GOLDEN / f"{case}.json").read_text())
    golden = load_file(GOLDEN / f"{case}.safetensors")
    log_beta = golden["log_beta"].requires_grad_()
    loss = capacity_loss(log_beta, budget=facts["memory_size"], scope=scope, impl=impl)
    loss.backward()
    torch.testing.assert_close(loss, golden["capacity_loss"][0], rtol=1e-5, atol=0)
    largest = golden["grad_log_beta"].abs().max().item()
    torch.testing.assert_close(
        log_beta.grad, golden["grad_log_beta"], rtol=1e-5, atol=1e-6 * largest
    )


@pytest.mark.parametrize(
    ("heads", "options", "expected"),
    [
        ([WORKED], {}, 0.676167),
        ([WORKED], {"normalization": "paper"}, 0.123648),
        ([WORKED, torch.full((5,), -3.0)], {"scope": "global"}, 0.045457),
        # nothing is forgotten: c = 0, 0, 1, 2, 1.5, 4/3
        ([torch.zeros(6)], {}, (1 + 2 + 1.5 + 4 / 3) / 4),
    ],
)
def test_worked_numbers(heads: list[Tensor], options: dict[str, str], expected: float) -> None:
    log_beta = torch.stack(heads)[None, None]
    assert capacity_loss(log_beta, budget=2, **options).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("normalization", ["reference", "paper"])
@pytest.mark.parametrize("scope", ["head", "global"])
@pytest.mark.parametrize("recent", [0, 3])
def test_packed_and_padded_batch_equals_its_documents(
    recent: int, scope: str, normalization: str
) -> None:
    # B == layers * heads: a broadcast over the wrong dimension would not raise.
    log_beta = make_log_beta(4, 2, 2, 40).requires_grad_()
    position_ids = torch.stack([torch.arange(40)] * 4)
    valid = torch.ones(4, 40, dtype=torch.int64)
    position_ids[1, 15:] -= 15  # two documents
    valid[2, :10], position_ids[2] = 0, (torch.arange(40) - 10).clamp(min=0)
    valid[3, 30:] = 0
    places = [(0, 0, 40), (1, 0, 15), (1, 15, 40), (2, 10, 40), (3, 0, 30)]
    found = capacity_loss(
        log_beta,
        budget=4,
        recent=recent,
        scope=scope,
        position_ids=position_ids,
        valid=valid,
        normalization=normalization,
    )
    documents = [log_beta[row, :, :, a:b] for row, a, b in places]
    expected = exact_loss(
        documents, budget=4, scope=scope, normalization=normalization, recent=recent
    )
    assert expected > 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(found, log_beta)
    (expected_grad,) = torch.autograd.grad(expected, log_beta)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-8)
    assert not grad[2, ..., :10].any()
    assert not grad[3, ..., 30:].any()


def test_more_than_128_documents() -> None:
    """No document's number stands for padding."""
    length, count = 5, 140
    log_beta = torch.full((1, 1, 1, length * count), -1.0)
    log_beta[..., length * 128 : length * 129] = 0  # document 128 alone exceeds the budget
    position_ids = torch.arange(length).repeat(count)[None]
    loss = capacity_loss(log_beta, budget=2, position_ids=position_ids)
    assert loss.item() == pytest.approx((1 + 2 + 1.5) / 3)  # S - 2 = 1, 2, 3 over 1, 1, 2


def test_nothing_over_the_budget_costs_nothing() -> None:
    log_beta = make_log_beta(2, 2, 1, 8).requires_grad_()
    loss = capacity_loss(log_beta, budget=8)
    loss.backward()
    assert loss == 0
    assert not log_beta.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_beta": torch.zeros(2, 3, 4)}, "log_beta must have shape [batch, layers"),
        ({"budget": 0}, "budget must be an integer >= 1"),
        ({"budget": 2.0}, "budget must be an integer >= 1 (tokens per head), got 2.0"),
        ({"scope": "layer"}, "scope must be one of 'head', 'global', got 'layer'"),
        ({"normalization": "mean"}, "normalization must be one of 'reference', 'paper'"),
        ({"valid": torch.ones(1, 7)}, "valid must have shape [1, 8] on cpu, got [1, 7]"),
        ({"position_ids": torch.arange(8)}, "position_ids must have shape [1, 8] on cpu, got [8]"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments = {"log_beta": torch.zeros(1, 2, 2, 8), "budget": 2, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        capacity_loss(arguments.pop("log_beta"), **arguments)
