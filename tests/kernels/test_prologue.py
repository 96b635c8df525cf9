"""Norm, rotation and the end of a gate in the launch that attends, against float64."""

import itertools
import re
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from test_ragged_attention import LENGTHS, make_pages
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimkv_kernels.kernels import Decay, Rope, append_attention, ragged_append_attention

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("poisoned_memory")]

# batch, kv heads, group, slots, head_dim: odd sizes, one and many splits
SHAPES = [
    (2, 2, 3, 130, 64),
    (1, 1, 8, 300, 128),
    (2, 1, 1, 40, 24),
    (3, 2, 2, 9, 80),
    (1, 2, 2, 70, 256),
]
EPS, BASE = 1e-6, 10_000.0


def make_call(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, normed: bool
) -> tuple[dict[str, Tensor], Rope]:
    """A token of each row, sliced out of one product as a fused projection gives it."""
    batch, heads, group, _, head_dim = shape
    rng = torch.Generator().manual_seed(3)
    whole = 3 * torch.randn(batch, (group + 2) * heads, head_dim, generator=rng)
    query, key, value = whole.to(dtype).to(device).split((group * heads, heads, heads), dim=1)
    angle = torch.arange(700, 700 + batch)[:, None] * BASE ** (
        -torch.arange(0, head_dim, 2) / head_dim
    )
    # of several tokens, of which the last is the step's
    cos, sin = (
        f(angle).repeat(1, 2)[:, None].expand(-1, 3, -1).to(dtype).to(device)[:, -1]
        for f in (torch.cos, torch.sin)
    )
    weights: tuple[Tensor | None, ...] = (None, None)
    if normed:
        weights = tuple(
            (1 + torch.randn(head_dim, generator=rng) / 3).to(dtype).to(device) for _ in range(2)
        )
    return {"query": query, "new_key": key, "new_value": value}, Rope(cos, sin, *weights, EPS)


def finished(states: Tensor, weight: Tensor | None, rope: Rope) -> Tensor:
    """Norm and rotation in float64, one pair of dimensions after the other."""
    x = states.double()
    half = x.shape[-1] // 2
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    result = torch.empty_like(x)
    for d in range(half):
        cos, sin = rope.cos.double()[:, None], rope.sin.double()[:, None]
        result[..., d] = x[..., d] * cos[..., d] - x[..., d + half] * sin[..., d]
        result[..., d + half] = (
            x[..., d + half] * cos[..., d + half] + x[..., d] * sin[..., d + half]
        )
    return result


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_norm_and_rotation_match_float64(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str, normed: bool, device: str
) -> None:
    batch, heads, _, num_slots, head_dim = shape
    state = oracle.make_state(2, batch, heads, num_slots, head_dim, dtype, device, affine=False)
    state["num_valid"][1] = torch.clamp(state["num_valid"][1], max=num_slots - 1)
    new, rope = make_call(shape, dtype, device, normed)
    valid = torch.arange(batch, device=device) != 1
    t = torch.arange(700, 700 + batch, dtype=torch.int32, device=device)
    query = finished(new["query"], rope.query_weight, rope)
    key = finished(new["new_key"], rope.key_weight, rope)
    before, slot = oracle.clone(state), state["num_valid"][1].clone()
    output = append_attention(
        **oracle.with_slots({**new, **state}), t=t, layer=1, rope=rope, valid=valid, impl=impl
    )

    expected = before
    oracle.append(expected, 1, {"key": key.to(dtype), "value": new["new_value"]}, t, valid)
    # a mean over head_dim, a root and three products in fp32, then one rounding
    allowed = (head_dim**0.5 + 8) * 2**-24 + torch.finfo(dtype).eps / 2
    for row, head in itertools.product(valid.nonzero().flatten().tolist(), range(heads)):
        stored = state["key"][1, row, head, slot[row, head]]
        error = (stored.double() - key[row, head]).abs().max()
        assert error <= allowed * key[row, head].abs().max() * 2**0.5
        expected["key"][1, row, head, slot[row, head]] = stored
    oracle.assert_same(state, expected)
    oracle.assert_attention_close(
        output, query.to(dtype), state["key"][1], state["value"][1], state["num_valid"][1]
    )


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("age_offset", [1, -31])
def test_the_end_of_a_gate_matches_float64(
    dtype: torch.dtype, impl: str, age_offset: int, device: str
) -> None:
    """From "forget at once" to decays of 1e-9 a step, which fp32 holds but ``1 + e`` does not."""
    logit = torch.cat([torch.linspace(-30, 24, 22), torch.tensor([-torch.inf, torch.nan])])
    batch, heads = 12, 2
    logit = logit.view(batch, heads).to(dtype).to(device)
    bias = torch.tensor([0.0, 1.5], dtype=dtype, device=device)
    state = oracle.make_state(1, batch, heads, 5, 16, dtype, device)
    state["num_valid"].fill_(2)
    new, rope = make_call((batch, heads, 1, 5, 16), dtype, device, False)
    t = torch.full((batch,), 40, dtype=torch.int32, device=device)
    append_attention(
        **oracle.with_slots({**new, **state}), t=t, layer=0,
        decay=Decay(logit, bias, age_offset), rope=rope, impl=impl,
    )  # fmt: skip
    slope, offset = (state[name][0, :, :, 2] for name in ("slope", "offset"))
    torch.testing.assert_close(offset, slope * age_offset, rtol=0, atol=0, equal_nan=True)
    total = (logit.float() + bias.float()).double()
    exact = torch.minimum(total, torch.zeros(())) - torch.log1p(torch.exp(-total.abs()))
    exact = exact.clamp(min=-1e28)
    # exp of x has the error of x times log2(e), rounded; the rest adds a few roundings
    allowed = (total.abs().nan_to_num(0, neginf=0) * 1.5 + 8) * 2**-23
    error = ((slope.double() - exact) / exact).abs()
    assert (error.nan_to_num(0) <= allowed).all(), error
    assert torch.equal(slope.isnan(), total.isnan())
    assert slope.isinf().logical_not().all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["even", "skewed"])
def test_heads_in_pages_do_the_same(name: str, dtype: torch.dtype, impl: str, device: str) -> None:
    """As the op does with a token that comes finished, from float64."""
    batch, heads, group, head_dim = 2, 2, 3, 24
    pages, t = make_pages(LENGTHS[name], head_dim, dtype, device)
    twin = pages.map(torch.clone)
    new, rope = make_call((batch, heads, group, 0, head_dim), dtype, device, True)
    logit = torch.randn(batch, heads, device=device).to(dtype)
    decay = Decay(logit, torch.full((heads,), 3.0, device=device).to(dtype), 2)
    call = {"t": t + 1, "layer": 1, "impl": impl}
    output = ragged_append_attention(**new, pages=pages, rope=rope, decay=decay, **call)

    query = finished(new["query"], rope.query_weight, rope).to(dtype)
    key = finished(new["new_key"], rope.key_weight, rope).to(dtype)
    slope = torch.nn.functional.logsigmoid(logit.double() + decay.bias.double()).float()
    expected = ragged_append_attention(
        query, key, new["new_value"], twin, new_slope=slope, new_offset=2 * slope, **call
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output, expected, rtol=4 * eps, atol=4 * eps)
    exact = {"value", "position"}
    for what, tensor in pages.tensors().items():
        bound = 0 if what in exact else 2 * eps if what == "key" else 2**-21
        torch.testing.assert_close(tensor, twin.tensors()[what], rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["slots", "pages"])
def test_one_term_for_all_heads_is_not_copied(name: str, device: str) -> None:
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))

    new, _ = make_call((2, 2, 2, 9, 16), torch.float32, device, False)
    one = torch.full((1,), -0.5, device=device)
    terms = {"new_slope": one.expand(2, 2), "new_offset": 2 * one.expand(2, 2)}
    if name == "slots":
        state = oracle.make_state(2, 2, 2, 9, 16, torch.float32, device)
        state["num_valid"].fill_(4)
        t = torch.tensor([30, 31], dtype=torch.int32, device=device)
        call = {**oracle.with_slots({**new, **state}), "t": t}
        op, slope = append_attention, state["slope"]
    else:
        pages, t = make_pages(LENGTHS["even"], 16, torch.float32, device)
        call = {**new, "pages": pages, "t": t + 1}
        op, slope = ragged_append_attention, pages.slope
    with Copies() as copies:
        op(**call, **terms, layer=1, impl="triton")
    assert copies.count == 0
    assert (slope == -0.5).sum() == 4


def test_a_compiled_step_keeps_both(device: str) -> None:
    state = oracle.make_state(2, 2, 2, 9, 16, torch.float32, device)
    state["num_valid"].fill_(4)
    new, rope = make_call((2, 2, 2, 9, 16), torch.float32, device, True)
    decay = Decay(torch.randn(2, 2, device=device), torch.randn(2, device=device))
    t = torch.tensor([30, 31], dtype=torch.int32, device=device)
    step = append_attention.registered["triton"]
    arguments = {**oracle.with_slots({**new, **oracle.clone(state)}), "t": t, "layer": 1}
    arguments |= {"rope": rope, "decay": decay}
    torch.library.opcheck(step, append_attention.flat(**arguments))

    def call(cos: Tensor, logit: Tensor, state: oracle.State) -> Tensor:
        return append_attention(
            **oracle.with_slots({**new, **state}), t=t, layer=1, impl="triton",
            rope=replace(rope, cos=cos), decay=replace(decay, logit=logit),
        )  # fmt: skip

    expected, traced = oracle.clone(state), oracle.clone(state)
    plain = call(rope.cos, decay.logit, expected)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(rope.cos, decay.logit, traced), plain)
    oracle.assert_same(traced, expected)


def test_bad_arguments_are_named(device: str) -> None:
    state = oracle.make_state(1, 2, 2, 6, 16, torch.float32, device)
    new, rope = make_call((2, 2, 2, 6, 16), torch.float32, device, True)
    decay = Decay(torch.zeros(2, 2, device=device), torch.zeros(2, device=device))
    slope = torch.zeros(2, 2, device=device)
    bad = [
        ({"rope": replace(rope, cos=rope.cos[:, :8])}, "cos must have shape [2, 16], got [2, 8]"),
        (
            {"rope": replace(rope, sin=rope.sin.double())},
            "sin must have dtype float32, got float64",
        ),
        ({"rope": replace(rope, key_weight=None)}, "must both be given, or neither"),
        ({"rope": replace(rope, query_weight=slope)}, "query_weight must have shape [16]"),
        (
            {"rope": replace(rope, sin=rope.sin.repeat(1, 2)[:, :16])},
            "cos and sin must have the same strides",
        ),
        ({"decay": replace(decay, bias=slope)}, "bias must have shape [2], got [2, 2]"),
        ({"decay": replace(decay, logit=slope[:1])}, "logit must have shape [2, 2], got [1, 2]"),
        ({"decay": decay, "new_slope": slope}, "must be None with decay="),
    ]
    t = torch.zeros(2, dtype=torch.int32, device=device)
    for changes, message in bad:
        given = {"decay": decay, "rope": rope, **changes}
        with pytest.raises(ValueError, match=re.escape(message)):
            append_attention(**oracle.with_slots({**new, **state}), t=t, layer=0, **given)
    plain = {name: x for name, x in state.items() if name not in ("slope", "offset")}
    with pytest.raises(ValueError, match="slope, offset, decay must be given together, got None"):
        append_attention(**oracle.with_slots({**new, **plain}), t=t, layer=0, decay=decay)
