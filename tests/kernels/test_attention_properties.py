"""What must hold of attention over slots, whatever is in them."""

import hypothesis
import oracle
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from trimkv_kernels.kernels import decode_attention, extend_attention

pytestmark = pytest.mark.numeric

ERROR = 4e-6  # fp32, values of order one


def draw(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def inputs(batch: int, heads: int, group: int, slots: int, new: int, device: str) -> list[Tensor]:
    query = draw(batch, heads * group, new, 32, device=device, seed=1)
    fresh = [draw(batch, heads, new, 32, device=device, seed=seed) for seed in (2, 3)]
    held = [draw(batch, heads, slots, 32, device=device, seed=seed) for seed in (4, 5)]
    generator = torch.Generator().manual_seed(6)
    count = torch.randint(1, slots + 1, (batch, heads), generator=generator, dtype=torch.int32)
    return [query, *fresh, *held, count.to(device)]


def permuted(held: list[Tensor], count: Tensor) -> list[Tensor]:
    """Shuffle the valid slots of each head, alike in keys and values."""
    shuffled = [tensor.clone() for tensor in held]
    for row in range(count.shape[0]):
        for head in range(count.shape[1]):
            order = torch.randperm(int(count[row, head]))
            for tensor, source in zip(shuffled, held, strict=True):
                tensor[row, head, : len(order)] = source[row, head, order]
    return shuffled


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_the_order_of_slots_means_nothing(impl: str, device: str) -> None:
    query, new_key, new_value, *held, count = inputs(2, 2, 4, 70, 9, device)
    shuffled = permuted(held, count)
    one = decode_attention(query[:, :, 0], *held, count, impl=impl)
    other = decode_attention(query[:, :, 0], *shuffled, count, impl=impl)
    torch.testing.assert_close(one, other, atol=ERROR, rtol=ERROR)
    one = extend_attention(query, new_key, new_value, *held, count, impl=impl)
    other = extend_attention(query, new_key, new_value, *shuffled, count, impl=impl)
    torch.testing.assert_close(one, other, atol=ERROR, rtol=ERROR)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_a_row_does_not_see_its_batch(impl: str, device: str) -> None:
    query, new_key, new_value, *held, count = inputs(3, 2, 2, 40, 7, device)
    decoded = decode_attention(query[:, :, 0], *held, count, impl=impl)
    extended = extend_attention(query, new_key, new_value, *held, count, impl=impl)
    for row in range(3):
        q, k, v, key, value, n = (
            x[row : row + 1] for x in (query, new_key, new_value, *held, count)
        )
        alone = decode_attention(q[:, :, 0], key, value, n, impl=impl)
        torch.testing.assert_close(decoded[row], alone[0], atol=ERROR, rtol=ERROR)
        alone = extend_attention(q, k, v, key, value, n, impl=impl)
        torch.testing.assert_close(extended[row], alone[0], atol=ERROR, rtol=ERROR)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_tokens_one_by_one_equal_one_call(impl: str, device: str) -> None:
    query, new_key, new_value, *held, count = inputs(2, 1, 2, 20, 6, device)
    count.fill_(20)
    whole = extend_attention(query, new_key, new_value, *held, count, impl=impl)
    for i in range(6):
        key, value = (
            torch.cat((old, new[:, :, : i + 1]), 2)
            for old, new in zip(held, (new_key, new_value), strict=True)
        )
        step = decode_attention(query[:, :, i], key, value, impl=impl)
        torch.testing.assert_close(whole[:, :, i], step, atol=ERROR, rtol=ERROR)


@hypothesis.settings(
    max_examples=25,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # shrinking takes minutes here
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 9),
    slots=st.integers(1, 90),
    head_dim=st.integers(16, 96),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    device: str, batch: int, heads: int, group: int, slots: int, head_dim: int, seed: int
) -> None:
    query = draw(batch, heads * group, head_dim, device=device, seed=seed)
    key, value = (draw(batch, heads, slots, head_dim, device=device, seed=seed + i) for i in (1, 2))
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(0, slots + 1, (batch, heads), generator=generator, dtype=torch.int32)
    count = count.to(device)
    expected = oracle.attention(query, key, value, count)
    # a call of one token that brings the last slot along
    held = (count - 1).clamp(min=0)
    last = held.long()[..., None, None].expand(-1, -1, 1, head_dim)
    new_key, new_value = key.gather(2, last), value.gather(2, last)
    extended = oracle.attention(query, key, value, held + 1)
    for impl in oracle.IMPLS:
        output = decode_attention(query, key, value, count, impl=impl)
        torch.testing.assert_close(output.double(), expected, atol=ERROR, rtol=ERROR)
        output = extend_attention(
            query[:, :, None], new_key, new_value, key, value, held, impl=impl
        )
        torch.testing.assert_close(output[:, :, 0].double(), extended, atol=ERROR, rtol=ERROR)
