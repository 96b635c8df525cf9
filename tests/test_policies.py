"""The policy protocol, the registry, and the formulas that need no gates."""

import pytest
import torch

from trimkv_kernels import Needs, RetentionPolicy, SlotView, TokenView, available_policies
from trimkv_kernels.policies import make_policy, register_policy
from trimkv_kernels.policies.random import Random


def tokens(position: torch.Tensor, layer: int = 0, heads: int = 2) -> TokenView:
    return TokenView(
        policy="test",
        layer=layer,
        t=position[:, -1] + 1,
        position=position.int(),
        valid=torch.ones_like(position, dtype=torch.bool),
        num_kv_heads=heads,
    )


def test_available_policies() -> None:
    assert set(available_policies()) >= {"full", "key_norm", "random", "streaming_llm", "trimkv"}


def test_streaming_llm_scores_by_age() -> None:
    slope, offset = make_policy("streaming_llm").affine(tokens(torch.arange(4)[None]))
    age = 10 - torch.arange(4)
    assert torch.equal((slope * age + offset).expand(1, 2, 4)[0, 0], -age.float())


def test_random_is_one_uniform_draw_per_token_and_head() -> None:
    position = torch.arange(20_000)[None]
    slope, draw = Random().affine(tokens(position))
    assert torch.equal(slope, torch.zeros_like(slope))
    assert draw.min() >= 0
    assert draw.max() < 1
    assert draw.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draw.var().item() == pytest.approx(1 / 12, abs=0.005)
    correlation = torch.corrcoef(torch.stack((draw[0, 0], draw[0, 1], draw[0, 0].roll(1))))
    assert (correlation - torch.eye(3)).abs().max() < 0.03
    assert draw.unique().numel() > 39_000


def test_random_depends_on_seed_layer_head_position_only() -> None:
    whole = Random(seed=3).affine(tokens(torch.arange(50)[None]))[1]
    part = Random(seed=3).affine(tokens(torch.arange(20, 30)[None].expand(4, -1)))[1]
    assert torch.equal(part[2], whole[0, :, 20:30])
    for other in (
        Random(seed=4).affine(tokens(torch.arange(50)[None])),
        Random(seed=3).affine(tokens(torch.arange(50)[None], layer=1)),
    ):
        assert not torch.equal(other[1], whole)


def test_undeclared_reads_name_policy_and_need() -> None:
    view = tokens(torch.arange(3)[None])
    with pytest.raises(AttributeError, match=r"'test' reads 'hidden_states'.*Needs\(insert"):
        _ = view.hidden_states
    zero = torch.zeros(1, 1, 3)
    slots = SlotView("mine", 0, torch.tensor([3]), zero.int(), zero == 0)
    with pytest.raises(AttributeError, match=r"'mine' reads 'value'.*Needs\(score"):
        _ = slots.value


def test_needs_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"Needs\(insert=\) must name some of .*'keys'"):
        Needs(insert=("keys",))
    with pytest.raises(ValueError, match=r"Needs\(score=\) must name some of .*'query'"):
        Needs(score=("query",))


def test_unknown_policy_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'h20'; known: .*key_norm.*streaming_llm"):
        make_policy("h20")
    with pytest.raises(ValueError, match=r"Did you mean 'h2o'\?$"):
        make_policy("h20")


def test_registry_refuses_a_taken_name_and_a_foreign_class() -> None:
    with pytest.raises(ValueError, match=r"'key_norm' is already taken by KeyNorm"):

        @register_policy("key_norm")
        class Other(RetentionPolicy):
            pass

    with pytest.raises(TypeError, match="must decorate a RetentionPolicy"):
        register_policy("thing")(int)  # type: ignore[type-var]
    assert "thing" not in available_policies()


def test_policy_without_a_score_says_so() -> None:
    class Empty(RetentionPolicy):
        pass

    zero = torch.zeros(1, 1, 3)
    with pytest.raises(NotImplementedError, match="'Empty' defines neither score nor affine"):
        Empty().score(SlotView("x", 0, torch.tensor([3]), zero.int(), zero == 0))
