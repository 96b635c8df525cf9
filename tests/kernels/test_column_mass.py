"""Log-sum-exp and column mass of a longer call, both implementations, against float64."""

import importlib
import re

import oracle
import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import column_mass, extend_attention

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("poisoned_memory")]

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.column_mass")


def make_call(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    call = oracle.make_call(shape, dtype, device)
    return {name: call[name] for name in ("query", "new_key", "key", "num_valid")}


def left_padding(shape: tuple[int, ...], device: str) -> Tensor:
    batch, tokens = shape[0], shape[4]
    pads = torch.tensor([tokens // 2, tokens][:batch], device=device)
    return torch.arange(tokens, device=device) >= pads[:, None]


def weights_of(
    call: dict[str, Tensor], valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The whole matrix in float64, ``[batch, num_heads, q_len, slots + q_len]``, and its lse."""
    query, keys = call["query"].double().cpu(), torch.cat((call["key"], call["new_key"]), 2)
    batch, num_heads, tokens, _ = query.shape
    slots, group = call["key"].shape[2], num_heads // keys.shape[1]
    weights = torch.zeros(batch, num_heads, tokens, slots + tokens, dtype=torch.float64)
    lse = torch.zeros(batch, num_heads, tokens, dtype=torch.float64)
    for row in range(batch):
        real = list(range(tokens)) if valid is None else valid[row].nonzero()[:, 0].tolist()
        for head in range(num_heads):
            held = range(int(call["num_valid"][row, head // group]))
            for token in real:
                seen = [*held, *(slots + other for other in real if other <= token)]
                own = keys[row, head // group, seen].double().cpu() @ query[row, head, token]
                weights[row, head, token, seen] = (own * scale).softmax(0)
                lse[row, head, token] = (own * scale).exp().sum().log()
    return weights, lse


def reduced(weights: Tensor, kv_heads: int, queries: int, reduce: str) -> Tensor:
    return over_group(weights[:, :, weights.shape[2] - queries :].sum(dim=2), kv_heads, reduce)


def over_group(heads: Tensor, kv_heads: int, reduce: str) -> Tensor:
    if reduce == "none":
        return heads
    group = heads.unflatten(1, (kv_heads, -1))
    if reduce == "max":
        return group.max(dim=2).values
    return group.sum(dim=2) / (group.shape[2] if reduce == "mean" else 1)


def below_even(weights: Tensor, kv_heads: int, queries: int, reduce: str) -> tuple[Tensor, Tensor]:
    """How many queries give each column less than 1/n, and how many too nearly 1/n to tell."""
    weights = weights[:, :, weights.shape[2] - queries :]
    share = over_group(weights, kv_heads, reduce)
    seen = over_group((weights > 0).double(), kv_heads, "none" if reduce == "none" else "max")
    excess = share * seen.sum(dim=-1, keepdim=True) - 1
    unclear = (excess.abs() < 1e-5) & (seen.sum(dim=-1, keepdim=True) > 1)
    below = (excess < -1e-12) & (seen > 0)
    return below.sum(dim=2).double(), unclear.sum(dim=2).double()


def lse_of(call: dict[str, Tensor], valid: Tensor | None, scale: float, impl: str) -> Tensor:
    values = {"new_value": call["new_key"], "value": call["key"]}
    plain = extend_attention(**call, **values, valid=valid, scale=scale, impl=impl)
    lse = torch.full(call["query"].shape[:3], torch.nan, device=call["query"].device)
    output = extend_attention(**call, **values, valid=valid, scale=scale, lse=lse, impl=impl)
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    return lse


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.CALL_SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, padded: bool, impl: str, device: str
) -> None:
    call = make_call(shape, dtype, device)
    valid = left_padding(shape, device) if padded else None
    weights, exact_lse = weights_of(call, valid, 0.2)
    lse = lse_of(call, valid, 0.2, impl)
    real = torch.ones(shape[0], shape[4], dtype=torch.bool) if valid is None else valid.cpu()
    real = real[:, None].expand(exact_lse.shape)
    torch.testing.assert_close(lse.cpu()[real].double(), exact_lse[real], rtol=2e-5, atol=2e-5)
    for queries, reduce in (
        (None, "sum"), (max(1, shape[4] // 3), "none" if padded else "mean"), (1, "max"),
    ):  # fmt: skip
        mass = column_mass(
            **call, lse=lse, valid=valid, scale=0.2, queries=queries, reduce=reduce, impl=impl
        )
        expected = reduced(weights, shape[1], queries or shape[4], reduce)
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass.double().cpu(), expected, rtol=5e-5, atol=5e-6)
        assert (mass.cpu()[expected == 0] == 0).all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [oracle.CALL_SHAPES[index] for index in (0, 1, 4, 7)], ids=str)
def test_counts_match_float64(
    shape: tuple[int, ...], dtype: torch.dtype, padded: bool, impl: str, device: str
) -> None:
    call = make_call(shape, dtype, device)
    valid = left_padding(shape, device) if padded else None
    weights, lse = weights_of(call, valid, 0.2)
    lse = lse.float().to(device)
    few = max(1, shape[4] // 3)
    for queries, reduce in ((None, "sum"), (few, "mean"), (None, "max"), (few, "none")):
        count = column_mass(
            **call, lse=lse, valid=valid, scale=0.2, queries=queries, reduce=reduce,
            count_below=True, impl=impl,
        )  # fmt: skip
        expected, unclear = below_even(weights, shape[1], queries or shape[4], reduce)
        assert count.dtype == torch.float32
        assert unclear.sum() <= 1
        assert ((count.cpu() - expected).abs() <= unclear).all()


@pytest.mark.parametrize(("block_m", "block_s"), [(16, 64), (64, 16), (32, 32)])
def test_tilings_agree(
    block_m: int, block_s: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    config = MODULE.ColumnConfig(block_m, block_s, num_warps=4, num_stages=2)
    monkeypatch.setattr(MODULE, "column_config", lambda *_: config)
    call = make_call((1, 2, 3, 50, 90, 16), torch.float32, device)
    lse = lse_of(call, None, 0.25, "torch")
    for queries in (90, 37):
        mass = column_mass(**call, lse=lse, queries=queries, impl="triton")
        weights = weights_of(call, None, 0.25)[0]
        expected = reduced(weights, 2, queries, "sum")
        torch.testing.assert_close(mass.double().cpu(), expected, rtol=5e-5, atol=5e-6)
        options = {"queries": queries, "reduce": "mean", "count_below": True, "impl": "triton"}
        count = column_mass(**call, lse=lse, **options)
        expected, unclear = below_even(weights, 2, queries, "mean")
        assert ((count.cpu() - expected).abs() <= unclear).all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_a_prompt_gives_cumulative_attention(impl: str, device: str) -> None:
    """The scores of H2O and of a window of two queries, on attention rows given in full."""
    heads = (
        [[1], [0.6, 0.4], [0.5, 0.2, 0.3], [0.4, 0.1, 0.1, 0.4], [0.3, 0.1, 0.2, 0.1, 0.3]],
        [[1], [0.2, 0.8], [0.1, 0.6, 0.3], [0.1, 0.5, 0.2, 0.2], [0.1, 0.4, 0.1, 0.2, 0.2]],
    )
    query = torch.zeros(1, 2, 5, 16)
    for head, rows in enumerate(heads):
        for step, row in enumerate(rows):
            query[0, head, step, : step + 1] = torch.tensor(row).log()
    # keys are unit vectors, so that a query names its logits
    call = {
        "query": query,
        "new_key": torch.eye(5, 16)[None, None],
        "key": torch.zeros(1, 1, 0, 16),
    }
    call = {name: tensor.to(device) for name, tensor in call.items()}
    call["num_valid"] = None
    lse = lse_of(call, None, 1.0, impl)
    for queries, reduce, expected in (
        (5, "mean", [2.15, 1.55, 0.6, 0.45, 0.25]),
        (5, "max", [2.8, 2.3, 0.6, 0.5, 0.3]),
        (2, "sum", [0.9, 1.1, 0.6, 0.9, 0.5]),
    ):
        mass = column_mass(**call, lse=lse, scale=1.0, queries=queries, reduce=reduce, impl=impl)
        torch.testing.assert_close(mass.cpu()[0, 0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_a_prompt_counts_what_is_less_than_even(impl: str, device: str) -> None:
    """The counts of Scissorhands, on attention rows given in full: two heads, four queries."""
    heads = (
        [[1], [0.6, 0.4], [0.5, 0.2, 0.3], [0.4, 0.1, 0.15, 0.35]],
        [[1], [0.2, 0.8], [0.1, 0.6, 0.3], [0.06, 0.5, 0.22, 0.22]],
    )
    query = torch.zeros(1, 2, 4, 16)
    for head, rows in enumerate(heads):
        for step, row in enumerate(rows):
            query[0, head, step, : step + 1] = torch.tensor(row).log()
    # keys are unit vectors, so that a query names its logits
    call = {
        "query": query,
        "new_key": torch.eye(4, 16)[None, None],
        "key": torch.zeros(1, 1, 0, 16),
    }
    call = {name: tensor.to(device) for name, tensor in call.items()}
    call["num_valid"] = None
    lse = lse_of(call, None, 1.0, impl)
    for queries, reduce, expected in (
        (4, "none", [[0, 3, 2, 0], [3, 0, 2, 1]]),
        (4, "mean", [[3, 0, 2, 0]]),
        (4, "max", [[0, 0, 2, 0]]),
        (4, "sum", [[0, 0, 0, 0]]),
        (1, "mean", [[1, 0, 1, 0]]),
    ):
        count = column_mass(
            **call, lse=lse, scale=1.0, queries=queries, reduce=reduce, count_below=True, impl=impl
        )
        assert count[0].tolist() == expected


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_what_is_given_is_received(impl: str, device: str) -> None:
    """Every real query gives one: sums over the columns count the queries."""
    shape = (2, 2, 2, 40, 30, 16)
    call, valid = make_call(shape, torch.float32, device), left_padding(shape, device)
    lse = lse_of(call, valid, 0.25, impl)
    mass = column_mass(**call, lse=lse, valid=valid, impl=impl)
    total = 2.0 * valid.sum(1, keepdim=True).expand(2, 2).cpu()
    torch.testing.assert_close(mass.sum(-1).cpu(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_compiles_without_a_break(impl: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.undo()  # poisoned, `new_empty` cannot be traced
    call = make_call((1, 2, 2, 9, 5, 16), torch.float32, device)

    def run(call: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        values = {"new_value": call["new_key"], "value": call["key"]}
        lse = call["query"].new_zeros(call["query"].shape[:3])
        extend_attention(**call, **values, lse=lse, impl=impl)
        return lse, column_mass(**call, lse=lse, impl=impl)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(call), run(call), strict=True):
        torch.testing.assert_close(got, wanted)


def test_triton_ops_are_registered_exactly(device: str) -> None:
    call = make_call((1, 2, 2, 9, 5, 16), torch.float32, device)
    query, new_key, key, num_valid = call.values()
    valid = torch.ones(1, 5, dtype=torch.bool, device=device)
    lse = torch.zeros(1, 4, 5, device=device)
    call = extend_attention.flat(
        query, new_key, new_key, key, key, num_valid, valid=valid, scale=0.25, lse=lse
    )
    torch.library.opcheck(extend_attention.registered["triton"], call)
    real = {"num_valid": num_valid, "valid": valid}
    for options in (
        {**real, "queries": 3, "reduce": "mean"},
        {**real, "reduce": "none", "count_below": True},
        {"queries": 5, "reduce": "max", "scale": 0.25},
    ):
        call = column_mass.flat(query, new_key, key, lse, **options)
        torch.library.opcheck(column_mass.registered["triton"], call)


@pytest.mark.parametrize(
    ("queries", "head_dim", "itemsize", "config"),
    [
        (4096, 128, 2, (64, 128, 8, 3)), (32, 128, 2, (32, 128, 8, 3)),
        (4096, 256, 2, (32, 64, 4, 2)), (4096, 128, 4, (16, 32, 4, 2)),
    ],
)  # fmt: skip
def test_launch_comes_from_shapes(
    queries: int, head_dim: int, itemsize: int, config: tuple[int, ...]
) -> None:
    assert MODULE.column_config(queries, head_dim, itemsize) == MODULE.ColumnConfig(*config)


SHAPE_ERRORS = {
    "query": "[batch, num_heads, q_len, head_dim]",
    "new_key": "[2, 2, 5, 16]",
    "key": "[batch, num_kv_heads, num_slots, head_dim]",
    "lse": "[2, 4, 5]",
    "num_valid": "[2, 2]",
    "valid": "[2, 5]",
}


def arguments(device: str) -> dict[str, Tensor]:
    call = make_call((2, 2, 2, 9, 5, 16), torch.float32, device)
    call["lse"] = torch.zeros(2, 4, 5, device=device)
    call["valid"] = torch.ones(2, 5, dtype=torch.bool, device=device)
    return call


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_wrong_tensor_is_named(name: str, device: str) -> None:
    good = arguments(device)
    longer = good[name][..., None]
    message = f"{name} must have shape {SHAPE_ERRORS[name]}, got {list(longer.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        column_mass(**{**good, name: longer})
    wrong = good[name].double() if good[name].is_floating_point() else good[name].long()
    with pytest.raises(ValueError, match=rf"^{name} must have dtype .*, got \w+$"):
        column_mass(**{**good, name: wrong})
    # The query decides where everything should be, so the next argument is the one to disagree.
    named = "new_key" if name == "query" else name
    with pytest.raises(ValueError, match=rf"^{named} must be on (meta|{device}.*), got "):
        column_mass(**{**good, name: good[name].to("meta")})


def test_wrong_option_is_named(device: str) -> None:
    good = arguments(device)
    for changes, message in (
        ({"queries": 6}, "queries must be between 1 and 5, got 6"),
        ({"queries": 0}, "queries must be between 1 and 5, got 0"),
        ({"reduce": "all"}, "reduce must be one of 'sum', 'mean', 'max', 'none', got 'all'"),
        ({"impl": "cuda"}, "impl must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        (
            {"query": good["query"][:, :3]},
            "query must have a multiple of 2 heads (those of key), got 3",
        ),
        (
            {"key": good["key"].repeat_interleave(2, dim=-1)[..., ::2]},
            "key must have stride 1 in its last dimension, got 2",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            column_mass(**{**good, **changes})
