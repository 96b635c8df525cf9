"""`decode_attention` and `append_attention`, both implementations, against float64."""

import importlib
import re
from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import append_attention, decode_attention
from trimkv_kernels.kernels.ops.decode_attention import DecodeConfig, decode_config

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("poisoned_memory")]

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.decode_attention")
OP = importlib.import_module("trimkv_kernels.kernels.op")


# batch, kv heads, group, slots, head_dim: each group and head_dim, odd sizes, one and many splits
SHAPES = [
    (1, 2, 4, 300, 64),
    (2, 2, 1, 100, 80),
    (2, 1, 8, 1, 16),
    (1, 2, 2, 63, 256),
    (2, 2, 2, 130, 128),
    (1, 1, 3, 257, 24),
    (9, 2, 1, 5, 16),
    (1, 1, 16, 70, 64),
]


def make_new(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """One token per row, sliced out of larger tensors: only the head vectors are contiguous."""
    batch, heads, group, _, head_dim = shape
    rng = torch.Generator().manual_seed(1)
    fused = torch.randn(batch, group + 2, heads, head_dim + 8, generator=rng).to(dtype).to(device)
    return {
        "query": fused[:, :group, :, :head_dim].transpose(1, 2).flatten(1, 2),
        "new_key": fused[:, group, :, :head_dim],
        "new_value": fused[:, group + 1, :, 8:],
        "new_slope": torch.randn(batch, 2, heads, generator=rng).to(device)[:, 0],
        "new_offset": torch.randn(heads, batch, generator=rng).to(device).T,
    }


def new_fields(new: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("new_"): x for name, x in new.items() if name.startswith("new_")}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str, device: str
) -> None:
    batch, heads, group, num_slots, head_dim = shape
    state = oracle.make_state(1, batch, heads, num_slots, head_dim, dtype, device)
    query = make_new(shape, dtype, device)["query"]
    key, value, num_valid = state["key"][0], state["value"][0], state["num_valid"][0]
    num_valid[0, 0] = 0
    num_valid[-1, -1] = num_slots
    before = oracle.clone(state)
    output = decode_attention(query, key, value, num_valid, impl=impl)
    oracle.assert_attention_close(output, query, key, value, num_valid)
    assert not output[(num_valid == 0).repeat_interleave(group, dim=1)].any()
    oracle.assert_same(state, before)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_decode_without_counts_reads_every_slot(dtype: torch.dtype, impl: str, device: str) -> None:
    rng = torch.Generator().manual_seed(2)
    query = torch.randn(2, 6, 40, generator=rng).to(dtype).to(device)
    # slots before heads in memory, as a projection writes them
    key, value = (
        torch.randn(2, 140, 3, 40, generator=rng).to(dtype).to(device).transpose(1, 2)
        for _ in range(2)
    )
    output = decode_attention(query, key, value, scale=0.3, impl=impl)
    oracle.assert_attention_close(output, query, key, value, None, scale=0.3)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_append_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str, padded: bool, device: str
) -> None:
    batch, heads, _, num_slots, head_dim = shape
    affine = not padded
    state = oracle.make_state(2, batch, heads, num_slots, head_dim, dtype, device, affine=affine)
    state["num_valid"][1, 0, 0] = 0
    state["num_valid"][1, -1, -1] = num_slots
    new = make_new(shape, dtype, device)
    if not affine:
        new = {name: x for name, x in new.items() if name in ("query", "new_key", "new_value")}
    t = torch.arange(700, 700 + batch, dtype=torch.int32, device=device)
    # a column of a mask, so not contiguous
    valid = (
        (torch.arange(3 * batch, device=device) % 2 == 1).view(batch, 3)[:, 0] if padded else None
    )
    expected = oracle.clone(state)
    oracle.append(expected, 1, new_fields(new), t, valid)
    output = append_attention(
        **oracle.with_slots({**new, **state}), t=t, layer=1, valid=valid, impl=impl
    )
    oracle.assert_same(state, expected)
    oracle.assert_attention_close(
        output, new["query"], state["key"][1], state["value"][1], state["num_valid"][1]
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("seed", range(6))
def test_append_honours_the_capacity_of_each_head(seed: int, impl: str, device: str) -> None:
    """Full heads, heads with one slot left and empty ones; all even, or each of its own."""
    shape = (3, 2, 2, 70, 16)
    rng = torch.Generator().manual_seed(seed)
    state = oracle.make_state(2, 3, 2, 70, 16, torch.float32, device)
    capacity = torch.randint(1, 71, (2, 3, 2), generator=rng, dtype=torch.int32)
    if seed == 0:
        capacity[:] = 40
    free = torch.randint(3, (2, 3, 2), generator=rng, dtype=torch.int32)
    if seed < 2:
        free[:] = seed
    state["capacity"] = capacity.to(device)
    state["num_valid"] = (capacity - free).clamp(min=0).to(device)
    new = make_new(shape, torch.float32, device)
    t = torch.tensor([40, 50, 60], dtype=torch.int32, device=device)
    valid = torch.tensor([True, False, True], device=device) if seed == 5 else None
    expected = oracle.clone(state)
    oracle.append(expected, 1, new_fields(new), t, valid)
    output = append_attention(
        **oracle.with_slots({**new, **state}), t=t, layer=1, valid=valid, impl=impl
    )
    oracle.assert_same(state, expected)
    assert (state["num_valid"] <= state["capacity"]).all()
    oracle.assert_attention_close(
        output, new["query"], state["key"][1], state["value"][1], state["num_valid"][1]
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("count", [0, 5, 6])
def test_append_to_even_heads(count: int, impl: str, device: str) -> None:
    shape = (2, 2, 2, 6, 16)
    state = oracle.make_state(2, 2, 2, 6, 16, torch.float32, device)
    state["num_valid"].fill_(count)
    new = make_new(shape, torch.float32, device)
    t = torch.tensor([40, 50], dtype=torch.int32, device=device)
    expected = oracle.clone(state)
    oracle.append(expected, 0, new_fields(new), t, None)
    output = append_attention(**oracle.with_slots({**new, **state}), t=t, layer=0, impl=impl)
    oracle.assert_same(state, expected)
    assert (state["num_valid"][0] == min(count + 1, 6)).all()
    oracle.assert_attention_close(
        output, new["query"], state["key"][0], state["value"][0], state["num_valid"][0]
    )


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_splits_agree(splits: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    config = DecodeConfig(splits, block_s=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(MODULE, "decode_config", lambda *_: config)
    shape = (1, 2, 2, 150, 32)
    state = oracle.make_state(1, 1, 2, 150, 32, torch.float32, device)
    new = make_new(shape, torch.float32, device)
    t = torch.tensor([900], dtype=torch.int32, device=device)
    # from no slot at all to the last one: the later splits have little or nothing to do
    for count in (0, 17, 149):
        state["num_valid"][:] = torch.tensor([count, count // 2], dtype=torch.int32)
        expected = oracle.clone(state)
        oracle.append(expected, 0, new_fields(new), t, None)
        output = append_attention(
            **oracle.with_slots({**new, **state}), t=t, layer=0, impl="triton"
        )
        oracle.assert_same(state, expected)
        slots = state["key"][0], state["value"][0], state["num_valid"][0]
        oracle.assert_attention_close(output, new["query"], *slots)
        again = decode_attention(new["query"], *slots, impl="triton")
        oracle.assert_attention_close(again, new["query"], *slots)


def test_many_splits_of_a_large_group(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """64 parts of 16 query heads are merged in several rounds."""
    config = DecodeConfig(64, block_s=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(MODULE, "decode_config", lambda *_: config)
    state = oracle.make_state(1, 1, 1, 1024, 64, torch.float32, device)
    query = torch.randn(1, 16, 64, device=device)
    state["num_valid"][:] = 700  # the last splits have no slots
    slots = state["key"][0], state["value"][0], state["num_valid"][0]
    output = decode_attention(query, *slots, impl="triton")
    oracle.assert_attention_close(output, query, *slots)


def test_nan_is_not_hidden(device: str) -> None:
    """A NaN in a query shows in its own output, on either side of a merge, and nowhere else."""
    state = oracle.make_state(1, 1, 1, 300, 32, torch.float32, device)
    query = torch.ones(1, 2, 32, device=device)
    query[0, 1, 3] = float("nan")
    output = decode_attention(query, state["key"][0], state["value"][0], impl="triton")
    assert output[0, 0].isfinite().all()
    assert output[0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 30, 513])
def test_torch_path_has_the_bits_of_sdpa(count: int, dtype: torch.dtype) -> None:
    """On a CPU, spare capacity changes not one bit against a cache of exactly this size."""
    shape = (2, 2, 4, 700, 64)
    state = oracle.make_state(2, 2, 2, 700, 64, dtype, "cpu", affine=False)
    state["num_valid"].fill_(count - 1)
    new = {k: x for k, x in make_new(shape, dtype, "cpu").items() if "slope" not in k}
    new.pop("new_offset")
    t = torch.full((2,), count, dtype=torch.int32)
    output = append_attention(**oracle.with_slots({**new, **state}), t=t, layer=1, impl="torch")
    key, value = (state[name][1, :, :, :count].clone() for name in ("key", "value"))
    stock = torch.nn.functional.scaled_dot_product_attention(
        new["query"][:, :, None], key, value, enable_gqa=True
    )
    assert torch.equal(output, stock[:, :, 0])


def test_torch_path_compiles_without_a_break(device: str) -> None:
    state = oracle.make_state(2, 2, 2, 9, 16, torch.float32, device)
    state["num_valid"][1, 0, 1] = 9
    new = make_new((2, 2, 2, 9, 16), torch.float32, device)
    t = torch.tensor([30, 31], dtype=torch.int32, device=device)
    valid = torch.tensor([True, False], device=device)
    expected, traced = oracle.clone(state), oracle.clone(state)
    plain = append_attention(
        **oracle.with_slots({**new, **expected}), t=t, layer=1, valid=valid, impl="torch"
    )
    compiled = torch.compile(append_attention, backend="aot_eager", fullgraph=True)
    output = compiled(
        **oracle.with_slots({**new, **traced}), t=t, layer=1, valid=valid, impl="torch"
    )
    torch.testing.assert_close(output, plain)
    oracle.assert_same(traced, expected)


def test_triton_ops_are_registered_exactly(device: str) -> None:
    """Schemas, mutation lists and fake kernels, as `torch.compile` relies on them."""
    state = oracle.make_state(2, 1, 2, 9, 16, torch.float32, device)
    state["num_valid"].fill_(4)
    new = make_new((1, 2, 2, 9, 16), torch.float32, device)
    t = torch.tensor([30], dtype=torch.int32, device=device)
    layer = {name: state[name][0] for name in ("key", "value", "num_valid")}
    call = decode_attention.flat(new["query"], **layer, scale=0.25)
    torch.library.opcheck(decode_attention.registered["triton"], call)
    step = append_attention.registered["triton"]
    arguments = oracle.with_slots({**new, **state})
    torch.library.opcheck(step, append_attention.flat(**arguments, t=t, layer=1))
    plain = {x: y for x, y in arguments.items() if x not in ("new_slope", "new_offset")}
    plain["slots"] = replace(plain["slots"], slope=None, offset=None)
    valid = torch.ones(1, dtype=torch.bool, device=device)
    call = append_attention.flat(**plain, t=t, layer=1, valid=valid, scale=0.25)
    torch.library.opcheck(step, call)


def test_triton_path_compiles_without_a_break(device: str) -> None:
    state = oracle.make_state(2, 2, 2, 9, 16, torch.float32, device)
    new = make_new((2, 2, 2, 9, 16), torch.float32, device)
    t = torch.tensor([30, 31], dtype=torch.int32, device=device)
    expected, traced = oracle.clone(state), oracle.clone(state)
    plain = append_attention(**oracle.with_slots({**new, **expected}), t=t, layer=1, impl="triton")
    compiled = torch.compile(append_attention, backend="aot_eager", fullgraph=True)
    output = compiled(**oracle.with_slots({**new, **traced}), t=t, layer=1, impl="triton")
    assert torch.equal(output, plain)
    oracle.assert_same(traced, expected)


@pytest.mark.parametrize(
    ("num_heads", "num_slots", "splits"),
    [(8, 1088, 16), (32, 1088, 8), (64, 1088, 4), (128, 1088, 2), (512, 4224, 1), (8, 100, 1)],
)
def test_splits_come_from_shapes(num_heads: int, num_slots: int, splits: int) -> None:
    config = decode_config(num_heads, num_slots, head_dim=128, itemsize=2, num_sms=132)
    assert config == DecodeConfig(splits, block_s=64, num_warps=4, num_stages=3)
    assert replace(config, splits=1) == decode_config(9999, num_slots, 128, 2, 132)


def decode_arguments(device: str) -> dict[str, Tensor]:
    state = oracle.make_state(1, 2, 2, 6, 16, torch.float32, device)
    layer = {name: state[name][0] for name in ("key", "value", "num_valid")}
    return {"query": torch.zeros(2, 4, 16, device=device), **layer}


def append_arguments(device: str) -> dict[str, Tensor]:
    state = oracle.make_state(1, 2, 2, 6, 16, torch.float32, device)
    t = torch.zeros(2, dtype=torch.int32, device=device)
    valid = torch.ones(2, dtype=torch.bool, device=device)
    state["capacity"] = torch.full_like(state["num_valid"], 6)
    return {**make_new((2, 2, 2, 6, 16), torch.float32, device), **state, "t": t, "valid": valid}


ARGUMENTS = {decode_attention: decode_arguments, append_attention: append_arguments}
SHAPE_ERRORS = [
    (decode_attention, "query", "[batch, num_heads, head_dim]"),
    (decode_attention, "key", "[batch, num_kv_heads, num_slots, head_dim]"),
    (decode_attention, "value", "[2, 2, 6, 16]"),
    (decode_attention, "num_valid", "[2, 2]"),
    (append_attention, "query", "[batch, num_heads, head_dim]"),
    (append_attention, "new_key", "[2, 2, 16]"),
    (append_attention, "new_value", "[2, 2, 16]"),
    (append_attention, "key", "[layers, batch, num_kv_heads, num_slots, head_dim]"),
    (append_attention, "value", "[1, 2, 2, 6, 16]"),
    (append_attention, "position", "[1, 2, 2, 6]"),
    (append_attention, "num_valid", "[1, 2, 2]"),
    (append_attention, "capacity", "[1, 2, 2]"),
    (append_attention, "t", "[2]"),
    (append_attention, "valid", "[2]"),
    (append_attention, "slope", "[1, 2, 2, 6]"),
    (append_attention, "offset", "[1, 2, 2, 6]"),
    (append_attention, "new_slope", "[2, 2]"),
    (append_attention, "new_offset", "[2, 2]"),
]
NAMES = [(op, name) for op, name, _ in SHAPE_ERRORS]


def call_with(op: object, changes: dict[str, Tensor], device: str) -> None:
    arguments = {**ARGUMENTS[op](device), **changes}
    if op is append_attention:
        arguments = oracle.with_slots({**arguments, "layer": 0})
    op(**arguments)


@pytest.mark.parametrize(("op", "name", "shape"), SHAPE_ERRORS)
def test_wrong_shape_is_named(op: object, name: str, shape: str, device: str) -> None:
    wrong = ARGUMENTS[op](device)[name][..., None]
    message = f"{name} must have shape {shape}, got {list(wrong.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call_with(op, {name: wrong}, device)


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_wrong_dtype_is_named(op: object, name: str, device: str) -> None:
    good = ARGUMENTS[op](device)[name]
    wrong = good.double() if good.is_floating_point() else good.long()
    with pytest.raises(ValueError, match=rf"^{name} must have dtype .*, got (float64|int64)$"):
        call_with(op, {name: wrong}, device)


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_wrong_device_is_named(op: object, name: str, device: str) -> None:
    wrong = ARGUMENTS[op](device)[name].to("meta")
    # The query decides where everything should be, so the next argument is the one to disagree.
    named = {decode_attention: "key", append_attention: "new_key"}[op] if name == "query" else name
    with pytest.raises(ValueError, match=rf"^{named} must be on (meta|{device}.*), got "):
        call_with(op, {name: wrong}, device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {"value": x["value"][:, :, :5]},
            "value must have shape [2, 2, 6, 16], got [2, 2, 5, 16]",
        ),
        (
            lambda x: {"num_valid": x["num_valid"].long()},
            "num_valid must have dtype int32, got int64",
        ),
        (
            lambda x: {"query": x["query"][:, :3]},
            "query must have a multiple of 2 heads (those of key), got 3",
        ),
        (
            lambda x: {"key": x["key"].repeat_interleave(2, dim=-1)[..., ::2]},
            "key must have stride 1 in its last dimension, got 2",
        ),
    ],
)
def test_decode_message_reads_well(change: object, message: str, device: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call_with(decode_attention, change(decode_arguments(device)), device)


def test_append_rejects_views_layers_and_halves(device: str) -> None:
    good = append_arguments(device)
    with pytest.raises(ValueError, match=r"^layer must be between 0 and 0, got 1$"):
        append_attention(**oracle.with_slots(good), layer=1)
    with pytest.raises(ValueError, match=r"given together, got None for new_offset$"):
        append_attention(**oracle.with_slots({**good, "new_offset": None}), layer=0)
    with pytest.raises(ValueError, match=r"^key must be contiguous, got strides"):
        append_attention(
            **oracle.with_slots({**good, "key": good["key"].mT.contiguous().mT}), layer=0
        )


def test_impl_is_followed_or_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    good = decode_arguments(device)
    with pytest.raises(
        ValueError, match=r"^impl must be one of 'auto', 'triton', 'torch', got 'gpu'$"
    ):
        decode_attention(**good, impl="gpu")
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(RuntimeError, match="needs tensors on a GPU, got cpu"):
            decode_attention(**good, impl="triton")
        decode_attention(**good)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(OP, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        decode_attention(**good, impl="triton")
    decode_attention(**good, impl="torch")
