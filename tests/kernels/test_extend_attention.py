"""`extend_attention`, both implementations, against float64."""

import importlib
import re

import oracle
import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import extend_attention

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("poisoned_memory")]

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.extend_attention")


def assert_exact(output: Tensor, call: dict[str, Tensor], valid: Tensor | None) -> None:
    """The real tokens against float64 attention to what each may see, token by token."""
    assert output.isfinite().all()
    query, group = call["query"], call["query"].shape[1] // call["key"].shape[1]
    exact, plain = output.double(), output.clone()  # where a token is a pad, anything goes
    for row in range(query.shape[0]):
        real = range(query.shape[2]) if valid is None else valid[row].nonzero()[:, 0].tolist()
        for head in range(call["key"].shape[1]):
            count = int(call["num_valid"][row, head])
            members = slice(head * group, (head + 1) * group)
            for token in real:
                seen = [k for k in real if k <= token]
                slots = [
                    torch.cat((call[name][row, head, :count], call[f"new_{name}"][row, head, seen]))
                    for name in ("key", "value")
                ]
                one = query[row : row + 1, members, token]
                for result in (exact, plain):
                    result[row, members, token] = oracle.attention(
                        one, *(x[None, None] for x in slots), None, softmax_dtype=result.dtype
                    )[0]
    oracle.assert_as_good(output, exact, plain)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.CALL_SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str, device: str
) -> None:
    call = oracle.make_call(shape, dtype, device)
    assert_exact(extend_attention(**call, impl=impl), call, None)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", oracle.CALL_SHAPES, ids=str)
def test_pads_are_not_seen(shape: tuple[int, ...], impl: str, device: str) -> None:
    call = oracle.make_call(shape, torch.float32, device)
    batch, tokens = shape[0], shape[4]
    pads = torch.tensor([tokens // 2, tokens][:batch], device=device)
    valid = torch.arange(tokens, device=device) >= pads[:, None]
    assert_exact(extend_attention(**call, valid=valid, impl=impl), call, valid)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_without_counts_every_slot_is_seen(impl: str, device: str) -> None:
    call = oracle.make_call((2, 1, 2, 37, 6, 16), torch.float32, device)
    call["num_valid"].fill_(37)
    counted = extend_attention(**call, scale=0.2, impl=impl)
    call["num_valid"] = None
    torch.testing.assert_close(extend_attention(**call, scale=0.2, impl=impl), counted)


@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_tilings_agree(block_m: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    config = MODULE.ExtendConfig(block_m, block_s=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(MODULE, "extend_config", lambda *_: config)
    call = oracle.make_call((1, 2, 3, 50, 47, 16), torch.float32, device)
    assert_exact(extend_attention(**call, impl="triton"), call, None)


@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("block_m", [16, 64])
def test_splits_agree(
    block_m: int, splits: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Heads of any length, down to none, padding and the log-sum-exp, on any number of splits."""
    call = oracle.make_call((1, 2, 3, 150, 9, 16), torch.float32, device)
    call["num_valid"] = torch.tensor([[150, 3]], dtype=torch.int32, device=device)
    valid = torch.arange(9, device=device)[None] >= 2
    results = []
    for number in (1, splits, splits):
        config = MODULE.ExtendConfig(block_m, 16, num_warps=4, num_stages=2, splits=number)
        monkeypatch.setattr(MODULE, "extend_config", lambda *_, config=config: config)
        lse = torch.empty(1, 6, 9, device=device)
        output = extend_attention(**call, valid=valid, lse=lse, impl="triton")
        assert_exact(output, call, valid)
        results.append((output[:, :, 2:], lse[:, :, 2:]))
    whole, once, again = results
    torch.testing.assert_close(once, whole)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@pytest.mark.parametrize(
    ("tokens", "num_heads", "num_slots", "splits"),
    [(8, 8, 1152, 16), (8, 64, 1152, 2), (1024, 8, 1152, 1), (8, 8, 100, 1), (8, 1, 65536, 64)],
)
def test_splits_come_from_shapes(tokens: int, num_heads: int, num_slots: int, splits: int) -> None:
    """Few new tokens against many slots are split, until every multiprocessor has work."""
    config = MODULE.extend_config(tokens * 4, 128, 2, 9, num_heads, num_slots, 132)
    assert config.splits == splits


@pytest.mark.parametrize("slots", [0, 40])
def test_torch_path_has_the_bits_of_sdpa(slots: int) -> None:
    call = oracle.make_call((2, 2, 4, slots, 65, 64), torch.float32, "cpu")
    call["num_valid"] = None
    key, value = (torch.cat((call[x], call[f"new_{x}"]), dim=2) for x in ("key", "value"))
    mask = torch.ones(65, slots + 65, dtype=torch.bool).tril(slots)[None, None]
    stock = torch.nn.functional.scaled_dot_product_attention(
        call["query"],
        key.repeat_interleave(4, dim=1),
        value.repeat_interleave(4, dim=1),
        attn_mask=mask,
    )
    assert torch.equal(extend_attention(**call, impl="torch"), stock)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_break(impl: str, dynamic: bool, device: str) -> None:
    call = oracle.make_call((1, 2, 2, 9, 5, 16), torch.float32, device)
    compiled = torch.compile(extend_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    plain = extend_attention(**call, impl=impl)
    torch.testing.assert_close(compiled(**call, impl=impl), plain)


def test_triton_op_is_registered_exactly(device: str) -> None:
    call = oracle.make_call((1, 2, 2, 9, 5, 16), torch.float32, device)
    valid = torch.ones(1, 5, dtype=torch.bool, device=device)
    arguments = extend_attention.flat(**call, valid=valid, scale=0.25)
    torch.library.opcheck(extend_attention.registered["triton"], arguments)


SHAPE_ERRORS = {
    "query": "[batch, num_heads, q_len, head_dim]",
    "new_key": "[2, 2, 5, 16]",
    "new_value": "[2, 2, 5, 16]",
    "key": "[batch, num_kv_heads, num_slots, head_dim]",
    "value": "[2, 2, 9, 16]",
    "num_valid": "[2, 2]",
    "valid": "[2, 5]",
}


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_wrong_tensor_is_named(name: str, device: str) -> None:
    good = oracle.make_call((2, 2, 2, 9, 5, 16), torch.float32, device)
    good["valid"] = torch.ones(2, 5, dtype=torch.bool, device=device)
    longer = good[name][..., None]
    message = f"{name} must have shape {SHAPE_ERRORS[name]}, got {list(longer.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        extend_attention(**{**good, name: longer})
    wrong = good[name].double() if good[name].is_floating_point() else good[name].long()
    with pytest.raises(ValueError, match=rf"^{name} must have dtype .*, got \w+$"):
        extend_attention(**{**good, name: wrong})
    # The query decides where everything should be, so the next argument is the one to disagree.
    named = "new_key" if name == "query" else name
    with pytest.raises(ValueError, match=rf"^{named} must be on (meta|{device}.*), got "):
        extend_attention(**{**good, name: good[name].to("meta")})


def test_wrong_option_is_named(device: str) -> None:
    good = oracle.make_call((2, 2, 2, 9, 5, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"^query must have a multiple of 2 heads .*, got 3$"):
        extend_attention(**{**good, "query": good["query"][:, :3]})
    wide = good["key"].repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match=r"^key must have stride 1 in its last dimension, got 2$"):
        extend_attention(**{**good, "key": wide})
    with pytest.raises(ValueError, match=r"^impl must be one of .*, got 'flash'$"):
        extend_attention(**good, impl="flash")
