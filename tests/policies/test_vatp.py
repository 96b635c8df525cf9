"""VATP and what it shares with every wrapper."""

import math
from dataclasses import dataclass

import pytest
import torch

from trimkv_kernels.policies import (
    AttentionStat,
    FieldSpec,
    ModelShape,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    make_policy,
)
from trimkv_kernels.policies.allocation import PerLayer
from trimkv_kernels.policies.h2o import H2O
from trimkv_kernels.policies.random import Random
from trimkv_kernels.policies.vatp import VATP
from trimkv_kernels.policies.wrapper import Wrapper

pytestmark = pytest.mark.numeric

VALUES = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 0.5], [1.0, 1.0], [3.0, -2.0]])


def tokens(value: torch.Tensor) -> TokenView:
    batch, num_kv_heads, new, _ = value.shape
    position = torch.arange(new).expand(batch, new).int()
    valid = torch.ones(batch, new, dtype=torch.bool)
    t = torch.full((batch,), new)
    given = {"value": value, "key": 2 * value}
    return TokenView("vatp", 0, t, position, valid, given=given, num_kv_heads=num_kv_heads)


def slots(fields: dict[str, torch.Tensor], t: int = 5) -> SlotView:
    shape = next(iter(fields.values())).shape
    position = torch.arange(shape[2]).expand(shape).int()
    return SlotView("vatp", 0, torch.full(shape[:1], t), position, position >= 0, fields, budget=3)


@dataclass(frozen=True)
class Everything(RetentionPolicy):
    """A base that uses every part of the protocol."""

    bound_to: int = 0

    needs = Needs(insert=("key",), score=("key",), attention=AttentionStat(), query_window=3)
    fields = {"first": FieldSpec()}  # noqa: RUF012
    sinks = 7
    recent = 5
    allocation = PerLayer((3, 4))

    def bind(self, shape: ModelShape) -> RetentionPolicy:
        return Everything(bound_to=shape.num_layers)

    def on_insert(self, tokens: TokenView) -> dict[str, torch.Tensor]:
        return {"first": tokens.key[..., 0]}

    def observe(self, seen: ObservationView) -> None:
        seen.fields["first"].add_(seen.attention)

    def score(self, slots: SlotView) -> torch.Tensor:
        return slots.fields["first"]


def test_worked_examples() -> None:
    """Accumulated attention of two query heads, and their mean, as the default base H2O has it."""
    policy = make_policy("vatp")
    value_norm = policy.on_insert(tokens(VALUES[None, None]))["value_norm"]
    torch.testing.assert_close(value_norm, torch.tensor([[[2, 2, 0.5, 2, 5]]]))
    for mass, expected in (
        ([2.8, 0.8, 0.6, 0.5, 0.3], [5.6, 1.6, 0.3, 1, 1.5]),
        ([1.5, 2.3, 0.6, 0.4, 0.2], [3, 4.6, 0.3, 0.8, 1]),
        ([2.15, 1.55, 0.6, 0.45, 0.25], [4.3, 3.1, 0.3, 0.9, 1.25]),
    ):
        fields = {"mass": torch.tensor([[mass]]), "value_norm": value_norm}
        actual = policy.score(slots(fields))
        torch.testing.assert_close(actual, torch.tensor([[expected]]), atol=1e-6, rtol=0)


def test_default_base_is_h2o() -> None:
    policy = make_policy("vatp")
    assert policy.base == H2O()
    assert policy.needs == H2O().needs | Needs(insert=("value",))
    assert set(policy.fields) == {"mass", "value_norm"}
    assert policy.sinks == H2O().sinks


def test_half_precision_values_are_summed_in_float32() -> None:
    value = torch.full((1, 1, 1, 1000), 1000.0, dtype=torch.float16)  # the sum is beyond float16
    norm = VATP().on_insert(tokens(value))["value_norm"]
    assert norm.dtype == torch.float32
    assert norm.item() == 1e6


def test_what_the_base_always_keeps_stays_so_beside_a_zero_value() -> None:
    norm = VATP().on_insert(tokens(torch.zeros(1, 1, 2, 4)))["value_norm"]
    scores = VATP().score(slots({"mass": torch.tensor([[[math.inf, 1.0]]]), "value_norm": norm}))
    assert scores[0, 0, 0] == math.inf
    assert 0 <= scores[0, 0, 1] < 1e-30


def test_wrapper_forwards_all_of_its_base() -> None:
    policy = VATP(Everything())
    assert policy.needs == Needs(
        insert=("key", "value"), score=("key",), attention=AttentionStat(), query_window=3
    )
    assert set(policy.fields) == {"first", "value_norm"}
    assert (policy.sinks, policy.recent) == (7, 5)
    assert policy.allocation == PerLayer((3, 4))
    assert not policy.is_affine
    assert VATP(make_policy("full")).capacity_only

    bound = policy.bind(ModelShape(9, 1, 2, torch.float32, torch.device("cpu")))
    assert isinstance(bound, VATP)
    assert bound.base == Everything(bound_to=9)

    fields = policy.on_insert(tokens(VALUES[None, None]))
    assert torch.equal(fields["first"], 2 * VALUES[None, None, :, 0])
    view = slots(fields)
    given = {"attention": torch.ones(1, 1, 5), "num_queries": torch.ones(1)}
    policy.observe(ObservationView("vatp", 0, view.t, view.position, view.valid, fields, given))
    expected = (2 * VALUES[:, 0] + 1) * VALUES.abs().sum(dim=-1)
    torch.testing.assert_close(policy.score(view), expected[None, None])


def test_an_affine_base_is_scored_from_fields() -> None:
    class Aging(RetentionPolicy):
        def affine(self, tokens: TokenView) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((1, 2, 1), 0.5), tokens.position[:, None].float()

    value = torch.rand(1, 2, 5, 4)
    for base, expected in (
        (Aging(), 0.5 * (11 - torch.arange(5)) + torch.arange(5)),
        (Random(), Random().affine(tokens(value))[1]),
    ):
        policy = VATP(base)
        fields = policy.on_insert(tokens(value))
        assert set(fields) == set(policy.fields)
        assert {x.shape for x in fields.values()} == {(1, 2, 5)}
        scores = policy.score(slots(fields, t=11))
        torch.testing.assert_close(scores, expected * value.sum(dim=-1))


def test_wrapper_refuses_a_field_declared_twice() -> None:
    class Clash(RetentionPolicy):
        name = "clash"
        fields = {"value_norm": FieldSpec()}  # noqa: RUF012

    match = "policy 'vatp': field 'value_norm' is declared twice, by 'clash' and by 'vatp'"
    with pytest.raises(ValueError, match=match):
        VATP(Clash())
    with pytest.raises(ValueError, match="declared twice, by 'vatp' and by 'vatp'"):
        VATP(VATP())


def test_wrapper_refuses_what_is_no_policy() -> None:
    with pytest.raises(TypeError, match=r"'vatp': base must be a RetentionPolicy.*got 'h2o'"):
        VATP("h2o")
    with pytest.raises(NotImplementedError, match="'Wrapper' defines neither score nor affine"):
        Wrapper(H2O()).score(slots({"mass": torch.zeros(1, 1, 5)}))
