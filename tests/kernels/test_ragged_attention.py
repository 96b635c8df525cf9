"""Attention over heads of different lengths, in pages, against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimkv_kernels import kernels
from trimkv_kernels.kernels import Pages
from trimkv_kernels.kernels.pages import PAGE, deal

BUDGET, BUFFER = 40, 9
LENGTHS = {
    "even": [[40, 40, 40, 40], [40, 40, 40, 40]],
    "skewed": [[150, 3, 1, 2], [17, 16, 15, 64]],
    "empty": [[0, 0, 100, 0], [0, 0, 0, 0]],
}


def make_pages(
    lengths: list[list[int]], head_dim: int, dtype: torch.dtype, device: str, shuffled: bool = True
) -> tuple[Pages, Tensor]:
    """Two layers of two heads that share a budget; rows have stored 170 and 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    batch, heads = len(lengths), len(lengths[0])
    pages = Pages.zeros(1, batch, heads, BUDGET, BUFFER, head_dim, dtype=dtype)
    kept = torch.tensor([lengths], dtype=torch.int32)
    order = [torch.randperm(pages.page.shape[2], generator=generator) for _ in range(batch)]
    t = torch.tensor([170, 64][:batch], dtype=torch.int32)
    made = replace(
        pages,
        key=torch.randn(pages.key.shape, generator=generator).to(dtype),
        value=torch.randn(pages.value.shape, generator=generator).to(dtype),
        kept=kept,
        cut=t[None].clone(),
        first_page=deal(kept, BUDGET, BUFFER),
        page=torch.stack(order)[None].to(torch.int32) if shuffled else pages.page,
    )
    return made.map(lambda x: x.to(device)), t.to(device)


def slots_of(pages: Pages, row: int, head: int, count: int) -> Tensor:
    """Where a head's first slots lie, by the words of the contract."""
    first = int(pages.first_page[0, row, head])
    table = pages.page[0, row].tolist()
    return torch.tensor([table[first + i // PAGE] * PAGE + i % PAGE for i in range(count)]).long()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_matches_float64(
    name: str, padded: bool, dtype: torch.dtype, impl: str, device: str
) -> None:
    lengths, head_dim, group, layer = LENGTHS[name], 24, 3, 1
    pages, t = make_pages(lengths, head_dim, dtype, device)
    before = pages.map(torch.clone)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    query, new_key, new_value = (draw(2, heads, head_dim) for heads in (2 * group, 2, 2))
    slope, offset = draw(2, 2).float(), draw(2, 2).float()
    valid = torch.tensor([True, not padded], device=device)
    output = kernels.ragged_append_attention(
        query, new_key, new_value, pages, t + valid.int(), layer=layer, scale=0.3,
        valid=valid if padded else None, new_slope=slope, new_offset=offset, impl=impl,
    )  # fmt: skip
    untouched = torch.ones(pages.position.shape, dtype=torch.bool)
    for row in range(2):
        for head in range(2):
            in_scope = 2 * layer + head
            held = lengths[row][in_scope]
            own = slots_of(before, row, in_scope, held + 1).to(device)
            keys = before.key[0, row, own[:held]].double()
            values = before.value[0, row, own[:held]].double()
            if bool(valid[row]):
                keys = torch.cat((keys, new_key[row, head, None].double()))
                values = torch.cat((values, new_value[row, head, None].double()))
                slot = int(own[held])
                untouched[0, row, slot] = False
                assert torch.equal(pages.key[0, row, slot], new_key[row, head])
                assert torch.equal(pages.value[0, row, slot], new_value[row, head])
                assert int(pages.position[0, row, slot]) == int(t[row])
                assert pages.slope[0, row, slot] == slope[row, head]
                assert pages.offset[0, row, slot] == offset[row, head]
            queries = query[row, head * group : (head + 1) * group].double()
            expected = (queries @ keys.mT * 0.3).softmax(-1) @ values
            got = output[row, head * group : (head + 1) * group].double()
            bound = 3e-6 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(got, expected, atol=bound, rtol=0)
    for name_of, tensor in pages.tensors().items():
        same = tensor == before.tensors()[name_of]
        if tensor.shape[:3] == untouched.shape:
            same = same[untouched.to(device)]
        assert same.all(), name_of


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_head_without_room_stores_nothing(impl: str, device: str) -> None:
    pages, t = make_pages(LENGTHS["even"], 16, torch.float32, device)
    full = int(pages.first_page[0, 0, 1] - pages.first_page[0, 0, 0]) * PAGE - 40
    before = pages.map(torch.clone)
    query = torch.randn(2, 2, 16, device=device)
    one = torch.ones(2, 2, 16, device=device)
    terms = torch.zeros(2, 2, device=device)
    kernels.ragged_append_attention(
        query, one, one, pages, t + full + 1, layer=0, new_slope=terms, new_offset=terms, impl=impl
    )
    assert torch.equal(pages.key, before.key)
    assert torch.equal(pages.position, before.position)


def test_errors() -> None:
    pages, t = make_pages(LENGTHS["even"], 16, torch.float32, "cpu")
    query = torch.randn(2, 4, 16)
    new = torch.randn(2, 2, 16)
    terms = {"new_slope": torch.zeros(2, 2), "new_offset": torch.zeros(2, 2)}
    attend = kernels.ragged_append_attention
    with pytest.raises(ValueError, match="layer must be between 0 and 1, got 2"):
        attend(query, new, new, pages, t, layer=2, **terms)
    with pytest.raises(
        ValueError, match="must be given together, got None for new_slope, new_offset"
    ):
        attend(query, new, new, pages, t, layer=0)
    three = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match="pages must have whole layers of 3 heads"):
        attend(three, three, three, pages, t, layer=0, **terms)
    with pytest.raises(ValueError, match=r"t must have shape \[2\], got \[3\]"):
        attend(query, new, new, pages, torch.zeros(3, dtype=torch.int32), layer=0, **terms)
