"""Expected attention: worked examples, rotation matrices written out, stock transformers' RoPE."""

import cmath
import math

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from trimkv_kernels.policies import ModelShape, SlotView, make_policy
from trimkv_kernels.policies.expected_attention import ExpectedAttention

pytestmark = pytest.mark.numeric

KEYS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0], [0.0, 0.5]])[None, None]
VALUES = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 0.5], [1.0, 1.0], [3.0, -2.0]])[None, None]
HIDDEN = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1]])  # no sink


class OneSink(ExpectedAttention):
    sinks = 1


def slots(
    key: torch.Tensor,
    value: torch.Tensor,
    queries: torch.Tensor,
    *,
    t: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> SlotView:
    """``queries``: ``[batch, num_heads, n, head_dim]`` before RoPE, those of the moments."""
    shape = key.shape[:3]
    mean = queries.mean(dim=2)
    centred = queries - mean[:, :, None]
    position = torch.arange(shape[2]).expand(shape) if position is None else position
    return SlotView(
        "expected_attention",
        0,
        torch.full((shape[0],), shape[2]) if t is None else t,
        position.int(),
        torch.ones(shape, dtype=torch.bool) if valid is None else valid,
        given={
            "key": key,
            "value": value,
            "query_mean": mean,
            "query_covariance": centred.mT @ centred / queries.shape[2],
        },
    )


def shape_of(**changes: object) -> ModelShape:
    base = {
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return ModelShape(**{**base, **changes})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"use_covariance": False, "use_value_norm": False},
            [0.220726, 0.239311, 0.410086, 0.129877],
        ),
        ({"use_value_norm": False}, [0.210526, 0.194398, 0.497083, 0.097994]),
        ({}, [0.421051, 0.097199, 0.702981, 0.353321]),
    ],
)
def test_worked_examples(options: dict[str, bool], expected: list[float]) -> None:
    """Without rotation, one sink; the sink itself is protected by the cache."""
    queries = HIDDEN.unflatten(1, (2, 2)).transpose(0, 1)[None]
    policy = OneSink(inv_freq=torch.zeros(1), **options)
    scores = policy.score(slots(KEYS, VALUES, queries))[0, 0]
    torch.testing.assert_close(scores[1:], torch.tensor(expected), atol=1e-6, rtol=0)
    assert scores[0].isfinite()


def mean_rotation_matrix(inv_freq: torch.Tensor, t: int, n: int, scaling: float) -> torch.Tensor:
    """float64 ``[D, D]``: channels (i, i + D/2) as complex numbers, a geometric mean."""
    half = len(inv_freq)
    matrix = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for i, frequency in enumerate(inv_freq.double().tolist()):
        step = cmath.exp(1j * frequency)
        series = n if step == 1 else (1 - step**n) / (1 - step)
        turn = scaling * cmath.exp(1j * frequency * t) * series / n
        matrix[i, i] = matrix[half + i, half + i] = turn.real
        matrix[half + i, i], matrix[i, half + i] = turn.imag, -turn.imag
    return matrix


@pytest.mark.parametrize("use_covariance", [False, True])
def test_formula_in_float64(use_covariance: bool) -> None:
    """Every row at its own t, groups of 3, empty slots, eps, a scaled RoPE."""
    torch.manual_seed(0)
    inv_freq = torch.tensor([1.0, 0.2, 0.05, 0.0])
    key, value = torch.randn(2, 2, 2, 11, 8)
    queries = torch.randn(2, 6, 40, 8) + 0.5
    t = torch.tensor([11, 300])
    valid = torch.rand(2, 2, 11) < 0.8
    position = torch.arange(11).expand(2, 2, 11) + torch.tensor([0, 289])[:, None, None]
    policy = ExpectedAttention(
        n_future=20, use_covariance=use_covariance, eps=0.1, inv_freq=inv_freq, rope_scaling=1.3
    )
    poisoned = key.masked_fill(~valid[..., None], math.nan)
    view = slots(poisoned, value, queries, t=t, valid=valid, position=position)
    scores = policy.score(view)
    assert scores.dtype == torch.float32

    for row in range(2):
        rotation = mean_rotation_matrix(inv_freq, int(t[row]), 20, 1.3)
        for head in range(2):
            counted = valid[row, head] & (position[row, head] >= 4)
            k, v = key[row, head, counted].double(), value[row, head, counted].double()
            attention = torch.zeros(len(k), dtype=torch.float64)
            for query_head in range(3 * head, 3 * head + 3):
                seen = queries[row, query_head].double()
                mean = rotation @ seen.mean(dim=0)
                covariance = rotation @ torch.cov(seen.T, correction=0) @ rotation.T
                logits = k @ mean / math.sqrt(8)
                if use_covariance:
                    logits = logits + torch.stack([x @ covariance @ x for x in k]) / 16
                attention += torch.exp(logits) / torch.exp(logits).sum() / 3
            expected = (attention + 0.1) * v.square().sum(dim=-1).sqrt()
            actual = scores[row, head, counted].double()
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_rotation_is_that_of_transformers() -> None:
    """The mean of one query at the next 5 positions, rotated by stock RoPE, decides the scores."""
    torch.manual_seed(1)
    inv_freq = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    key, query = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 1, 8)
    angle = (9 + torch.arange(5.0))[:, None] * inv_freq
    cos, sin = (torch.cat((x, x), dim=-1)[None] for x in (angle.cos(), angle.sin()))
    rotated, _ = apply_rotary_pos_emb(query.expand(1, 2, 5, 8), key[:, :, :5], cos, sin)
    logits = (key @ rotated.mean(dim=2)[..., None])[..., 0] / math.sqrt(8)
    policy = ExpectedAttention(n_future=5, use_value_norm=False, inv_freq=inv_freq)
    scores = policy.score(slots(key, key, query))
    torch.testing.assert_close(scores[..., 4:], logits[..., 4:].softmax(dim=-1))


def test_sinks_and_empty_heads_stay_finite() -> None:
    """A sink far above the rest scores at most 1; a head of sinks or of nothing has no NaN."""
    key = torch.ones(1, 1, 6, 2)
    key[:, :, :4] = 1000.0
    queries = torch.ones(1, 1, 3, 2)
    policy = ExpectedAttention(use_value_norm=False, inv_freq=torch.zeros(1))
    scores = policy.score(slots(key, key, queries))
    torch.testing.assert_close(scores, torch.tensor([[[1.0, 1, 1, 1, 0.5, 0.5]]]))
    for valid in (torch.arange(6) < 4, torch.arange(6) < 0):
        assert policy.score(slots(key, key, queries, valid=valid.expand(1, 1, 6))).isfinite().all()


def test_order_and_batch_do_not_matter() -> None:
    torch.manual_seed(2)
    policy = ExpectedAttention.example(shape_of())
    key, value = torch.randn(2, 2, 2, 12, 8)
    queries, order = torch.randn(2, 4, 30, 8), torch.randperm(12)
    position = torch.arange(12).expand(2, 2, 12)
    scores = policy.score(slots(key, value, queries))
    shuffled = slots(key[:, :, order], value[:, :, order], queries, position=position[..., order])
    torch.testing.assert_close(policy.score(shuffled), scores[..., order])
    alone = policy.score(slots(key[1:], value[1:], queries[1:]))
    torch.testing.assert_close(alone, scores[1:])


def test_bind_takes_rope_from_the_model_and_keeps_it() -> None:
    inv_freq = torch.rand(4, dtype=torch.float64)
    bound = make_policy("expected_attention").bind(shape_of(inv_freq=inv_freq, rope_scaling=1.5))
    again = bound.bind(shape_of())
    assert torch.equal(again.inv_freq, inv_freq.float())
    assert again.rope_scaling == 1.5
    assert torch.equal(again.bind(shape_of(inv_freq=inv_freq + 1)).inv_freq, (inv_freq + 1).float())


def test_bind_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"needs RoPE's frequencies.*inv_freq=\.\.\."):
        make_policy("expected_attention").bind(shape_of())
    with pytest.raises(ValueError, match=r"inv_freq must have shape \[4\].*got \[3\]"):
        make_policy("expected_attention").bind(shape_of(inv_freq=torch.ones(3)))
    with pytest.raises(ValueError, match="is not bound: call bind"):
        make_policy("expected_attention").score(slots(KEYS, VALUES, torch.ones(1, 1, 2, 2)))
    with pytest.raises(ValueError, match="n_future must be at least 1, got 0"):
        ExpectedAttention(n_future=0)
    with pytest.raises(ValueError, match=r"eps must be at least 0, got -1"):
        ExpectedAttention(eps=-1)
