"""`retention_attention`, both implementations, against float64."""

import importlib
import itertools
import re
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import oracle
import packing
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trimkv_kernels.kernels import retention_attention
from trimkv_kernels.kernels._torch import retention_attention as torch_path

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("poisoned_memory")]

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.retention_attention")

NAMES = ("query", "key", "value", "log_beta")

# batch, KV heads, group, tokens, head_dim, packed
SHAPES = [
    (1, 1, 1, 1, 16, False),
    (2, 2, 1, 17, 64, True),
    (1, 1, 2, 63, 16, False),
    (2, 1, 4, 37, 80, True),
    (2, 1, 8, 17, 128, True),
    (1, 1, 1, 100, 24, False),
    (2, 1, 1, 63, 128, True),
    (1, 1, 2, 20, 256, False),
    (2, 1, 16, 19, 64, True),
]

Places = list[tuple[int, slice]]


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a short sequence has several."""
    use_tiles(monkeypatch, 32, 16)


def use_tiles(monkeypatch: pytest.MonkeyPatch, block_t: int, block_s: int) -> None:
    config = MODULE.RetentionAttentionConfig(block_t, block_s, num_warps=4, num_stages=1)
    monkeypatch.setattr(MODULE, "retention_attention_config", lambda *_: config)


def make_call(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs that require gradients; the projections are views of one tensor, as in a model."""
    batch, heads, group, seq, head_dim = shape
    rng = torch.Generator().manual_seed(seed)
    size = (batch, seq, (group + 2) * heads, head_dim + 8)
    fused = torch.randn(size, generator=rng).to(dtype).to(device).transpose(1, 2)
    parts = fused[..., :head_dim].split([group * heads, heads, heads], 1)
    call = dict(zip(NAMES[:3], parts, strict=True))
    call["log_beta"] = -(torch.rand(batch, heads, seq, generator=rng) ** 6).to(device)
    return {name: tensor.detach().requires_grad_() for name, tensor in call.items()}


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, places: Places, mode: str
) -> tuple[Tensor, Tensor]:
    """The definition, document by document and head by head, in the dtype of the inputs."""
    output = torch.zeros_like(query)
    lse = torch.full_like(query[..., 0], -torch.inf)
    group = query.shape[1] // key.shape[1]
    for (row, place), head in itertools.product(places, range(query.shape[1])):
        q, k, v, slope = (
            x[row, index, place]
            for x, index in ((query, head), *((x, head // group) for x in (key, value, log_beta)))
        )
        t = torch.arange(len(q), device=q.device)
        bias = (t[:, None] - t).clamp(min=0) * slope
        logits = q @ k.T / q.shape[-1] ** 0.5
        logits = logits + bias if mode == "add" else logits * bias.exp()
        logits = logits.masked_fill(t > t[:, None], -torch.inf)
        lse[row, head, place] = logits.logsumexp(1)
        output[row, head, place] = logits.softmax(1) @ v
    return output, lse


def weights_of(output: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Random weights of the output and of the log-sum-exp in the loss that is differentiated."""
    rng = torch.Generator().manual_seed(1)
    weight, lse_weight = (torch.randn(x.shape, generator=rng) for x in (output, output[..., 0]))
    return weight.to(output.device), lse_weight.to(output.device) * with_lse


def run_grads(output: Tensor, lse: Tensor, inputs: list[Tensor], with_lse: bool) -> list[Tensor]:
    """Gradients of a random weighting of the output, and of the log-sum-exp of real tokens."""
    weight, lse_weight = weights_of(output, with_lse)
    real = lse > -torch.inf
    loss = (output * weight.to(output)).sum()
    if with_lse:
        loss = loss + (lse[real] * lse_weight.to(lse)[real]).sum()
    return list(torch.autograd.grad(loss, inputs))


def term_sizes(
    call: dict[str, Tensor], places: Places, mode: str, with_lse: bool
) -> list[tuple[Tensor, Tensor]]:
    """How large the terms are that each number is a sum of: what its rounding errors scale with.

    Of output, log-sum-exp and gradients two sizes each, in float64: the sum of the absolute terms,
    and the same with every weight times its relative error in units of rounding, which is the size
    of the terms of its logit and of its row's log-sum-exp.
    """
    query, key, value, log_beta = (tensor.detach().double() for tensor in call.values())
    weight_of, lse_weight_of = (x.double() for x in weights_of(query, with_lse))
    weight, lse_weight = weight_of.abs(), lse_weight_of.abs()
    sizes = [torch.zeros_like(x) for x in (query, query[..., 0], query, key, value, log_beta)]
    amplified = [torch.zeros_like(x) for x in sizes]
    group, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    for (row, place), head in itertools.product(places, range(query.shape[1])):
        own, shared = (row, head, place), (row, head // group, place)
        q, g, g_lse, k, v = (
            *(query[own].abs(), weight[own], lse_weight[own]),
            *(key[shared].abs(), value[shared].abs()),
        )
        t = torch.arange(len(q), device=q.device)
        age = (t[:, None] - t).clamp(min=0).double()
        bias = age * log_beta[shared]
        decay = bias.exp() if mode == "scale" else torch.ones_like(bias)
        product = q @ k.T * scale * decay
        terms = product * (1 - bias) if mode == "scale" else product - bias
        logits = query[own] @ key[shared].T * scale
        logits = logits * decay if mode == "scale" else logits + bias
        logits = logits.masked_fill(t > t[:, None], -torch.inf)
        p = logits.softmax(1)
        row_terms = (p * terms).sum(1, keepdim=True)
        p_error = p * (1 + terms + row_terms)
        output, output_error = p @ v, p_error @ v
        delta, delta_error = ((g * x).sum(1, keepdim=True) for x in (output, output_error))
        step = g @ v.T + delta + g_lse[:, None]  # of a logit, before the weight
        ds_error = p_error * step + p * delta_error
        # What is rounded to the dtype is the gradient of a logit itself, and each number of two
        # vectors whose product it contains: independent errors.
        ds = p * ((g**2 @ (v**2).T).sqrt() + (g**2 * output**2).sum(1, keepdim=True).sqrt())
        signed = weight_of[own] @ value[shared].T
        signed = signed - (p * signed).sum(1, keepdim=True) + lse_weight_of[own][:, None]
        ds = ds + p * signed.abs()
        logit_size = product if mode == "scale" else torch.ones_like(product)
        logit_error = terms if mode == "scale" else torch.ones_like(product)
        found = (
            (output, output_error),
            (logits.logsumexp(1).abs(), row_terms[:, 0] + 1),
            (ds * decay @ k * scale, ds_error * decay @ k * scale),
            ((ds * decay).T @ q * scale, (ds_error * decay).T @ q * scale),
            (p.T @ g, p_error.T @ g),
            ((ds * logit_size * age).sum(0), ((ds_error + p * step) * logit_error * age).sum(0)),
        )
        for index, (size, error) in enumerate(found):
            where = own if index < 3 else shared
            sizes[index][where] += size
            amplified[index][where] += error
    return list(zip(sizes, amplified, strict=True))


def check(
    impl: str,
    call: dict[str, Tensor],
    document: Tensor | None,
    places: Places,
    mode: str = "add",
) -> None:
    """Require each error within what rounding explains, and a fifth of that on average (RMS).

    Sums are taken in fp32, where the errors of ``n`` summands, half a unit in the last place each,
    add up like a random walk. Between two sums numbers are rounded to the dtype: weights, logits'
    gradients, output and result, half a unit each.
    """
    query = call["query"]
    dtype, with_lse = query.dtype, query.shape[3] != 80
    output, lse = retention_attention(**call, document=document, mode=mode, impl=impl)
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    found = [output, lse, *run_grads(output, lse, list(call.values()), with_lse)]
    wide = [tensor.detach().double().requires_grad_() for tensor in call.values()]
    exact = list(exact_attention(*wide, places, mode))
    assert torch.equal(lse == -torch.inf, exact[1] == -torch.inf)
    exact += run_grads(*exact, wide, with_lse)
    terms = query.shape[3] + query.shape[2] * query.shape[1] // call["key"].shape[1]
    walk = terms**0.5 * torch.finfo(torch.float32).eps / 2
    for name, one, expected, (size, amplified) in zip(
        ("output", "lse", *NAMES), found, exact, term_sizes(call, places, mode, with_lse),
        strict=True,
    ):  # fmt: skip
        assert one.shape == expected.shape, name
        assert one.isfinite().all() or name == "lse", name
        real = expected.isfinite()
        rounded_to = torch.float32 if name == "lse" else dtype
        allowed = 2 * torch.finfo(rounded_to).eps * size + walk * amplified
        share = (one.double() - expected).abs()[real] / (allowed[real] + 1e-30)
        assert share.max() <= 1, (name, share.max())
        assert share.square().mean() <= 1 / 25, (name, share.square().mean().sqrt())


@pytest.mark.parametrize("kind", ["whole", "padded", "packed", "short"])
@pytest.mark.parametrize("tile", [(16, 32), (32, 16)], ids=str)
def test_tiles_and_documents(
    tile: tuple[int, int], kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, *tile)
    document, places = packing.pack(packing.layout(kind, 50))
    given = None if kind == "whole" else document.to(device)
    check("triton", make_call((2, 1, 2, 50, 16), torch.float32, device), given, places)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_matches_float64(
    impl: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    """In the tiles it ships with."""
    *shape, packed = shape
    document, places = None, packing.whole_rows(shape[0], shape[3])
    if packed:
        document, places = packing.pack(packing.layout("packed", shape[3]))
        document = document.to(device)
    check(impl, make_call(tuple(shape), dtype, device), document, places)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_scale_mode_matches_float64(impl: str, device: str) -> None:
    document, places = packing.pack(packing.layout("packed", 37))
    call = make_call((2, 1, 2, 37, 16), torch.float32, device)
    check(impl, call, document.to(device), places, "scale")


@hypothesis.given(
    lengths=st.lists(st.tuples(st.booleans(), st.integers(1, 90)), min_size=1, max_size=5),
    group=st.integers(1, 5),
    head_dim=st.integers(1, 20),
)
@hypothesis.settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_packing(
    lengths: list[tuple[bool, int]], group: int, head_dim: int, device: str
) -> None:
    row = [(-1 if pad else name, length) for name, (pad, length) in enumerate(lengths)]
    document, places = packing.pack([row])
    hypothesis.assume(places)
    call = make_call((1, 2, group, document.shape[1], head_dim), torch.float32, device)
    check("torch", call, document.to(device), places)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("add", [0.1476, 0.261998, 0.590402]), ("scale", [0.282689, 0.236884, 0.480428])],
)
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_worked_numbers(impl: str, mode: str, expected: list[float], device: str) -> None:
    query = torch.tensor([[[[1.0, 0.0]] * 3]], device=device)
    key = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]], device=device)
    value = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]], device=device)
    log_beta = torch.tensor([[[0.5, 0.9, 0.99]]], device=device).log()
    output = retention_attention(query, key, value, log_beta, mode=mode, impl=impl)[0][0, 0, 2]
    torch.testing.assert_close(output.cpu(), torch.tensor(expected[:2]), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_perfect_retention_is_causal_attention(impl: str, device: str) -> None:
    call = make_call((2, 1, 2, 50, 16), torch.float32, device)
    call["log_beta"] = torch.zeros_like(call["log_beta"])
    output, _ = retention_attention(**call, scale=0.3, impl=impl)
    expected = F.scaled_dot_product_attention(
        call["query"], call["key"], call["value"], is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    inputs = [call[name] for name in NAMES[:3]]
    grads, expected_grads = (
        torch.autograd.grad(x.square().sum(), inputs) for x in (output, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_a_document_alone_and_packed(impl: str, device: str) -> None:
    document, places = packing.pack(packing.layout("packed", 45))
    call = make_call((2, 1, 2, 45, 16), torch.float32, device)
    packed, _ = retention_attention(**call, document=document.to(device), impl=impl)
    for row, place in places:
        alone, _ = retention_attention(
            *(call[name][row : row + 1, :, place] for name in NAMES), impl=impl
        )
        torch.testing.assert_close(packed[row : row + 1, :, place], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_padding_is_nowhere(impl: str, device: str) -> None:
    document = packing.pack(packing.layout("padded", 40))[0].to(device)
    call = make_call((2, 1, 2, 40, 16), torch.float32, device)
    pad = document < 0
    outputs = []
    for options in ({"document": document}, {"valid": ~pad}):
        output, _ = retention_attention(**call, **options, impl=impl)
        outputs.append([output, *torch.autograd.grad(output.square().sum(), list(call.values()))])
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)
        assert (first.movedim(2, 1)[pad] == 0).all()
    other = make_call((2, 1, 2, 40, 16), torch.float32, device, seed=1)
    mixed = [
        torch.where(pad[:, None].view(2, 1, 40, *[1] * (x.dim() - 3)), other[name], x)
        for name, x in call.items()
    ]
    assert torch.equal(retention_attention(*mixed, document=document, impl=impl)[0], outputs[0][0])


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_gradients_of_any_subset(impl: str, device: str) -> None:
    call = make_call((1, 1, 2, 18, 16), torch.float32, device)
    output, _ = retention_attention(**call, impl=impl)
    grads = torch.autograd.grad(output.sum(), list(call.values()))
    everything = dict(zip(NAMES, grads, strict=True))
    for names in (["query"], ["log_beta"], ["key", "value"], ["query", "value"]):
        given = {name: x if name in names else x.detach() for name, x in call.items()}
        output, _ = retention_attention(**given, impl=impl)
        grads = torch.autograd.grad(output.sum(), [given[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            assert torch.equal(grad, everything[name]), name
    output, _ = retention_attention(*(x.detach() for x in call.values()), impl=impl)
    assert not output.requires_grad


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_deterministic_and_free_of_strides(impl: str, device: str) -> None:
    call = make_call((2, 1, 2, 33, 16), torch.float32, device)
    document = packing.pack(packing.layout("packed", 33))[0].to(device)
    turned = {
        name: x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for name, x in call.items()
    }
    found = []
    for given in (call, call, turned):
        output, _ = retention_attention(**given, document=document, impl=impl)
        # the gradient of a sum has strides of 0
        found.append([output, *torch.autograd.grad(output.sum(), list(given.values()))])
    first, again, strided = found
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    for ours, expected in zip(strided, first, strict=True):
        if impl == "triton":
            assert torch.equal(ours, expected)
        else:  # a matrix product may sum in another order where strides differ; 33 targets at most
            bound = 33 * torch.finfo(torch.float32).eps * expected.abs().max().item()
            torch.testing.assert_close(ours, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_nan_is_not_hidden(impl: str, device: str) -> None:
    for name in NAMES:
        call = {
            x: y.detach() for x, y in make_call((1, 1, 1, 12, 16), torch.float32, device).items()
        }
        call[name][0, 0, 5] = torch.nan
        output, _ = retention_attention(**call, impl=impl)
        assert output[0, 0, 5 if name == "query" else 11].isnan().all(), name


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_everything_forgotten_leaves_the_token_itself(impl: str, device: str) -> None:
    call = make_call((1, 1, 1, 20, 16), torch.float32, device)
    call["log_beta"] = torch.full_like(call["log_beta"], -torch.inf).requires_grad_()
    output, _ = retention_attention(**call, impl=impl)
    torch.testing.assert_close(output, call["value"])
    (grad,) = torch.autograd.grad(output.sum(), call["log_beta"])
    assert (grad == 0).all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_empty_sequence(impl: str, device: str) -> None:
    call = make_call((1, 2, 2, 0, 16), torch.float32, device)
    assert retention_attention(**call, impl=impl)[0].shape == (1, 4, 0, 16)


def test_memory_of_the_torch_path_is_linear_in_the_sequence() -> None:
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
            return result

    call = make_call((1, 1, 2, 1000, 16), torch.float32, "cpu")
    inputs = [x.detach() for x in call.values()]
    with Sizes():  # which would not see inside of the op
        output, lse = torch_path.retention_attention(*inputs)
        torch_path.retention_attention_grad(output, lse, *inputs, output, lse)
    assert 1000 * 64 <= max(sizes) <= 2 * 1000 * 64  # two heads, a block of 64 targets


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_registered_and_compiles_without_a_break(impl: str, device: str) -> None:
    call = make_call((2, 1, 1, 9, 16), torch.float32, device)
    document = packing.pack(packing.layout("packed", 9))[0].to(device)
    op = retention_attention.registered[impl]
    torch.library.opcheck(op, retention_attention.flat(**call, scale=0.25))

    def loss(call: dict[str, Tensor], document: Tensor) -> Tensor:
        return retention_attention(**call, document=document, impl=impl)[0].square().sum()

    inputs = list(call.values())
    plain = torch.autograd.grad(loss(call, document), inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(call, document)
    for one, other in zip(torch.autograd.grad(compiled, inputs), plain, strict=True):
        assert torch.equal(one, other)


QUERY, KEY, LOG_BETA = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"query": QUERY[0]},
            "query must have shape [batch, num_heads, seq, head_dim], got [4, 5, 16]",
        ),
        ({"query": QUERY.double()}, "query must have dtype float32 or float16 or bfloat16"),
        ({"query": QUERY[:, :3]}, "query must have a multiple of 2 heads (those of key), got 3"),
        ({"query": torch.zeros(2, 4, 5, 257)}, "head_dim must be between 1 and 256, got 257"),
        ({"key": KEY[:, :, :4]}, "key must have shape [2, 2, 5, 16], got [2, 2, 4, 16]"),
        ({"value": KEY.half()}, "value must have dtype float32, got float16"),
        ({"value": KEY.to("meta")}, "value must be on cpu, got meta"),
        ({"log_beta": LOG_BETA[:, :1]}, "log_beta must have shape [2, 2, 5], got [2, 1, 5]"),
        ({"log_beta": LOG_BETA.half()}, "log_beta must have dtype float32, got float16"),
        ({"document": torch.zeros(2, 5)}, "document must have dtype int32, got float32"),
        (
            {"valid": torch.zeros(5, dtype=torch.bool)},
            "valid must have shape [2, 5], got [5]",
        ),
        ({"mode": "mul"}, "mode must be one of 'add', 'scale', got 'mul'"),
        ({"impl": "flash"}, "impl must be one of 'auto', 'triton', 'torch', got 'flash'"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], message: str) -> None:
    given = {"query": QUERY, "key": KEY, "value": KEY, "log_beta": LOG_BETA}
    with pytest.raises(ValueError, match=re.escape(message)):
        retention_attention(**{**given, **arguments})
