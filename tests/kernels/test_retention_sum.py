"""`retention_sum`, both implementations, against float64."""

import importlib
import json
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import oracle
import packing
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trimkv_kernels.kernels import retention_sum

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("poisoned_memory")]

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.retention_sum")
GOLDEN = Path(__file__).parents[1] / "golden" / "trimkv-0.1.5"

KINDS = ["whole", "padded", "packed", "short"]


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a short sequence has many; a program handles 256 targets."""
    config = MODULE.RetentionSumConfig(block=16, columns=16, num_warps=4)
    monkeypatch.setattr(MODULE, "retention_sum_config", lambda *_: config)


def make_log_beta(batch: int, heads: int, seq: int, device: str) -> Tensor:
    """Retention from none at all to nearly perfect."""
    rng = torch.Generator().manual_seed(seq)
    log_beta = -(torch.rand(batch, heads, seq, generator=rng) ** 6) * 4
    return log_beta.to(device).requires_grad_()


def exact_sum(log_beta: Tensor, places: list[tuple[int, slice]]) -> Tensor:
    """The definition, document by document; 0 outside of them."""
    output = torch.zeros_like(log_beta)
    for row, place in places:
        inside = log_beta[row, :, place]
        t = torch.arange(inside.shape[-1], device=log_beta.device)
        age = (t[:, None] - t).clamp(min=0)
        decay = (age * inside[:, None, :]).exp().tril()
        output[row, :, place] = decay.sum(-1)
    return output


def check(
    impl: str, log_beta: Tensor, document: Tensor | None, places: list[tuple[int, slice]]
) -> None:
    """Compare the sum and its gradient with float64, relative to what each could be."""
    rng = torch.Generator().manual_seed(1)
    grad = torch.randn(log_beta.shape, generator=rng).to(log_beta.device)
    output = retention_sum(log_beta, document=document, impl=impl)
    assert output.shape == log_beta.shape
    assert output.dtype == torch.float32
    (found,) = torch.autograd.grad(output, log_beta, grad)
    wide = log_beta.detach().double().requires_grad_()
    exact = exact_sum(wide, places)
    (expected,) = torch.autograd.grad(exact, wide, grad.double())
    torch.testing.assert_close(output.double(), exact, rtol=2e-6, atol=0)
    # Terms of either sign cancel in the gradient: what it would be without them bounds the error.
    (bound,) = torch.autograd.grad(exact_sum(wide, places), wide, grad.double().abs())
    assert ((found - expected).abs() <= 4e-6 * bound).all()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq", [17, 63, 300])
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_matches_float64(impl: str, seq: int, kind: str, device: str) -> None:
    document, places = packing.pack(packing.layout(kind, seq))
    given = None if kind == "whole" else document.to(device)
    check(impl, make_log_beta(2, 1 if seq == 300 else 3, seq, device), given, places)


@pytest.mark.parametrize("seq", [1, 100])
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_matches_float64_in_the_blocks_it_ships_with(impl: str, seq: int, device: str) -> None:
    check(impl, make_log_beta(1, 2, seq, device), None, packing.whole_rows(1, seq))


def test_long_sequence(device: str) -> None:
    impl = "auto" if device == "cuda" else "torch"
    check(impl, make_log_beta(1, 2, 3000, device), None, packing.whole_rows(1, 3000))


@st.composite
def rows(draw: st.DrawFn) -> packing.Rows:
    """Two rows of documents and pads."""
    seq = draw(st.integers(1, 40))
    found: packing.Rows = []
    for _ in range(2):
        row: list[tuple[int, int]] = []
        left = seq
        while left > 0:
            before = row[-1][0] if row else None
            name = draw(st.sampled_from([x for x in (-1, 0, 1, 127, 128) if x != before]))
            length = draw(st.integers(1, left))
            row.append((name, length))
            left -= length
        found.append(row)
    return found


@hypothesis.given(rows=rows())
@hypothesis.settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_packing(rows: packing.Rows, device: str) -> None:
    document, places = packing.pack(rows)
    hypothesis.assume(places)
    check("torch", make_log_beta(2, 1, document.shape[1], device), document.to(device), places)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_worked_numbers(impl: str, device: str) -> None:
    log_beta = torch.tensor([[[-0.1, -0.5, -0.01, -2.0, -0.3]]], device=device)
    expected = torch.tensor([[[1, 1.904837, 2.425261, 3.098747, 3.008984]]], device=device)
    # half of the last decimal, 2**-22 of what is carried (2.1 at most), half a unit for each of 4
    # additions: 1.5e-6 together
    torch.testing.assert_close(retention_sum(log_beta, impl=impl), expected, rtol=0, atol=1.5e-6)


@pytest.mark.parametrize("case", ["rg/capacity_local", "rg10/capacity_global"])
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_golden(impl: str, case: str, device: str) -> None:
    """The sum as trimkv 0.1.5 has it, and through its capacity loss the gradient."""
    path = GOLDEN / case
    golden = {name: x.to(device) for name, x in load_file(f"{path}.safetensors").items()}
    options = json.loads(Path(f"{path}.json").read_text())
    log_beta = golden["log_beta"].requires_grad_()
    seq = log_beta.shape[-1]
    total = retention_sum(log_beta.flatten(1, 2), impl=impl)  # [batch, layers * heads, seq]
    expected = golden["retention_sum"].flatten(1, 2)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    heads = 1
    if options["global_capacity"]:
        heads, total = total.shape[1], total.sum(1)
    budget, t = options["memory_size"] * heads, torch.arange(seq, device=device) * heads
    excess = ((total - budget) / (t - budget).clamp(min=1)).clamp(min=0)
    loss = excess.sum() / (excess > 0).sum().clamp(min=1)
    (grad,) = torch.autograd.grad(loss, log_beta)
    torch.testing.assert_close(loss, golden["capacity_loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, golden["grad_log_beta"], rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_extreme_log_betas(impl: str, device: str) -> None:
    """Nothing forgotten gives t + 1, everything forgotten gives 1, both exactly and with -inf."""
    log_beta = torch.zeros(1, 3, 90, device=device)
    log_beta[:, 1] = -1e30
    log_beta[:, 2] = -torch.inf
    log_beta.requires_grad_()
    output = retention_sum(log_beta, impl=impl)
    t = torch.arange(90.0, device=device)
    assert torch.equal(output, torch.stack((t + 1, torch.ones_like(t), torch.ones_like(t)))[None])
    (grad,) = torch.autograd.grad(output.sum(), log_beta)
    ages = (89 - t) * (90 - t) / 2
    assert torch.equal(grad, torch.stack((ages, 0 * t, 0 * t))[None])


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_nan_is_not_hidden(impl: str, device: str) -> None:
    log_beta = torch.zeros(1, 1, 50, device=device)
    log_beta[0, 0, 20] = torch.nan
    assert retention_sum(log_beta, impl=impl)[0, 0, 20:].isnan().all()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_padding_is_nowhere(impl: str, device: str) -> None:
    document = packing.pack(packing.layout("padded", 40))[0].to(device)
    log_beta = make_log_beta(2, 2, 40, device)
    output = retention_sum(log_beta, document=document, impl=impl)
    pad = (document < 0)[:, None].expand_as(output)
    (grad,) = torch.autograd.grad(output.sum(), log_beta)
    assert (output[pad] == 0).all()
    assert (grad[pad] == 0).all()
    by_mask = retention_sum(log_beta, valid=document >= 0, impl=impl)
    assert torch.equal(by_mask, output)
    changed = log_beta.detach().masked_fill(pad, -0.5)
    assert torch.equal(retention_sum(changed, document=document, impl=impl), output)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_a_document_alone_and_packed(impl: str, device: str) -> None:
    document, places = packing.pack(packing.layout("packed", 70))
    log_beta = make_log_beta(2, 2, 70, device)
    packed = retention_sum(log_beta, document=document.to(device), impl=impl)
    for row, place in places:
        alone = retention_sum(log_beta[row : row + 1, :, place], impl=impl)
        torch.testing.assert_close(packed[row : row + 1, :, place], alone, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_deterministic_and_free_of_strides(impl: str, device: str) -> None:
    log_beta = make_log_beta(2, 2, 40, device)
    document = packing.pack(packing.layout("packed", 40))[0].to(device)
    other = log_beta.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    found = []
    for given in (log_beta, log_beta, other):
        output = retention_sum(given, document=document, impl=impl)
        # the gradient of a sum has strides of 0
        found.append((output.detach(), *torch.autograd.grad(output.sum(), given)))
    for output, grad in found[1:]:
        assert torch.equal(output, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_empty_sequence(impl: str, device: str) -> None:
    log_beta = torch.zeros(2, 3, 0, device=device)
    document = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert retention_sum(log_beta, document=document, impl=impl).shape == (2, 3, 0)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_registered_and_compiles_without_a_break(impl: str, device: str) -> None:
    log_beta = make_log_beta(2, 1, 20, device)
    document = packing.pack(packing.layout("packed", 20))[0].to(device)
    torch.library.opcheck(retention_sum.registered[impl], retention_sum.flat(log_beta))

    def loss(log_beta: Tensor, document: Tensor) -> Tensor:
        return retention_sum(log_beta, document=document, impl=impl).square().sum()

    plain = torch.autograd.grad(loss(log_beta, document), log_beta)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(log_beta, document), log_beta)[0], plain[0])


def test_config_fills_the_device() -> None:
    wide = MODULE.retention_sum_config("output", 288, 16384, 132)
    assert (wide.columns, wide.num_warps) == (32, 8)
    assert MODULE.retention_sum_config("output", 8, 131072, 132).columns == 16


LOG_BETA = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_beta": LOG_BETA[0]}, "log_beta must have shape [batch, heads, seq], got [3, 5]"),
        ({"log_beta": LOG_BETA.half()}, "log_beta must have dtype float32, got float16"),
        (
            {"document": torch.zeros(2, 4, dtype=torch.int32)},
            "document must have shape [2, 5], got [2, 4]",
        ),
        ({"document": torch.zeros(2, 5)}, "document must have dtype int32, got float32"),
        (
            {"document": torch.zeros(2, 5, dtype=torch.int32, device="meta")},
            "document must be on cpu, got meta",
        ),
        ({"valid": torch.zeros(2, 5)}, "valid must have dtype bool, got float32"),
        ({"impl": "cuda"}, "impl must be one of 'auto', 'triton', 'torch', got 'cuda'"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        retention_sum(**{"log_beta": LOG_BETA, **arguments})
