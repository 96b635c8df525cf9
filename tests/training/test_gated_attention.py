"""The backends of retention-gated attention for training against each other and worked numbers."""

import pytest
import torch
from torch import Tensor

from trimkv_kernels.training import gated_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def make_inputs(
    seq: int = 45, head_dim: int = 16
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    rng = torch.Generator().manual_seed(seq)
    query = torch.randn(2, 4, seq, head_dim, generator=rng)
    key, value = (torch.randn(2, 2, seq, head_dim, generator=rng) for _ in range(2))
    log_beta = -(torch.rand(2, 2, seq, generator=rng) ** 3)
    document = torch.zeros(2, seq, dtype=torch.int32)
    document[0, seq // 3 :] = 1
    document[1, : seq // 4] = -1
    return (query, key, value, log_beta), document


@pytest.mark.parametrize("impl", ["torch", "triton", "flex"])
def test_worked_numbers(impl: str) -> None:
    query = torch.zeros(1, 1, 3, 2)
    query[..., 0] = 1
    key = torch.tensor([[1.0, 0], [0, 1], [1, 1]])[None, None]
    value = torch.eye(3)[None, None]
    value = torch.cat([value, torch.zeros(1, 1, 3, 1)], -1)
    log_beta = torch.tensor([0.5, 0.9, 0.99]).log()[None, None]
    expected = torch.tensor([0.1476, 0.261998, 0.590402, 0])
    with torch.no_grad():  # head_dim 2 of query and key, 4 of value: two calls
        rows = [
            gated_attention(query, key, part, log_beta, scale=2**-0.5, impl=impl)[0, 0, 2]
            for part in value.split(2, dim=-1)
        ]
    torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", ["triton", "flex"])
def test_forward_equals_torch(impl: str, packed: bool) -> None:
    inputs, document = make_inputs()
    options = {"document": document} if packed else {}
    with torch.no_grad():
        found = gated_attention(*inputs, impl=impl, **options)
        expected = gated_attention(*inputs, impl="torch", **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    if packed:
        assert not found[1, :, : 45 // 4].any()


def test_gradients_of_triton_equal_those_of_torch() -> None:
    inputs, document = make_inputs(20)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    grads = []
    for impl in ("torch", "triton"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = gated_attention(*leaves, document=document, impl=impl)
        grads.append(torch.autograd.grad((output * weight).sum(), leaves))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward needs a GPU")
def test_gradients_of_flex_equal_those_of_torch() -> None:
    inputs, document = make_inputs(256, 64)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).cuda()
    grads = []
    for impl in ("torch", "flex"):
        leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
        output = gated_attention(*leaves, document=document.cuda(), impl=impl)
        grads.append(torch.autograd.grad((output * weight).sum(), leaves))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_flex_has_no_backward_on_a_cpu() -> None:
    inputs, _ = make_inputs()
    with pytest.raises(RuntimeError, match="impl='flex' has no backward pass on a CPU"):
        gated_attention(*inputs[:3], inputs[3].requires_grad_(), impl="flex")


def test_unknown_impl() -> None:
    inputs, _ = make_inputs()
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'torch', 'flex'"):
        gated_attention(*inputs, impl="sdpa")


def fading_in_float64(
    inputs: tuple[Tensor, ...], document: Tensor | None, recent: int
) -> tuple[Tensor, Tensor]:
    """Attention over all pairs at once, and which tokens are no padding."""
    query, key, value, log_beta = (tensor.double() for tensor in inputs)
    seq = query.shape[2]
    document = torch.zeros(len(query), seq) if document is None else document
    age = torch.arange(seq)[:, None] - torch.arange(seq)
    seen = (document[:, :, None] == document[:, None]) & (document >= 0)[:, :, None] & (age >= 0)
    logits = query.unflatten(1, (2, 2)) @ key[:, :, None].mT * query.shape[-1] ** -0.5
    logits = logits + ((age - recent).clamp(min=0) * log_beta[:, :, None])[:, :, None]
    weight = logits.masked_fill(~seen[:, None, None], -1e30).softmax(-1) * seen[:, None, None]
    return (weight @ value[:, :, None]).flatten(1, 2), document >= 0


@pytest.mark.parametrize("impl", ["torch", "triton", "flex"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recent", [1, 7, 44, 60])
def test_recent_tokens_do_not_fade(recent: int, packed: bool, impl: str) -> None:
    inputs, document = make_inputs()
    given = document if packed else None
    with torch.no_grad():
        found = gated_attention(*inputs, document=given, recent=recent, impl=impl)
    expected, _ = fading_in_float64(inputs, given, recent)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_where_recent_tokens_do_not_fade(packed: bool) -> None:
    inputs, document = make_inputs()
    given = document if packed else None
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(
        (gated_attention(*leaves, document=given, recent=7) * weight).sum(), leaves
    )
    oracle, _ = fading_in_float64(tuple(leaves), given, 7)
    expected = torch.autograd.grad((oracle * weight).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        # gradients of log betas are sums over up to 45 steps, each times an age of up to 45
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-5)
