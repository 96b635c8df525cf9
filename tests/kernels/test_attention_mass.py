"""Log-sum-exp and attention mass of the decode ops, both implementations, against float64."""

import importlib
import re

import oracle
import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import append_attention, decode_attention
from trimkv_kernels.kernels.ops.decode_attention import DecodeConfig

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("poisoned_memory")]

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.decode_attention")

REDUCES = ["none", "sum", "mean", "max"]

# batch, kv heads, group, slots, head_dim: each group, odd sizes, one and many splits
SHAPES = [
    (1, 2, 4, 300, 64),
    (2, 2, 1, 100, 80),
    (2, 1, 8, 1, 16),
    (1, 2, 2, 63, 128),
    (2, 1, 3, 257, 24),
    (9, 2, 1, 5, 16),
    (1, 1, 16, 70, 64),
]
STALE = 7.0


def shares(
    query: Tensor, key: Tensor, num_valid: Tensor, scale: float, reduce: str
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each query head and reduced probabilities of each slot, in float64."""
    batch, num_heads, _ = query.shape
    kv_heads, num_slots = key.shape[1:3]
    group = num_heads // kv_heads
    lse = torch.full((batch, num_heads), -torch.inf, dtype=torch.float64)
    shape = mass_shape((batch, kv_heads, group, num_slots), reduce)
    mass = torch.zeros(shape, dtype=torch.float64)
    for row in range(batch):
        for kv_head in range(kv_heads):
            count = int(num_valid[row, kv_head])
            if count == 0:
                continue
            members = slice(kv_head * group, (kv_head + 1) * group)
            keys = key[row, kv_head, :count].double().cpu()
            logits = query[row, members].double().cpu() @ keys.T * scale
            lse[row, members] = logits.exp().sum(1).log()
            weights = logits.softmax(dim=1)
            if reduce == "none":
                mass[row, members, :count] = weights
                continue
            mass[row, kv_head, :count] = {
                "sum": weights.sum(0), "mean": weights.sum(0) / group, "max": weights.max(0).values,
            }[reduce]  # fmt: skip
    return lse, mass


def mass_shape(shape: tuple[int, ...], reduce: str) -> tuple[int, int, int]:
    """Of ``mass`` for one layer; ``shape`` begins as `SHAPES` do."""
    batch, kv_heads, group, num_slots = shape[:4]
    return batch, kv_heads * (group if reduce == "none" else 1), num_slots


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Products are exact in fp32 and sums nearly so, whatever the inputs' dtype."""
    return {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-5}


def make(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[oracle.State, oracle.State]:
    batch, heads, group, num_slots, head_dim = shape
    state = oracle.make_state(2, batch, heads, num_slots, head_dim, dtype, device, affine=False)
    state["num_valid"][1, 0, 0] = 0
    state["num_valid"][1, -1, -1] = num_slots
    rng = torch.Generator().manual_seed(1)
    fused = torch.randn(batch, group + 2, heads, head_dim + 8, generator=rng).to(dtype).to(device)
    new = {
        "query": fused[:, :group, :, :head_dim].transpose(1, 2).flatten(1, 2),
        "new_key": fused[:, group, :, :head_dim],
        "new_value": fused[:, group + 1, :, 8:],
    }
    return state, new


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str, device: str
) -> None:
    state, new = make(shape, dtype, device)
    slots = [state[name][1] for name in ("key", "value", "num_valid")]
    plain = decode_attention(new["query"], *slots, scale=0.2, impl=impl)
    for reduce in REDUCES:
        mass = torch.full(mass_shape(shape, reduce), STALE, device=device)
        lse = torch.full(new["query"].shape[:2], STALE, device=device)
        output = decode_attention(
            new["query"], *slots, scale=0.2, lse=lse, mass=mass, mass_reduce=reduce, impl=impl
        )
        expected_lse, expected = shares(new["query"], slots[0], slots[2], 0.2, reduce)
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double().cpu(), expected_lse, **tolerance(dtype))
        torch.testing.assert_close(mass.double().cpu(), expected, **tolerance(dtype))
        empty = torch.arange(shape[3], device=device) >= slots[2][:, :, None, None]
        assert (mass.unflatten(1, (shape[1], -1)) == 0).logical_or(~empty).all()
        torch.testing.assert_close(output, plain)


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_append_matches_float64(
    shape: tuple[int, ...], accumulate: bool, impl: str, device: str
) -> None:
    reduce = REDUCES[SHAPES.index(shape) % 4]
    state, new = make(shape, torch.float32, device)
    batch, _, _, num_slots, head_dim = shape
    t = torch.arange(700, 700 + batch, dtype=torch.int32, device=device)
    valid = torch.arange(batch, device=device) % 2 == 0
    expected_state = oracle.clone(state)
    tokens = {name.removeprefix("new_"): x for name, x in new.items() if name != "query"}
    oracle.append(expected_state, 1, tokens, t, valid)
    mass = torch.full((2, *mass_shape(shape, reduce)), STALE, device=device)
    options = {"t": t, "layer": 1, "valid": valid, "impl": impl}
    plain = append_attention(**oracle.with_slots({**new, **oracle.clone(state)}), **options)
    lse = torch.full(new["query"].shape[:2], STALE, device=device)
    output = append_attention(
        **oracle.with_slots({**new, **state}), **options,
        lse=lse, mass=mass, mass_reduce=reduce, mass_accumulate=accumulate,
    )  # fmt: skip
    oracle.assert_same(state, expected_state)
    torch.testing.assert_close(output, plain)
    expected_lse, expected = shares(
        new["query"], state["key"][1], state["num_valid"][1], head_dim**-0.5, reduce
    )
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=2e-5, atol=2e-6)
    held = torch.arange(num_slots) < state["num_valid"][1].cpu()[..., None]
    held = held.repeat_interleave(expected.shape[1] // held.shape[1], dim=1)
    held &= valid.cpu()[:, None, None]  # a pad gives nothing
    expected = torch.where(held, expected, 0)
    if accumulate:
        expected = torch.where(held, expected + STALE, STALE)
    torch.testing.assert_close(mass[1].double().cpu(), expected, rtol=2e-5, atol=2e-6)
    assert (mass[0] == STALE).all()
    untouched = STALE if accumulate else 0.0
    assert (mass[1].cpu()[~held] == untouched).all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", REDUCES)
def test_even_heads_match_float64(
    reduce: str, dtype: torch.dtype, packed: bool, impl: str, device: str
) -> None:
    """Heads of equal length without padding, and nobody asks for the log-sum-exp."""
    shape = (2, 2, 3, 70, 24)
    state, new = make(shape, dtype, device)
    state["num_valid"].fill_(40)
    t = torch.tensor([700, 701], dtype=torch.int32, device=device)
    accumulate = reduce in ("mean", "max")
    mass = torch.full((2, *mass_shape(shape, reduce)), STALE, device=device)
    output = append_attention(
        **oracle.with_slots({**new, **state}), t=t, layer=1, mass=mass, mass_reduce=reduce,
        mass_accumulate=accumulate, packed=packed, impl=impl,
    )  # fmt: skip
    slots = [state[name][1] for name in ("key", "value", "num_valid")]
    assert (slots[2] == 41).all()
    oracle.assert_attention_close(output, new["query"], *slots)
    _, expected = shares(new["query"], slots[0], slots[2], 24**-0.5, reduce)
    expected += STALE if accumulate else 0
    torch.testing.assert_close(mass[1].double().cpu(), expected, **tolerance(dtype))
    assert (mass[1, :, :, 41:] == (STALE if accumulate else 0)).all()
    assert (mass[0] == STALE).all()


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("reduce", ["none", "max"])
def test_splits_agree(
    splits: int, reduce: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    config = DecodeConfig(splits, block_s=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(MODULE, "decode_config", lambda *_: config)
    shape = (1, 2, 2, 150, 32)
    state, new = make(shape, torch.float32, device)
    t = torch.tensor([900], dtype=torch.int32, device=device)
    for count in (0, 17, 149):
        state["num_valid"][:] = torch.tensor([count, count // 2], dtype=torch.int32)
        mass = torch.full((2, *mass_shape(shape, reduce)), STALE, device=device)
        lse, lse_again = torch.full((2, *new["query"].shape[:2]), STALE, device=device)
        options = {"mass_reduce": reduce, "impl": "triton"}
        step = oracle.with_slots({**new, **state})
        append_attention(**step, t=t, layer=1, lse=lse, mass=mass, **options)
        slots = [state[name][1] for name in ("key", "value", "num_valid")]
        expected_lse, expected = shares(new["query"], slots[0], slots[2], 32**-0.5, reduce)
        again = torch.full_like(mass[1], STALE)
        decode_attention(new["query"], *slots, lse=lse_again, mass=again, **options)
        for got, wanted in (
            (lse, expected_lse), (mass[1], expected), (lse_again, expected_lse), (again, expected),
        ):  # fmt: skip
            torch.testing.assert_close(got.double().cpu(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_steps_add_up_to_cumulative_attention(impl: str, device: str) -> None:
    """The accumulator of H2O, on attention rows given in full: two heads, five steps."""
    rows = torch.zeros(2, 5, 5)
    for head, given in enumerate(
        (
            [[1], [0.6, 0.4], [0.5, 0.2, 0.3], [0.4, 0.1, 0.1, 0.4], [0.3, 0.1, 0.2, 0.1, 0.3]],
            [[1], [0.2, 0.8], [0.1, 0.6, 0.3], [0.1, 0.5, 0.2, 0.2], [0.1, 0.4, 0.1, 0.2, 0.2]],
        )
    ):
        for step, row in enumerate(given):
            rows[head, step, : step + 1] = torch.tensor(row)
    accumulated = {}
    for reduce in ("sum", "mean"):
        state = oracle.make_state(1, 1, 1, 6, 16, torch.float32, device, affine=False)
        state["num_valid"].zero_()
        mass = torch.zeros(1, 1, 1, 6, device=device)
        for step in range(5):
            # keys are unit vectors, so that a query names its logits
            key = torch.zeros(1, 1, 16, device=device)
            key[..., step] = 1.0
            query = torch.zeros(1, 2, 16, device=device)
            query[0, :, : step + 1] = rows[:, step, : step + 1].log().to(device)
            append_attention(
                query, key, key, **oracle.with_slots(state), layer=0, scale=1.0, impl=impl,
                t=torch.tensor([step + 1], dtype=torch.int32, device=device),
                mass=mass, mass_reduce=reduce, mass_accumulate=True,
            )  # fmt: skip
        accumulated[reduce] = mass[0, 0, 0, :5].cpu()
    expected = torch.tensor([[2.8, 0.8, 0.6, 0.5, 0.3], [1.5, 2.3, 0.6, 0.4, 0.2]])
    torch.testing.assert_close(accumulated["sum"], expected.sum(0))
    torch.testing.assert_close(
        accumulated["mean"], torch.tensor([2.15, 1.55, 0.6, 0.45, 0.25]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_a_nan_is_not_hidden(impl: str, device: str) -> None:
    state, new = make((1, 2, 2, 80, 16), torch.float32, device)
    state["num_valid"][1] = torch.tensor([[50, 60]], dtype=torch.int32)
    query = new["query"].clone()
    query[0, 1, 3] = float("nan")
    for reduce in REDUCES[1:]:
        mass = torch.zeros(1, 2, 80, device=device)
        lse = torch.zeros(1, 4, device=device)
        decode_attention(
            query, *(state[name][1] for name in ("key", "value", "num_valid")),
            lse=lse, mass=mass, mass_reduce=reduce, impl=impl,
        )  # fmt: skip
        assert lse.isnan().tolist() == [[False, True, False, False]]
        assert mass[0, 0, :50].isnan().all()
        assert (mass[0, 0, 50:] == 0).all()
        assert mass[0, 1].isfinite().all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_compiles_without_a_break(impl: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.undo()  # poisoned, `new_empty` cannot be traced
    state, new = make((2, 2, 2, 9, 16), torch.float32, device)
    t = torch.tensor([30, 31], dtype=torch.int32, device=device)
    expected, traced = oracle.clone(state), oracle.clone(state)
    for each in (expected, traced):
        each["mass"] = torch.ones(each["position"].shape, device=device)
        each["lse"] = torch.zeros(2, 4, device=device)
    options = {"t": t, "layer": 1, "mass_accumulate": True, "impl": impl}
    plain = append_attention(**oracle.with_slots({**new, **expected}), **options)
    compiled = torch.compile(append_attention, backend="aot_eager", fullgraph=True)
    output = compiled(**oracle.with_slots({**new, **traced}), **options)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(traced["lse"], expected["lse"])
    torch.testing.assert_close(traced["mass"], expected["mass"])
    assert not torch.equal(traced["mass"], torch.ones_like(traced["mass"]))


def test_triton_ops_are_registered_exactly(device: str) -> None:
    state, new = make((1, 2, 2, 9, 16), torch.float32, device)
    t = torch.tensor([30], dtype=torch.int32, device=device)
    lse = torch.zeros(1, 4, device=device)
    mass = torch.zeros(state["position"].shape, device=device)
    slots = [state[name][1] for name in ("key", "value", "num_valid")]
    options = {"lse": lse, "mass": mass[1].clone(), "mass_reduce": "max", "mass_accumulate": True}
    call = decode_attention.flat(new["query"], *slots, **options)
    torch.library.opcheck(decode_attention.registered["triton"], call)
    arguments = {**oracle.with_slots({**new, **state}), "t": t, "layer": 1}
    per_head = mass.repeat_interleave(2, dim=2)
    for options in (
        {"lse": lse, "mass": mass, "mass_reduce": "mean"},
        {"mass": mass, "mass_accumulate": True},
        {"lse": lse, "mass": per_head, "mass_reduce": "none", "mass_accumulate": True},
    ):
        call = append_attention.flat(**arguments, **options)
        torch.library.opcheck(append_attention.registered["triton"], call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mass": (2, 2, 5)}, "mass must have shape [2, 2, 6], got [2, 2, 5]"),
        (
            {"mass": (2, 2, 6), "mass_reduce": "none"},
            "mass must have shape [2, 4, 6], got [2, 2, 6]",
        ),
        (
            {"mass_reduce": "min"},
            "mass_reduce must be one of 'sum', 'mean', 'max', 'none', got 'min'",
        ),
    ],
)
def test_wrong_argument_is_named(changes: dict, message: str, device: str) -> None:
    state, new = make((2, 2, 2, 6, 16), torch.float32, device)
    if "mass" in changes:
        changes = {**changes, "mass": torch.zeros(changes["mass"], device=device)}
    slots = [state[name][1] for name in ("key", "value", "num_valid")]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode_attention(new["query"], *slots, **changes)


def test_wrong_mass_is_named(device: str) -> None:
    state, new = make((2, 2, 2, 6, 16), torch.float32, device)
    t = torch.tensor([30, 31], dtype=torch.int32, device=device)
    base = torch.zeros(2, 2, 2, 6, device=device)
    for mass, message in (
        (base[0], "mass must have shape [2, 2, 2, 6], got [2, 2, 6]"),
        (base.double(), "mass must have dtype float32, got float64"),
        (base.to("meta"), f"mass must be on {base.device}, got meta"),
        (base.mT.contiguous().mT, "mass must be contiguous, got strides"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            append_attention(**oracle.with_slots({**new, **state}), t=t, layer=1, mass=mass)
