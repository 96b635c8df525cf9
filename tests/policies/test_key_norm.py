"""KeyNorm: the worked examples, and both signs."""

import math

import pytest
import torch

from trimkv_kernels.policies import SlotView, make_policy
from trimkv_kernels.policies.key_norm import KeyNorm

KEYS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0], [0.0, 0.5]])[None, None]
NORMS = torch.tensor([[[1.0, 2.0, math.sqrt(2.0), 3.0, 0.5]]])


def slots(key: torch.Tensor) -> SlotView:
    zero = torch.zeros(key.shape[:3])
    t = torch.full((key.shape[0],), key.shape[2])
    return SlotView("key_norm", 0, t, zero.int(), zero == 0, given={"key": key})


def test_worked_example() -> None:
    torch.testing.assert_close(make_policy("key_norm").score(slots(KEYS)), -NORMS)
    torch.testing.assert_close(KeyNorm(keep="large").score(slots(KEYS)), NORMS)


def test_victim_among_growing_norms() -> None:
    """Keys (n, n), one global token, one recent: the third of four goes.

    Protection is the cache's, by position, so only the two slots between are compared.
    """
    key = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None, :, None].expand(1, 1, 4, 2)
    scores = KeyNorm().score(slots(key))
    expected = torch.tensor([[[-1.41, -2.83, -4.24, -5.66]]])
    torch.testing.assert_close(scores, expected, atol=0.005, rtol=0)
    assert 1 + scores[0, 0, 1:3].argmin() == 2


def test_half_precision_keys_are_scored_in_float32() -> None:
    key = torch.full((1, 1, 1, 128), 30000.0, dtype=torch.float16)  # the norm is beyond float16
    scores = KeyNorm().score(slots(key))
    assert scores.dtype == torch.float32
    assert scores.item() == pytest.approx(-30000.0 * math.sqrt(128), rel=1e-6)


def test_keep_must_be_known() -> None:
    with pytest.raises(ValueError, match="keep must be one of small, large, got 'big'"):
        make_policy("key_norm", keep="big")
