"""The conformance suite passes every policy of ours and catches broken ones by the rule's name."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from trimkv_kernels import (
    AttentionStat,
    FieldSpec,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    available_policies,
)
from trimkv_kernels.kernels import Decay
from trimkv_kernels.policies import example_policy, make_policy
from trimkv_kernels.testing import check_policy, example_shape
from trimkv_kernels.testing.conformance import RULES, PolicyError


@pytest.mark.parametrize("name", available_policies())
def test_every_policy_conforms(name: str) -> None:
    check_policy(example_policy(name, example_shape()))


@pytest.mark.slow
def test_the_suite_runs_on_the_kernels(device: str) -> None:
    rules = ("slot_permutation", "padding", "full_budget")
    check_policy(make_policy("h2o"), impl="triton", device=device, rules=rules)


class Norms(RetentionPolicy):
    """A right one to break: the length of the values."""

    needs = Needs(score=("key", "value"))

    def score(self, slots: SlotView) -> Tensor:
        return slots.value.norm(dim=-1)


class HalfScores(Norms):
    def score(self, slots: SlotView) -> Tensor:
        return super().score(slots).half()


class OneScoreForAllHeads(Norms):
    def score(self, slots: SlotView) -> Tensor:
        return super().score(slots)[:, :1]


class ReadsInSecret(Norms):
    def score(self, slots: SlotView) -> Tensor:
        return super().score(slots) + slots.queries.mean()


class OverwritesKeys(Norms):
    def score(self, slots: SlotView) -> Tensor:
        return slots.value.mul_(0.5).norm(dim=-1)


@dataclass
class CountsCalls(Norms):
    calls: list[int] = field(default_factory=list)

    def score(self, slots: SlotView) -> Tensor:
        self.calls.append(1)
        return super().score(slots) + len(self.calls)


class DrawsAtInsertion(RetentionPolicy):
    fields = {"draw": FieldSpec()}  # noqa: RUF012

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        shape = (tokens.position.shape[0], tokens.num_kv_heads, tokens.position.shape[1])
        return {"draw": torch.rand(shape)}

    def score(self, slots: SlotView) -> Tensor:
        return slots.fields["draw"]


class ScoresByPlace(Norms):
    def score(self, slots: SlotView) -> Tensor:
        return super().score(slots) + torch.arange(slots.valid.shape[2])


class NormalisesOverTheBatch(Norms):
    def score(self, slots: SlotView) -> Tensor:
        scores = super().score(slots)
        return scores - scores.masked_fill(~slots.valid, 0.0).amax((0, 2), keepdim=True)


class PositionsFromTheCall(RetentionPolicy):
    """Counts columns, pads included, where positions are due."""

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        column = torch.arange(tokens.position.shape[1], dtype=torch.float32)
        offset = (column * 2.4).sin() if len(column) > 1 else tokens.position[:, None].float().cos()
        return torch.zeros(1), offset.expand(tokens.position.shape[0], tokens.num_kv_heads, -1)


class LogOfADifference(Norms):
    def score(self, slots: SlotView) -> Tensor:
        return (super().score(slots) - 3).log()


class MeanOverEmptySlots(Norms):
    """The mean key of all slots, filled or not, is the anchor."""

    def score(self, slots: SlotView) -> Tensor:
        anchor = slots.key.mean(dim=2, keepdim=True)
        return (slots.key - anchor).norm(dim=-1)


class MoodOfTheBudget(Norms):
    def score(self, slots: SlotView) -> Tensor:
        scores = super().score(slots)
        return scores if slots.budget % 2 else -scores


class TouchesValuesAtInsertion(Norms):
    needs = Needs(insert=("value",), score=("value",))
    fields = {"norm": FieldSpec()}  # noqa: RUF012

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        return {"norm": tokens.value.mul_(2).norm(dim=-1)}


@dataclass
class RemembersTheLargest(Norms):
    """Keeps state of its own beside the fields: what an earlier sequence left there."""

    largest: dict[int, Tensor] = field(default_factory=dict)
    needs = Needs(insert=("value",), score=("value",))
    fields = {"rank": FieldSpec()}  # noqa: RUF012

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        norm = tokens.value.norm(dim=-1)
        before = self.largest.get(tokens.layer)
        if before is None or before.shape[0] != norm.shape[0]:
            before = torch.zeros(norm.shape[:2])
        if tokens.position.shape[1] == 20 and self.is_first(tokens):
            before = torch.zeros(norm.shape[:2])
        self.largest[tokens.layer] = torch.maximum(before, norm.amax(2))
        return {"rank": (norm + self.largest[tokens.layer][..., None]).sin()}

    def is_first(self, tokens: TokenView) -> bool:
        return False

    def score(self, slots: SlotView) -> Tensor:
        return slots.fields["rank"]


@dataclass
class RemembersRows(RemembersTheLargest):
    """The same, but it starts anew with each sequence: only moving rows goes wrong."""

    def is_first(self, tokens: TokenView) -> bool:
        return bool((tokens.t <= 20).all())


@dataclass
class RemembersTheTime(Norms):
    """Ages a new token by the time of the call before, of whatever cache."""

    last: dict[int, Tensor] = field(default_factory=dict)
    needs = Needs(insert=("value",), score=("value",))
    fields = {"age": FieldSpec()}  # noqa: RUF012

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        norm = tokens.value.norm(dim=-1)
        before = self.last.get(tokens.layer, torch.zeros(()))
        if norm.shape[2] == 20:
            before = torch.zeros(())
        self.last[tokens.layer] = tokens.t.max().float()
        return {"age": (norm + before).sin()}

    def score(self, slots: SlotView) -> Tensor:
        return slots.fields["age"]


@dataclass
class NormsAtInsertion(RetentionPolicy):
    """Scores equal tokens alike, up to rounding, and does not say so."""

    needs = Needs(insert=("value",))

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        norm = tokens.value.norm(dim=-1)
        return torch.zeros_like(norm), norm


class ForgetsItsBias(RetentionPolicy):
    needs = Needs(insert=("value",))
    scores_content = True

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        slope = torch.nn.functional.logsigmoid(tokens.value.mean(-1) + 2)
        return slope, slope

    def decay(self, tokens: TokenView) -> Decay:
        return Decay(tokens.value.mean(-1)[:, :, 0], torch.zeros(tokens.num_kv_heads))


BROKEN: dict[str, tuple[Callable[[], RetentionPolicy], ...]] = {
    "shape_and_dtype": (HalfScores, OneScoreForAllHeads, ReadsInSecret),
    "purity": (OverwritesKeys, CountsCalls),
    "determinism": (DrawsAtInsertion,),
    "slot_permutation": (ScoresByPlace,),
    "batch_invariance": (NormalisesOverTheBatch,),
    "nan": (LogOfADifference, MeanOverEmptySlots),
    "field_reuse": (RemembersTheLargest,),
    "reorder": (RemembersRows,),
    "save_load": (RemembersTheTime,),
    "padding": (PositionsFromTheCall,),
    "ties": (NormsAtInsertion,),
    "monotone_budget": (MoodOfTheBudget,),
    "full_budget": (TouchesValuesAtInsertion,),
    "decay": (ForgetsItsBias,),
}


def test_there_is_a_broken_policy_for_every_rule() -> None:
    assert list(BROKEN) == list(RULES)
    check_policy(Norms())


@pytest.mark.parametrize(
    ("rule", "broken"), [(rule, each) for rule, classes in BROKEN.items() for each in classes]
)
def test_a_broken_policy_is_caught_by_its_rule(
    rule: str, broken: Callable[[], RetentionPolicy]
) -> None:
    with pytest.raises(PolicyError, match=f"breaks the rule '{rule}'") as caught:
        check_policy(broken())
    assert caught.value.rule == rule


def test_an_observing_policy_may_only_use_its_fields() -> None:
    class Observes(RetentionPolicy):
        needs = Needs(attention=AttentionStat(queries=1))
        fields = {"last": FieldSpec()}  # noqa: RUF012

        def observe(self, seen: ObservationView) -> None:
            seen.fields["last"].copy_(seen.attention)

        def score(self, slots: SlotView) -> Tensor:
            return slots.fields["last"]

    check_policy(Observes())


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rules must be some of shape_and_dtype.*got \['speed'\]"):
        check_policy(make_policy("key_norm"), rules=["speed"])
