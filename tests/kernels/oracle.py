"""Slow and plain oracles of the kernels: float64 and Python loops.

Of the package they take `Slots` alone, to hand tensors to an op.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trimkv_kernels.kernels import Slots

State = dict[str, Tensor]

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # interpreted bf16 is not bf16
# of longer calls: batch, kv heads, group, slots, tokens, head_dim
CALL_SHAPES = [
    (1, 2, 4, 100, 9, 64),
    (2, 1, 1, 63, 70, 80),
    (2, 2, 8, 1, 5, 16),
    (1, 1, 2, 130, 33, 128),
    (2, 1, 3, 0, 40, 24),
    (1, 1, 2, 20, 17, 256),
    (2, 2, 2, 7, 1, 32),
    (1, 1, 16, 20, 9, 64),
]


def make_state(
    layers: int,
    batch: int,
    heads: int,
    num_slots: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    *,
    affine: bool = True,
    seed: int = 0,
) -> State:
    """Random base tensors with a ragged ``num_valid``; every slot holds finite numbers."""
    rng = torch.Generator().manual_seed(seed)
    shape = (layers, batch, heads, num_slots)
    position = torch.rand(shape, generator=rng).argsort(dim=-1).to(torch.int32)
    state = {
        "key": torch.randn(*shape, head_dim, generator=rng).to(dtype),
        "value": torch.randn(*shape, head_dim, generator=rng).to(dtype),
        "position": position,
        "num_valid": torch.randint(num_slots + 1, shape[:3], generator=rng, dtype=torch.int32),
    }
    if affine:
        state["slope"] = -torch.rand(shape, generator=rng)
        state["offset"] = torch.randn(shape, generator=rng)
    return {name: tensor.to(device) for name, tensor in state.items()}


SLOTS = (
    *("key", "value", "position", "num_valid", "capacity"),
    *("slope", "offset", "fields", "nan_seen"),
)


def with_slots(arguments: dict[str, object]) -> dict[str, object]:
    """Arguments of an op, those that belong to its slots put into them.

    Without a ``capacity`` among them every head may fill all slots.
    """
    key = arguments["key"]
    capacity = torch.full(key.shape[:3], key.shape[3], dtype=torch.int32, device=key.device)
    slots = {"capacity": capacity} | {x: y for x, y in arguments.items() if x in SLOTS}
    others = {x: y for x, y in arguments.items() if x not in SLOTS}
    return {**others, "slots": Slots(**slots)}


def make_call(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> State:
    """A longer call: slots with a ragged count, and tokens sliced out of larger tensors."""
    batch, heads, group, num_slots, tokens, head_dim = shape
    rng = torch.Generator().manual_seed(0)
    size = (batch, tokens, (group + 2) * heads, head_dim + 8)
    fused = torch.randn(size, generator=rng).to(dtype).to(device).transpose(1, 2)
    num_valid = torch.randint(num_slots + 1, (batch, heads), generator=rng, dtype=torch.int32)
    num_valid[0, 0] = 0
    num_valid[-1, -1] = num_slots
    slots = torch.randn(2, batch, heads, num_slots + 3, head_dim, generator=rng)
    key, value = slots.to(dtype).to(device)[:, :, :, :num_slots]
    return {
        "query": fused[:, : heads * group, :, :head_dim],
        "new_key": fused[:, heads * group : heads * (group + 1), :, 8:],
        "new_value": fused[:, heads * (group + 1) :, :, :head_dim],
        "key": key,
        "value": value,
        "num_valid": num_valid.to(device),
    }


def clone(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(state: State, expected: State) -> None:
    """Bit equality of every tensor."""
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    scale: float | None = None,
    softmax_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention of one token per row to each head's valid slots, head by head.

    With a ``softmax_dtype`` other than float64 every intermediate is rounded to it: what a plain
    computation in that dtype would give.
    """
    batch, num_heads, head_dim = query.shape
    group = num_heads // key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    output = torch.zeros(query.shape, dtype=softmax_dtype, device=query.device)
    for row in range(batch):
        for head in range(num_heads):
            kv_head = head // group
            n = key.shape[2] if num_valid is None else int(num_valid[row, kv_head])
            if n == 0:
                continue
            keys, values = (x[row, kv_head, :n].to(softmax_dtype) for x in (key, value))
            weights = torch.softmax((keys @ query[row, head].to(softmax_dtype)) * scale, dim=0)
            output[row, head] = weights @ values
    return output


def assert_attention_close(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    scale: float | None = None,
) -> None:
    """`assert_as_good` against `attention` in float64 and in the dtype of ``query``."""
    exact = attention(query, key, value, num_valid, scale)
    plain = attention(query, key, value, num_valid, scale, softmax_dtype=query.dtype)
    assert_as_good(output, exact, plain)


def assert_as_good(output: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Require errors, largest and RMS, within three times those of a plain computation."""
    assert output.shape == plain.shape
    assert output.dtype == plain.dtype
    rounding = torch.finfo(plain.dtype).eps * exact.abs().max().item()
    norms: tuple[Callable[[Tensor], float], ...] = (
        lambda error: error.abs().max().item(),
        lambda error: error.square().mean().sqrt().item(),
    )
    for norm in norms:
        allowed = 3 * (norm(plain.double() - exact) + rounding)
        assert norm(output.double() - exact) <= allowed, (norm(output.double() - exact), allowed)


def append(state: State, layer: int, new: State, t: Tensor, valid: Tensor | None) -> None:
    """Write each row's new token behind the valid slots of each head of one layer."""
    capacity = torch.full_like(state["num_valid"], state["position"].shape[-1])
    capacity = state.get("capacity", capacity)
    for row in range(t.numel()):
        for head in range(state["num_valid"].shape[2]):
            slot = int(state["num_valid"][layer, row, head])
            if slot >= capacity[layer, row, head] or (valid is not None and not valid[row]):
                continue
            state["position"][layer, row, head, slot] = t[row] - 1
            for name, tensor in new.items():
                state[name][layer, row, head, slot] = tensor[row, head]
            state["num_valid"][layer, row, head] = slot + 1


def affine_scores(slope: Tensor, offset: Tensor, t: Tensor, position: Tensor) -> Tensor:
    """``slope * (t - position) + offset`` in NumPy's float32, which never fuses the two."""
    age = (t[:, None, None] - position).cpu().numpy().astype(np.float32)
    return torch.from_numpy(slope.cpu().numpy() * age + offset.cpu().numpy())


def kept_positions(
    scores: list[float], positions: list[int], budget: int, t: int, sinks: int = 0, recent: int = 0
) -> set[int]:
    """Positions of the ``budget`` highest scores, by Python's sort."""

    def rank(item: tuple[float, int]) -> tuple[float, int]:
        score, position = item
        if position < sinks or (recent > 0 and position >= t - recent):
            return (math.inf, position)
        return (-math.inf if math.isnan(score) else score, position)

    best = sorted(zip(scores, positions, strict=True), key=rank, reverse=True)[:budget]
    return {position for _, position in best}
