"""R-KV: the worked example, redundancy written out in float64, and what must not matter."""

import itertools
import math

import pytest
import torch
from attention_cases import ragged_window, rows_of, window_slots

from trimkv_kernels.policies import make_policy, r_kv
from trimkv_kernels.policies.r_kv import RKV, key_redundancy
from trimkv_kernels.policies.snap_kv import SnapKV

pytestmark = pytest.mark.numeric

KEYS = torch.tensor([[1, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 1], [0.9, 0]])[None, None]


def written_out(key: torch.Tensor, threshold: float) -> torch.Tensor:
    """Redundancy of the keys ``[n, head_dim]`` of a head, one cosine at a time."""
    key, n = key.double(), len(key)
    means = [0.0] * n
    for i in range(n):
        cosine = [
            0.0 if i == j else float(torch.cosine_similarity(key[i], key[j], dim=0))
            for j in range(n)
        ]
        similar = [j for j in range(n) if cosine[j] > threshold]
        if similar:
            cosine[similar[-1]] = 0.0
        means = [mean + c / n for mean, c in zip(means, cosine, strict=True)]
    total = math.fsum(math.exp(mean) for mean in means)
    return torch.tensor([math.exp(mean) / total for mean in means])


def test_worked_example() -> None:
    position = torch.arange(6)[None, None]
    view = window_slots(
        KEYS,
        torch.tensor([[[[1.0, 0]], [[0, 2]]]]),
        t=torch.tensor([6]),
        position=position,
        valid=position >= 0,
        query_position=torch.tensor([[5]]),
    )
    redundancy = key_redundancy(KEYS, position >= 0, threshold=0.5)
    expected = [0.191202, 0.161849, 0.199666, 0.171982, 0.153428, 0.121872]
    torch.testing.assert_close(redundancy[0, 0], torch.tensor(expected), atol=1e-6, rtol=0)

    scores = make_policy("r_kv", window=1, kernel_size=1, mix=0.1).score(view)[0, 0]
    expected = [-0.159712, -0.120577, -0.16733, -0.129697, -0.112998, math.inf]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)
    assert set(scores.topk(4).indices.tolist()) == {4, 1, 3, 5}
    assert scores.argsort(descending=True).tolist() == [5, 4, 1, 3, 0, 2]


@pytest.mark.parametrize("rows", [1, 7, 128])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_redundancy_in_float64(
    rows: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of rows at a time; at a threshold of 1 no two keys are similar."""
    monkeypatch.setattr(r_kv, "_ROWS", rows)
    view = ragged_window(window=2)
    actual = key_redundancy(view.key, view.valid, threshold=threshold)
    assert actual.isfinite().all()
    for row, head in itertools.product(range(3), range(3)):
        valid = view.valid[row, head]
        if valid.any():
            expected = written_out(view.key[row, head][valid], threshold)
            torch.testing.assert_close(actual[row, head][valid], expected, atol=1e-6, rtol=0)


def test_the_latest_of_several_alike_is_spared() -> None:
    """The authors' code with no similar key spares slot 0; here it spares nothing."""
    alike = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])[None, None]
    redundancy = key_redundancy(alike, torch.ones(1, 1, 4, dtype=torch.bool), threshold=0.5)
    # sums of [0 1 .], [1 0 .] and [1 . 0], where . is the latest of the others
    expected = torch.tensor([2 / 4, 1 / 4, 0, 0]).softmax(dim=0)
    torch.testing.assert_close(redundancy[0, 0], expected)
    opposed = torch.tensor([[1.0, 0], [-1, 0]])[None, None]
    redundancy = key_redundancy(opposed, torch.ones(1, 1, 2, dtype=torch.bool), threshold=0.5)
    torch.testing.assert_close(redundancy, torch.full((1, 1, 2), 0.5))


def test_score_mixes_importance_and_redundancy() -> None:
    view = ragged_window(window=6)
    importance = SnapKV(window=6, kernel_size=5, pooling="max", group="max", variant="decoding")
    importance = importance.score(view)
    redundancy = key_redundancy(view.key, view.valid, threshold=0.4)
    scores = RKV(window=6, kernel_size=5, mix=0.3, threshold=0.4).score(view)
    kept = view.position >= (view.t - 6)[:, None, None]
    assert (scores[kept & view.valid] == math.inf).all()
    past = ~kept & view.valid
    assert past.sum() > 100
    torch.testing.assert_close(scores[past], (0.3 * importance - 0.7 * redundancy)[past])
    assert not scores.isnan().any()


def test_rows_and_empty_slots_do_not_matter() -> None:
    policy, view = RKV(window=6), ragged_window(window=6)
    together = policy.score(view)
    for row in range(3):
        for num_slots in (40, 57):
            alone = policy.score(rows_of(view, slice(row, row + 1), num_slots=num_slots))
            valid = view.valid[row]
            torch.testing.assert_close(
                alone[0, :, :40][valid], together[row][valid], atol=1e-6, rtol=0
            )


def test_needs() -> None:
    needs = RKV(window=9).needs
    assert (needs.score, needs.query_window, needs.chronological) == (("key",), 9, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"mix": 1.5}, r"mix must lie in \[0, 1\], got 1.5"),
        ({"threshold": -0.5}, r"threshold must lie in \[0, 1\], got -0.5"),
    ],
)
def test_refuses_what_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RKV(**options)
