"""Rows by index: decode steps in a storage that has more rows than the call, with gaps between."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import Slots, append_attention, evict

pytestmark = pytest.mark.numeric

STORED, HEADS, GROUP, HEAD_DIM = 6, 2, 2, 16
BUDGET, BUFFER, SINKS, RECENT = 4, 3, 1, 2
NUM_SLOTS = BUDGET + BUFFER
POISON = 0xFF  # every float of it is NaN


def blocks(dtype: torch.dtype, device: str) -> tuple[Slots, Tensor]:
    """Slots whose rows are blocks of bytes with all tensors of the row in them, and these bytes."""
    dense = Slots.zeros(
        1, STORED, HEADS, NUM_SLOTS, HEAD_DIM, dtype=dtype, fields=[((3,), torch.float32)]
    )
    sizes = {name: x[0, 0].nbytes for name, x in dense.tensors().items() if name != "nan_seen"}
    memory = torch.full((STORED, sum(sizes.values()) + 64), POISON, dtype=torch.uint8)
    memory = memory.to(device)
    views, begin = {}, 0
    for name, size in sizes.items():
        like = dense.tensors()[name]
        view = memory[:, begin : begin + size].view(like.dtype).view(STORED, *like.shape[2:])
        views[name] = view[None]
        begin += size
    fields = (views.pop("fields[0]"),)
    return Slots(**views, fields=fields), memory


def clear(slots: Slots, rows: list[int]) -> None:
    for row in rows:
        slots.row(row).map(Tensor.zero_)
        slots.capacity[0, row] = NUM_SLOTS


def new_tokens(rng: torch.Generator, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "query": torch.randn(batch, HEADS * GROUP, HEAD_DIM, generator=rng).to(dtype),
        "new_key": torch.randn(batch, HEADS, HEAD_DIM, generator=rng).to(dtype),
        "new_value": torch.randn(batch, HEADS, HEAD_DIM, generator=rng).to(dtype),
        "new_slope": -torch.rand(batch, HEADS, generator=rng),
        "new_offset": torch.randn(batch, HEADS, generator=rng),
    }


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("by_scores", [False, True], ids=["affine", "scores"])
def test_a_row_by_index_does_what_it_does_alone(by_scores: bool, impl: str, device: str) -> None:
    dtype = torch.float16 if by_scores else torch.float32
    slots, memory = blocks(dtype, device)
    rows = [4, 1, 3]
    clear(slots, rows)
    untouched = memory[[0, 2, 5]].clone()
    alone = [
        Slots.zeros(1, 1, HEADS, NUM_SLOTS, HEAD_DIM, dtype=dtype, device=device) for _ in rows
    ]
    rng = torch.Generator().manual_seed(3)
    t = torch.tensor([0, 5, 9], dtype=torch.int32, device=device)  # they are of different ages
    index = torch.tensor(rows, dtype=torch.int32, device=device)
    for step in range(9):
        valid = torch.tensor([True, step != 4, True], device=device)
        t += valid
        new = {name: x.to(device) for name, x in new_tokens(rng, len(rows), dtype).items()}
        lse = torch.empty(len(rows), HEADS * GROUP, device=device)
        output = append_attention(
            **new, slots=slots, t=t, layer=0, rows=index, valid=valid, lse=lse, impl=impl
        )
        scores = None
        if by_scores:
            scores = torch.randn(1, len(rows), HEADS, NUM_SLOTS, generator=rng).to(device)
        options = {"buffer": BUFFER, "sinks": SINKS, "recent": RECENT, "impl": impl}
        evict(slots, t, rows=index, scores=scores, **options)
        for row, own in enumerate(alone):
            here = slice(row, row + 1)
            own_lse = torch.empty(1, HEADS * GROUP, device=device)
            expected = append_attention(
                **{name: x[here] for name, x in new.items()},
                slots=own, t=t[here], layer=0, valid=valid[here], lse=own_lse, impl=impl,
            )  # fmt: skip
            own_scores = None if scores is None else scores[:, here]
            evict(own, t[here], scores=own_scores, **options)
            # the same operations in the same order, but perhaps in other tiles
            tolerance = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(output[here], expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse[here], own_lse, rtol=1e-5, atol=1e-5)
            stored = slots.row(rows[row])
            assert torch.equal(stored.num_valid, own.num_valid)
            count = int(own.num_valid[0, 0, 0])
            for name in ("key", "value", "position", "slope", "offset"):
                kept = getattr(stored, name)[:, :, :, :count]
                assert torch.equal(kept, getattr(own, name)[:, :, :, :count]), name
    assert torch.equal(memory[[0, 2, 5]], untouched)
    assert bool((memory[rows, -64:] == POISON).all())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fields_move_with_their_pairs(impl: str, device: str) -> None:
    slots, _ = blocks(torch.float32, device)
    clear(slots, [5, 2])
    position = torch.arange(NUM_SLOTS, dtype=torch.int32, device=device)
    for row in (5, 2):
        slots.position[0, row] = position
        slots.fields[0][0, row] = (100 * row + position)[:, None]
        slots.num_valid[0, row] = NUM_SLOTS
        slots.offset[0, row] = torch.tensor([3.0, 9, 1, 8, 2, 7, 6], device=device)
    index = torch.tensor([5, 2], dtype=torch.int32, device=device)
    t = torch.tensor([NUM_SLOTS, NUM_SLOTS], dtype=torch.int32, device=device)
    evict(slots, t, rows=index, buffer=BUFFER, impl=impl)
    for row in (5, 2):
        kept = slots.position[0, row, :, :BUDGET]
        assert sorted(kept[0].tolist()) == [1, 3, 5, 6]
        assert torch.equal(slots.fields[0][0, row, :, :BUDGET, 0], (100 * row + kept).float())


def test_what_does_not_fit_is_named() -> None:
    slots, _ = blocks(torch.float32, "cpu")
    clear(slots, [1])
    new = new_tokens(torch.Generator().manual_seed(0), 1, torch.float32)
    t = torch.ones(1, dtype=torch.int32)
    rows = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="rows must have shape \\[1\\], got \\[2\\]"):
        append_attention(**new, slots=slots, t=t, layer=0, rows=torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="key must be contiguous"):
        evict(slots, torch.ones(STORED, dtype=torch.int32), buffer=BUFFER)
    turned = slots.key.mT.contiguous().mT
    turned = replace(slots, key=turned, value=turned)
    with pytest.raises(ValueError, match="key must be contiguous"):
        evict(turned, t, rows=rows, buffer=BUFFER)
    apart = replace(slots, value=slots.value.contiguous())
    with pytest.raises(ValueError, match="key, value must have the same stride from row to row"):
        evict(apart, t, rows=rows, buffer=BUFFER)
    mass = torch.zeros(1, 1, HEADS, NUM_SLOTS)
    with pytest.raises(ValueError, match="pass it without rows="):
        append_attention(**new, slots=slots, t=t, layer=0, rows=rows, mass=mass)
