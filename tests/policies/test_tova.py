"""TOVA: the worked example, and one kept set for all heads."""

import torch
from attention_cases import HEAD0, HEAD1, slots

from trimkv_kernels.policies import AttentionStat, make_policy
from trimkv_kernels.policies.tova import TOVA


def test_worked_example() -> None:
    """Means of the last rows. kvpress gives the newest a maximum + 1 instead of its 0.25."""
    mass = torch.tensor([HEAD0[-1], HEAD1[-1]])[None]  # two KV heads of one query head each
    scores = make_policy("tova").score(slots({"mass": mass}))
    expected = torch.tensor([0.2, 0.25, 0.15, 0.15, 0.25]).expand(1, 2, 5)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert set(scores[0, 0].topk(3).indices.tolist()) == {0, 1, 4}
    assert scores[0, 0].argmax() in (1, 4)  # a tie; the authors' topk happens to return 1


def test_attention_stores_the_last_query_itself() -> None:
    policy = TOVA()
    assert policy.needs.attention == AttentionStat(queries=1, group="mean", into="mass")
    assert policy.needs.chronological  # so that slots of all heads line up
    assert (policy.sinks, policy.recent) == (0, 0)


def test_mean_over_all_query_heads_of_each_row() -> None:
    torch.manual_seed(0)
    attention = torch.rand(3, 4, 2, 6)  # batch, KV heads, group, slots
    scores = TOVA().score(slots({"mass": attention.mean(dim=2)}))
    assert scores.shape == (3, 4, 6)
    assert scores.dtype == torch.float32
    for row in range(3):
        expected = attention[row].double().flatten(0, 1).mean(0).float()
        for head in range(4):
            torch.testing.assert_close(scores[row, head], expected)
