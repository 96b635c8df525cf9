"""Selection among a longer call's candidates, against the rule in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_kernels.kernels import affine_scores, select_slots

SPECIAL = [0.0, -0.0, 1.0, 1.0, -2.5, math.inf, -math.inf, math.nan]


def chosen_by_rule(
    scores: list[float],
    position: list[int],
    valid: list[bool],
    t: int,
    budget: int,
    num_slots: int,
    sinks: int,
    recent: int,
) -> list[int]:
    candidates = [i for i, real in enumerate(valid) if real]
    if len(candidates) < num_slots:
        return candidates

    def rank(i: int) -> tuple[float, int]:
        protected = position[i] < sinks or position[i] >= t - recent
        score = -math.inf if math.isnan(scores[i]) else scores[i]
        return (math.inf if protected else score, position[i])

    return sorted(sorted(candidates, key=rank)[-budget:])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_rule(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    budget = data.draw(st.integers(1, 20))
    num_slots = budget + data.draw(st.integers(1, 8))
    sinks, recent = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    rows = []
    for _ in range(2):
        score = st.sampled_from(SPECIAL) | st.floats(-3, 3, width=32)
        rows.append(
            (
                data.draw(st.lists(score, min_size=count, max_size=count)),
                data.draw(st.permutations(range(count))),
                data.draw(st.lists(st.booleans(), min_size=count, max_size=count)),
            )
        )
    scores = torch.tensor([[row[0]] for row in rows])
    position = torch.tensor([[row[1]] for row in rows], dtype=torch.int32)
    valid = torch.tensor([[row[2]] for row in rows])
    t = torch.tensor([count, count + 2], dtype=torch.int32)
    nan_seen = torch.zeros((), dtype=torch.int32)
    index, kept = select_slots(
        scores, position, valid, t,
        budget=budget, num_slots=num_slots, sinks=sinks, recent=recent, nan_seen=nan_seen,
    )  # fmt: skip
    assert index.shape == (2, 1, min(num_slots - 1, count))
    assert index.min() >= 0
    assert index.max() < count
    for b, row in enumerate(rows):
        expected = chosen_by_rule(*row, int(t[b]), budget, num_slots, sinks, recent)
        assert index[b, 0, : kept[b, 0]].tolist() == expected
    seen = any(math.isnan(s) and real for row in rows for s, real in zip(row[0], row[2], strict=1))
    assert nan_seen.item() == int(seen)


def test_affine_scores_round_twice() -> None:
    slope = torch.full((1, 1, 1), 1.0 + 2**-23)
    offset = torch.full((1, 1, 1), -3.0)
    score = affine_scores(slope, offset, torch.tensor([4]), torch.tensor([[[1]]]))
    product = float(torch.tensor(1.0 + 2**-23) * 3)
    assert score.item() == product - 3.0


def test_bad_arguments() -> None:
    scores = torch.zeros(2, 3, 8)
    position = torch.arange(8, dtype=torch.int32).expand(2, 3, 8)
    valid = torch.ones(2, 3, 8, dtype=torch.bool)
    t = torch.tensor([8, 8], dtype=torch.int32)
    good = {"scores": scores, "position": position, "valid": valid, "t": t}
    sizes = {"budget": 4, "num_slots": 6}
    for change, message in (
        ({"scores": scores[0]}, r"scores must have shape \[batch, num_kv_heads, candidates\]"),
        ({"scores": scores.double()}, "scores must have dtype float32, got float64"),
        ({"position": position[..., :7]}, r"position must have shape \[2, 3, 8\], got \[2, 3, 7\]"),
        ({"position": position.long()}, "position must have dtype int32, got int64"),
        ({"valid": valid.int()}, "valid must have dtype bool, got int32"),
        ({"valid": valid.to("meta")}, "valid must be on cpu, got meta"),
        ({"t": t[:1]}, r"t must have shape \[2\], got \[1\]"),
        ({"budget": 6}, "budget must be between 1 and 5, got 6"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"recent": -1}, "recent must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            select_slots(**{**good, **sizes, **change})
