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
