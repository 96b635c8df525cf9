"""CriticalKV: the worked example, the projection's norm in float64, and the two stages."""

import math
from dataclasses import dataclass

import pytest
import torch

from trimkv_kernels.policies import (
    FieldSpec,
    ModelShape,
    RetentionPolicy,
    SlotView,
    TokenView,
    critical_kv,
    make_policy,
)
from trimkv_kernels.policies.critical_kv import CriticalKV, output_norm
from trimkv_kernels.policies.h2o import H2O
from trimkv_kernels.policies.snap_kv import SnapKV

pytestmark = pytest.mark.numeric

VALUES = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 0.5], [1.0, 1.0], [3.0, -2.0]])[None, None]
WEIGHT = torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, 0], [0, 0, 0.5, 0], [1, 0, 0, 1]])


@dataclass(frozen=True)
class Given(RetentionPolicy):
    """Scores that a test writes down."""

    fields = {"given": FieldSpec()}  # noqa: RUF012

    def score(self, slots: SlotView) -> torch.Tensor:
        return slots.fields["given"]


def tokens(value: torch.Tensor, layer: int = 0) -> TokenView:
    batch, num_kv_heads, new, _ = value.shape
    position = torch.arange(new).expand(batch, new).int()
    t = torch.full((batch,), new)
    given = {"value": value}
    return TokenView(
        "critical_kv", layer, t, position, position >= 0, given=given, num_kv_heads=num_kv_heads
    )


def slots(
    given: torch.Tensor,
    norm: torch.Tensor,
    budget: int,
    valid: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> SlotView:
    shape = given.shape
    position = torch.arange(shape[2]).expand(shape) if position is None else position
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else valid
    fields = {"given": given, "output_norm": norm}
    t = torch.full(shape[:1], shape[2])
    return SlotView("critical_kv", 0, t, position.int(), valid, fields, budget=budget)


def shape_of(**changes: object) -> ModelShape:
    base = {
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return ModelShape(**{**base, **changes})


def test_worked_example() -> None:
    """Budget 3, of which int(3 * 0.5) go to the first stage.

    kvpress gives the first stage the largest float; ours is above the rest too, but keeps ranks.
    """
    norm = output_norm(VALUES, WEIGHT)
    torch.testing.assert_close(norm, torch.tensor([[[3.25, 2.5, 1, 3.25, 7.75]]]))
    base = torch.tensor([[[0.43, 0.3875, 0.2, 0.225, 0.25]]])
    scores = CriticalKV(Given()).score(slots(base, norm, budget=3))
    expected = torch.tensor([0.969, 0.2001, 0.7316, 1.9383])
    torch.testing.assert_close(scores[0, 0, 1:], expected, atol=1e-4, rtol=0)
    assert scores[0, 0, 0] > 1.9384
    assert scores.isfinite().all()


@pytest.mark.parametrize("block_elements", [1, 500, 1 << 24])
def test_output_norm_in_float64(monkeypatch: pytest.MonkeyPatch, block_elements: int) -> None:
    """Whatever the block of tokens; query head q of KV head q // 3 has columns 4q to 4q + 4."""
    monkeypatch.setattr(critical_kv, "_BLOCK_ELEMENTS", block_elements)
    torch.manual_seed(0)
    value, weight = torch.randn(2, 2, 7, 4), torch.randn(10, 24)
    actual = output_norm(value, weight)
    assert actual.dtype == torch.float32
    for row in range(2):
        for head in range(2):
            for token in range(7):
                v = value[row, head, token].double()
                norms = [
                    (weight[:, 4 * q : 4 * q + 4].double() @ v).abs().sum()
                    for q in range(3 * head, 3 * head + 3)
                ]
                expected = sum(norms) / 3
                torch.testing.assert_close(
                    actual[row, head, token].double(), expected, atol=0, rtol=1e-6
                )


def test_norm_is_written_at_insertion_from_the_layers_own_weight() -> None:
    weights = tuple(torch.nn.Parameter(torch.randn(10, 16)) for _ in range(2))
    value = torch.randn(1, 2, 3, 4)
    policy = CriticalKV(Given()).bind(shape_of(output_weights=weights))
    field = policy.on_insert(tokens(value, layer=1))["output_norm"]
    torch.testing.assert_close(field, output_norm(value, weights[1]))
    assert not field.requires_grad


def test_first_stage_is_above_and_keeps_its_order() -> None:
    torch.manual_seed(1)
    base, norm = torch.rand(2, 3, 40), torch.rand(2, 3, 40) * 1e4
    scores = CriticalKV(Given(), ratio=0.3).score(slots(base, norm, budget=20))
    first = base.argsort(dim=-1, descending=True)[..., :6]
    assert torch.equal(scores.argsort(dim=-1, descending=True)[..., :6], first)
    rest = torch.ones_like(base, dtype=torch.bool).scatter(-1, first, False)
    torch.testing.assert_close(scores[rest], ((base + 1e-4) * norm)[rest])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_a_larger_budget_keeps_a_superset(ratio: float) -> None:
    torch.manual_seed(2)
    base, norm = torch.rand(1, 2, 30), torch.rand(1, 2, 30)
    policy = CriticalKV(Given(), ratio=ratio)
    before = torch.zeros(1, 2, 30, dtype=torch.bool)
    for budget in range(1, 31):
        kept = policy.score(slots(base, norm, budget)).topk(budget, dim=-1).indices
        kept = torch.zeros_like(before).scatter(-1, kept, True)
        assert not (before & ~kept).any()
        before = kept


def test_ties_put_the_newer_first_in_any_order() -> None:
    base, norm = torch.tensor([[[1.0, 1, 1, 0, 1]]]), torch.ones(1, 1, 5)
    policy, order = CriticalKV(Given()), torch.tensor([3, 1, 4, 0, 2])
    scores = policy.score(slots(base, norm, budget=4))
    assert scores[0, 0].argsort(descending=True)[:2].tolist() == [4, 2]
    position = torch.arange(5)[None, None, order]
    shuffled = policy.score(slots(base[..., order], norm, 4, position=position))
    assert torch.equal(shuffled, scores[..., order])


def test_first_stage_stands_out_where_nothing_is_attended() -> None:
    zero = torch.zeros(1, 1, 6)
    scores = CriticalKV(Given(), eps=0.0).score(slots(zero, zero, budget=6))
    assert scores[0, 0].argsort(descending=True)[:3].tolist() == [5, 4, 3]
    assert (scores[0, 0, 3:] > 1).all()


def test_empty_slots_and_other_rows_do_not_matter() -> None:
    torch.manual_seed(3)
    base, norm = torch.rand(2, 2, 12), torch.rand(2, 2, 12)
    policy = CriticalKV(Given())
    scores = policy.score(slots(base, norm, budget=8))
    assert torch.equal(policy.score(slots(base[1:], norm[1:], budget=8)), scores[1:])
    garbage = torch.full((2, 2, 4), math.nan)
    valid = (torch.arange(16) < 12).expand(2, 2, 16)
    position = torch.arange(16).expand(2, 2, 16).masked_fill(~valid, -1)
    longer = slots(
        torch.cat((base, garbage), -1), torch.cat((norm, garbage), -1), 8, valid, position
    )
    assert torch.equal(policy.score(longer)[..., :12], scores)
    nothing = policy.score(slots(base, norm, 8, torch.zeros(2, 2, 12, dtype=torch.bool)))
    assert not nothing.isnan().any()


def test_what_the_base_always_keeps_stays_above_all() -> None:
    base = torch.tensor([[[math.inf, 0.3, 0.2, math.inf, math.inf]]])
    scores = CriticalKV(Given()).score(slots(base, torch.ones(1, 1, 5), budget=4))
    assert scores[0, 0].isinf().tolist() == [True, False, False, True, True]
    base = torch.tensor([[[0.1, 0.3, 0.2, math.inf, 0.4]]])  # the first stage has room for two
    scores = CriticalKV(Given()).score(slots(base, torch.ones(1, 1, 5), budget=4))
    assert scores[0, 0].argsort(descending=True)[:2].tolist() == [3, 4]
    assert scores[0, 0].isinf().sum() == 1
    policy = CriticalKV(Given(), output_weights=(torch.ones(2, 2),))
    zero = policy.on_insert(tokens(torch.zeros(1, 1, 1, 2)))
    assert zero["output_norm"].item() > 0


def test_bind_keeps_the_weights_and_binds_the_base() -> None:
    weights = (torch.ones(10, 16), torch.zeros(10, 16))
    bound = make_policy("critical_kv").bind(shape_of(output_weights=weights, num_heads=4))
    again = bound.bind(shape_of())
    assert again.base == SnapKV()
    assert all(a is b for a, b in zip(again.output_weights, weights, strict=True))
    example = CriticalKV.example(shape_of(num_heads=4))
    assert example.bind(shape_of(num_heads=4)).output_weights[1].shape == (16, 16)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"needs the output projections.*output_weights=\.\.\."):
        make_policy("critical_kv").bind(shape_of())
    with pytest.raises(ValueError, match=r"must be 2 tensors \[hidden_size, a multiple of 8\]"):
        make_policy("critical_kv").bind(shape_of(output_weights=(torch.ones(10, 12),) * 2))
    small = shape_of(output_weights=(torch.ones(10, 8),) * 2, num_heads=4)
    with pytest.raises(ValueError, match=r"2 tensors \[hidden_size, 16\], got \[\[10, 8\], "):
        make_policy("critical_kv").bind(small)
    with pytest.raises(ValueError, match="must be 2 tensors"):
        make_policy("critical_kv").bind(shape_of(output_weights=(torch.ones(10, 16),)))
    with pytest.raises(ValueError, match="is not bound: call bind"):
        make_policy("critical_kv").on_insert(tokens(VALUES))
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\], got 1.5"):
        CriticalKV(H2O(), ratio=1.5)
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        CriticalKV(H2O(), eps=-1)
