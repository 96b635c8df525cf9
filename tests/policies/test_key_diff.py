"""KeyDiff: the worked example, a formula written out in float64, and what must not matter."""

import math

import pytest
import torch

from trimkv_kernels.policies import SlotView, make_policy
from trimkv_kernels.policies.key_diff import KeyDiff

pytestmark = pytest.mark.numeric

KEYS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0], [0.0, 0.5]])[None, None]


def slots(key: torch.Tensor, valid: torch.Tensor | None = None) -> SlotView:
    shape = key.shape[:3]
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else valid
    position = torch.arange(shape[2]).expand(shape).int()
    t = torch.full((shape[0],), shape[2])
    return SlotView("key_diff", 0, t, position, valid, given={"key": key})


def test_worked_example() -> None:
    expected = torch.tensor([[[-0.707107, -0.707107, -1, -0.707107, -0.707107]]])
    scores = make_policy("key_diff").score(slots(KEYS))
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def test_the_anchor_is_made_of_unit_keys() -> None:
    """An anchor of plain keys gives other numbers on the same input; they are not ours."""
    unnormalised = torch.tensor([[[-0.819232, -0.573462, -0.984784, -0.819232, -0.573462]]])
    cosine = torch.cosine_similarity(KEYS, KEYS.mean(dim=2, keepdim=True), dim=-1)
    torch.testing.assert_close(-cosine, unnormalised, atol=1e-6, rtol=0)
    assert (KeyDiff().score(slots(KEYS)) - unnormalised).abs().min() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula_in_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    key = torch.randn(2, 3, 17, 8).to(dtype)
    valid = torch.rand(2, 3, 17) < 0.7
    scores = KeyDiff().score(slots(key.masked_fill(~valid[..., None], math.nan), valid))
    assert scores.dtype == torch.float32
    for row in range(2):
        for head in range(3):
            kept = key[row, head, valid[row, head]].double()
            anchor = sum(k / k.dot(k).sqrt() for k in kept) / len(kept)
            cosine = [k.dot(anchor) / (k.dot(k) * anchor.dot(anchor)).sqrt() for k in kept]
            actual = scores[row, head, valid[row, head]].double()
            torch.testing.assert_close(actual, -torch.stack(cosine), atol=1e-6, rtol=0)


def test_without_an_angle_the_score_is_zero() -> None:
    with_zero = torch.cat((KEYS, torch.zeros(1, 1, 1, 2)), dim=2)
    scores = KeyDiff().score(slots(with_zero))
    assert scores[0, 0, 5] == 0
    torch.testing.assert_close(scores[..., :5], KeyDiff().score(slots(KEYS)))
    cancelling = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])[None, None]
    assert torch.equal(KeyDiff().score(slots(cancelling)), torch.zeros(1, 1, 2))
    empty = torch.zeros(1, 1, 5, dtype=torch.bool)
    assert torch.equal(KeyDiff().score(slots(KEYS, empty)), torch.zeros(1, 1, 5))


def test_order_and_batch_do_not_matter() -> None:
    torch.manual_seed(1)
    key, order = torch.randn(2, 2, 9, 4), torch.randperm(9)
    scores = KeyDiff().score(slots(key))
    torch.testing.assert_close(KeyDiff().score(slots(key[:, :, order])), scores[..., order])
    torch.testing.assert_close(KeyDiff().score(slots(key[1:])), scores[1:])
