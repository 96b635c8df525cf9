"""Random in the cache: a score drawn once samples uniformly, one drawn anew does not."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from trimkv_kernels import BoundedKVCache, RetentionPolicy, SlotView
from trimkv_kernels.policies import make_policy

BUDGET, TOTAL, HEADS = 16, 200, 1024


@dataclass(frozen=True)
class DrawnAnew(RetentionPolicy):
    """What Random must not be: a new draw at each eviction."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def score(self, slots: SlotView) -> Tensor:
        return torch.rand(slots.position.shape, generator=self.generator)


def survival(policy: RetentionPolicy) -> Tensor:
    """Share of the heads that hold each position after ``TOTAL`` tokens, newest first."""
    cache = BoundedKVCache(
        policy,
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=8,
        batch_size=1,
        budget=BUDGET,
        buffer=1,
        sinks=0,
        recent=0,
        dtype=torch.float32,
        device="cpu",
        impl="torch",
    )
    for new in [BUDGET] + [1] * (TOTAL - BUDGET):
        token = torch.zeros(1, HEADS, new, 8)
        cache.attend(0, token, token, token)
        cache.evict()
    held = cache.positions(0).flatten()
    held = held[held >= 0]
    assert held.numel() == HEADS * BUDGET
    return torch.bincount(held.long(), minlength=TOTAL).flip(0) / HEADS


def chi_square(share: Tensor, law: Tensor) -> float:
    return (HEADS * (share - law).square() / (law * (1 - law))).sum().item()


AGE = torch.arange(1, TOTAL + 1)
UNIFORM = torch.full((TOTAL,), BUDGET / TOTAL)
GEOMETRIC = (BUDGET / (BUDGET + 1)) ** AGE.double().clamp(max=TOTAL - BUDGET)


def test_geometric_law_of_a_new_draw() -> None:
    """The law that tells the two apart: .941, .513, .045 after 1, 11 and 51 evictions."""
    law = GEOMETRIC[[0, 10, 50]].tolist()
    assert law == pytest.approx([0.941, 0.513, 0.045], abs=5e-4)
    share = survival(DrawnAnew())
    # 5 standard deviations of a share
    bound = 5 * (GEOMETRIC * (1 - GEOMETRIC) / HEADS).sqrt() + 1e-3
    assert ((share - GEOMETRIC).abs() < bound).all()
    assert chi_square(share, UNIFORM) > 10_000


@pytest.mark.parametrize("seed", [0, 7])
def test_uniform_survival_of_one_draw(seed: int) -> None:
    """A reservoir sample: M / T = .08 at every age."""
    share = survival(make_policy("random", seed=seed))
    # chi-square with 199 degrees of freedom: mean 199, standard deviation 20
    assert 110 < chi_square(share, UNIFORM) < 300
    assert ((share - 0.08).abs() < 5 * (0.08 * 0.92 / HEADS) ** 0.5).all()
    assert (share - GEOMETRIC).abs().max() > 0.8
    halves = share.reshape(2, -1).mean(1)
    assert halves.tolist() == pytest.approx([0.08, 0.08], abs=0.003)
