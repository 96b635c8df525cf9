"""H2O: the worked example, the authors' kept sets, and where theirs is another rule."""

import pytest
import torch
from attention_cases import HEAD0, HEAD1, attention_rows, slots

from trimkv_kernels.policies import AttentionStat, make_policy
from trimkv_kernels.policies.h2o import H2O

pytestmark = pytest.mark.numeric

MASS = torch.stack([attention_rows(HEAD0).sum(0), attention_rows(HEAD1).sum(0)])


def kept(scores: torch.Tensor, *, budget: int, recent: int) -> list[int]:
    """Indices that stay; the last ``recent`` are protected."""
    scores = scores.clone()
    scores[-recent:] = torch.inf
    return sorted(scores.topk(budget).indices.tolist())


@pytest.mark.parametrize(
    ("group", "normalize", "expected"),
    [
        ("mean", False, [2.15, 1.55, 0.6, 0.45, 0.25]),
        ("max", False, [2.8, 2.3, 0.6, 0.5, 0.3]),
        ("mean", True, [0.43, 0.3875, 0.2, 0.225, 0.25]),  # as kvpress
    ],
)
def test_worked_example(group: str, normalize: bool, expected: list[float]) -> None:
    """Both heads' masses are [2.8 .8 .6 .5 .3] and [1.5 2.3 .6 .4 .2]."""
    torch.testing.assert_close(
        MASS, torch.tensor([[2.8, 0.8, 0.6, 0.5, 0.3], [1.5, 2.3, 0.6, 0.4, 0.2]])
    )
    policy = make_policy("h2o", group=group, normalize=normalize)
    mass = getattr(torch, "amax" if group == "max" else "mean")(MASS, dim=0)[None, None]
    scores = policy.score(slots({"mass": mass}))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[0, 0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("group", ["mean", "max"])
def test_attention_adds_the_mass_up_itself(group: str) -> None:
    policy = H2O(group=group)
    assert policy.needs.attention == AttentionStat(group=group, into="mass")
    assert set(policy.fields) == {"mass"}
    assert policy.sinks == 0


def test_kept_sets_of_the_authors_decoding() -> None:
    """One heavy hitter and two recent tokens, cut after every step (real_drop)."""
    mass, position = attention_rows(HEAD0[:4]).sum(0), torch.arange(4)
    expected = [
        ([0, 2, 3], [2.5, 0.4, 0.4], [0.1, 0.5, 0.3, 0.1]),
        ([0, 3, 4], [2.6, 0.7, 0.1], [0.1, 0.6, 0.1, 0.2]),
        ([0, 4, 5], [2.7, 0.2, 0.2], None),
    ]
    for t, (positions, masses, attention) in enumerate(expected, start=4):
        view = slots({"mass": mass[None, None]}, t=[t], position=position[None, None])
        stay = kept(H2O().score(view)[0, 0], budget=3, recent=2)
        mass, position = mass[stay], position[stay]
        assert position.tolist() == positions
        torch.testing.assert_close(mass, torch.tensor(masses), atol=1e-6, rtol=0)
        if attention is not None:
            mass = torch.cat((mass, torch.zeros(1))) + torch.tensor(attention)
            position = torch.cat((position, torch.tensor([t])))


def test_what_leaves_does_not_come_back() -> None:
    """The authors' simulation counts the coming token as recent and may revive a slot.

    There slot 4 is hidden once, its score alive (mask [1 0 0 0 0 1 1]); here it is recent and seen.
    """
    mass = torch.tensor([2.5, 0.7, 0.4, 0.4, 0.2, 0.1])[None, None]
    assert kept(H2O().score(slots({"mass": mass}))[0, 0], budget=3, recent=2) == [0, 4, 5]


def test_normalizing_counts_each_rows_own_queries() -> None:
    torch.manual_seed(0)
    mass = torch.rand(2, 3, 5)
    position = torch.stack([torch.randperm(20)[:5] for _ in range(6)]).view(2, 3, 5)
    scores = H2O(normalize=True).score(slots({"mass": mass}, t=[20, 33], position=position))
    for row, t in enumerate((20, 33)):
        for head in range(3):
            for slot in range(5):
                queries = t - position[row, head, slot].item()
                expected = mass[row, head, slot].double() / queries
                assert scores[row, head, slot].item() == pytest.approx(expected.item(), rel=1e-6)


def test_empty_rows_are_finite() -> None:
    empty = torch.zeros(1, 2, 4)
    view = slots({"mass": empty}, t=[0], position=empty, valid=empty > 0)
    assert H2O(normalize=True).score(view).isfinite().all()


def test_refuses_other_groups() -> None:
    with pytest.raises(ValueError, match="group must be one of mean, max, got 'none'"):
        H2O(group="none")
