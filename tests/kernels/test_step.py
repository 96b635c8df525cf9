"""The whole decode step, append, attend, evict, over several evictions.

The oracle keeps every token that ever came and, per head, the set of positions still held: it has
no slots. So it also fails if a row moves to the wrong place, or a stale one is attended to.
"""

import oracle
import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import Slots, append_attention, evict

pytestmark = pytest.mark.numeric

LAYERS, BATCH, HEADS, GROUP, HEAD_DIM = 2, 2, 2, 2, 16
Head = tuple[int, int, int]


class History:
    """Every real token of every row, and what each head still holds."""

    def __init__(self, budget: int, buffer: int, sinks: int, recent: int) -> None:
        self.budget, self.buffer, self.sinks, self.recent = budget, buffer, sinks, recent
        self.tokens: dict[Head, dict[int, dict[str, Tensor]]] = {}
        self.held: dict[Head, set[int]] = {}
        self.evictions = 0
        for head in torch.cartesian_prod(*map(torch.arange, (LAYERS, BATCH, HEADS))).tolist():
            self.tokens[tuple(head)], self.held[tuple(head)] = {}, set()

    def step(self, layer: int, new: dict[str, Tensor], t: Tensor, valid: Tensor) -> Tensor:
        """Take one layer's tokens and give the float64 attention outputs."""
        output = torch.zeros(new["query"].shape, dtype=torch.float64)
        for row in range(BATCH):
            for head in range(HEADS):
                where = (layer, row, head)
                if valid[row]:
                    position = int(t[row]) - 1
                    self.tokens[where][position] = {k: x[row, head] for k, x in new.items()}
                    self.held[where].add(position)
                held = [self.tokens[where][p] for p in sorted(self.held[where])]
                if not held:
                    continue
                key, value = (
                    torch.stack([x[name] for x in held])[None, None]
                    for name in ("new_key", "new_value")
                )
                group = slice(head * GROUP, (head + 1) * GROUP)
                query = new["query"][row : row + 1, group]
                output[row, group] = oracle.attention(query, key, value, None)[0]
        return output

    def evict(self, t: Tensor) -> None:
        for where, held in self.held.items():
            if len(held) < self.budget + self.buffer:
                continue
            positions = sorted(held)
            slope, offset = (
                torch.stack([self.tokens[where][p][name] for p in positions])[None, None, None]
                for name in ("new_slope", "new_offset")
            )
            now = t[where[1] : where[1] + 1]
            scores = oracle.affine_scores(slope, offset, now, torch.tensor(positions))
            self.held[where] = oracle.kept_positions(
                scores.flatten().tolist(), positions, self.budget, int(now), self.sinks, self.recent
            )
            self.evictions += 1


def make_new(rng: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "query": torch.randn(BATCH, HEADS * GROUP, HEAD_DIM, generator=rng).to(dtype),
        "new_key": torch.randn(BATCH, HEADS, HEAD_DIM, generator=rng).to(dtype),
        "new_value": torch.randn(BATCH, HEADS, HEAD_DIM, generator=rng).to(dtype),
        "new_slope": -torch.rand(BATCH, HEADS, generator=rng),
        "new_offset": torch.randn(BATCH, HEADS, generator=rng),
    }


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("budget", "buffer", "sinks", "recent", "dtype"),
    [(4, 1, 0, 0, torch.float32), (5, 3, 1, 2, torch.float16)],
    ids=["every-step", "rounds"],
)
def test_steps_follow_the_oracle(
    budget: int, buffer: int, sinks: int, recent: int, dtype: torch.dtype, impl: str, device: str
) -> None:
    history = History(budget, buffer, sinks, recent)
    slots = Slots.zeros(LAYERS, BATCH, HEADS, budget + buffer, HEAD_DIM, dtype=dtype, device=device)
    t = torch.zeros(BATCH, dtype=torch.int32)
    rng = torch.Generator().manual_seed(6)
    tolerance = {torch.float32: 2e-6, torch.float16: 4e-3}[dtype]
    for step in range(14):
        # The second row is padded on the left, and pauses once later.
        valid = torch.tensor([True, step not in (0, 1, 2, 9)])
        t += valid
        for layer in range(LAYERS):
            new = make_new(rng, dtype)
            expected = history.step(layer, new, t, valid)
            output = append_attention(
                **{name: x.to(device) for name, x in new.items()},
                slots=slots,
                t=t.to(device),
                layer=layer,
                valid=None if valid.all() else valid.to(device),
                impl=impl,
            )
            torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=tolerance)
        history.evict(t)
        evict(slots, t.to(device), buffer=buffer, sinks=sinks, recent=recent, impl=impl)
        for where, held in history.held.items():
            count = int(slots.num_valid[where])
            assert sorted(slots.position[where][:count].tolist()) == sorted(held)
    assert history.evictions >= 12
