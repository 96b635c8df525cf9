"""`evict`, both implementations, against Python's sort."""

import importlib
import math
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import evict

pytestmark = pytest.mark.numeric

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.evict")

INF, NAN = float("inf"), float("nan")
# Few values, so that ties are the rule.
SCORES = [-INF, -2.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3.0e38, INF, NAN]

SETTINGS = hypothesis.settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
FIELDS = ("field", "wide_field", "bool_field")


def make_case(
    shape: tuple[int, ...], num_valid: Tensor, device: str, *, seed: int = 0
) -> oracle.State:
    """State with extra fields, in which every number of a slot tells its token."""
    state = oracle.make_state(*shape, 3, torch.float16, device, affine=False, seed=seed)
    state["position"] = state["position"] * 2 + 1
    token = state["position"].to(torch.float32)
    state["key"] = (token[..., None] + torch.arange(3, device=device) / 4).half()
    state["value"] = -state["key"]
    state["num_valid"] = num_valid.to(device, torch.int32)
    state["field"] = token * 3
    state["wide_field"] = torch.stack((token, -token), -1).double().unsqueeze(-2)
    state["bool_field"] = token % 4 > 2
    return state


def run(state: oracle.State, **options: object) -> None:
    """Call `evict` on a state whose extra fields have names."""
    named = {name: tensor for name, tensor in state.items() if name not in FIELDS}
    named["fields"] = tuple(state[name] for name in FIELDS if name in state)
    evict(**oracle.with_slots(named | options))


def check(before: oracle.State, after: oracle.State, kept: dict[tuple[int, ...], set[int]]) -> None:
    """Each head in ``kept`` holds exactly those tokens, whole, and the others are as they were."""
    before, after = ({name: x.cpu() for name, x in state.items()} for state in (before, after))
    for head in np.ndindex(*before["num_valid"].shape):
        if head not in kept:
            for name, tensor in before.items():
                assert torch.equal(after[name][head], tensor[head]), name
            continue
        budget = len(kept[head])
        assert after["num_valid"][head] == budget
        position = after["position"][head][:budget].tolist()
        assert set(position) == kept[head]
        # What stays in the budget has not moved, and every slot's numbers came along.
        slots = {p: slot for slot, p in enumerate(before["position"][head].tolist())}
        origin = [slots[p] for p in position]
        assert all(source == slot or source >= budget for slot, source in enumerate(origin))
        for name in before.keys() - {"num_valid", "capacity"}:
            assert torch.equal(after[name][head][:budget], before[name][head][origin]), name


def expected_kept(
    state: oracle.State, scores: Tensor, t: Tensor, buffer: int, sinks: int, recent: int
) -> dict[tuple[int, ...], set[int]]:
    """Kept positions of every full head."""
    capacity = state.get("capacity", torch.full_like(state["num_valid"], scores.shape[-1]))
    kept = {}
    for head in map(tuple, (state["num_valid"] >= capacity).nonzero().tolist()):
        count = int(capacity[head])
        kept[head] = oracle.kept_positions(
            scores[head][:count].tolist(),
            state["position"][head][:count].tolist(),
            max(count - buffer, 0),
            int(t[head[1]]),
            sinks,
            recent,
        )
    return kept


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    shape = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)]))
    num_slots = draw(st.integers(2, 19))
    heads = math.prod(shape)
    scores = st.lists(
        st.sampled_from(SCORES), min_size=heads * num_slots, max_size=heads * num_slots
    )
    capacity = torch.full(shape, num_slots)
    if draw(st.booleans()):  # a head may have less than it has slots, even less than goes
        sizes = st.lists(st.integers(1, num_slots), min_size=heads, max_size=heads)
        capacity = torch.tensor(draw(sizes)).view(shape)
    missing = st.lists(st.sampled_from([0, 0, 1]), min_size=heads, max_size=heads)
    return {
        "scores": torch.tensor(draw(scores)).view(*shape, num_slots),
        "capacity": capacity,
        "num_valid": capacity - torch.tensor(draw(missing)).view(shape),
        "buffer": draw(st.integers(1, num_slots - 1) | st.just(1)),
        "sinks": draw(st.sampled_from([0, 0, 4])),
        "recent": draw(st.sampled_from([0, 0, 5])),
        "seed": draw(st.integers(0, 99)),
    }


def check_case(impl: str, device: str, case: dict[str, object]) -> None:
    scores, limits = case["scores"].to(device), [case[x] for x in ("buffer", "sinks", "recent")]
    layers, batch, _, num_slots = scores.shape
    state = make_case(scores.shape, case["num_valid"], device, seed=case["seed"])
    state["capacity"] = case["capacity"].to(device, torch.int32)
    t = torch.full((batch,), 2 * num_slots, dtype=torch.int32, device=device)
    t[0] += 3
    after = oracle.clone(state)
    nan_seen = torch.zeros(layers, dtype=torch.int32, device=device)
    options = dict(zip(("buffer", "sinks", "recent"), limits, strict=True))
    run(after, t=t, scores=scores, nan_seen=nan_seen, impl=impl, **options)
    check(state, after, expected_kept(state, scores, t, *limits))
    full = (state["num_valid"] == state["capacity"])[..., None]
    full = full & (torch.arange(num_slots, device=device) < state["capacity"][..., None])
    assert torch.equal(nan_seen.bool(), (scores.isnan() & full).flatten(1).any(1))


@hypothesis.given(case=cases())
@hypothesis.settings(SETTINGS, max_examples=150)
def test_torch_keeps_what_a_sort_keeps(device: str, case: dict[str, object]) -> None:
    check_case("torch", device, case)


# The interpreter takes its time: few examples, and a failing one is not made smaller.
@hypothesis.given(case=cases())
@hypothesis.settings(SETTINGS, max_examples=30, phases=[hypothesis.Phase.generate])
def test_triton_keeps_what_a_sort_keeps(device: str, case: dict[str, object]) -> None:
    check_case("triton", device, case)


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize(
    ("num_slots", "buffer"), [(2, 1), (100, 1), (100, 37), (513, 64), (130, 129)]
)
def test_affine_scores(impl: str, num_slots: int, buffer: int, device: str) -> None:
    state = oracle.make_state(2, 2, 1, num_slots, 16, torch.float32, device)
    state["num_valid"].fill_(num_slots)
    state["num_valid"][1, 0] = num_slots - 1
    t = torch.tensor([num_slots, num_slots + 9], dtype=torch.int32, device=device)
    scores = oracle.affine_scores(state["slope"], state["offset"], t, state["position"])
    after = oracle.clone(state)
    run(after, t=t, buffer=buffer, sinks=1, recent=2, impl=impl)
    check(state, after, expected_kept(state, scores, t, buffer, 1, 2))


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("budget", [5, 3, 1])
def test_zeros_of_either_sign_are_equal(impl: str, budget: int, device: str) -> None:
    state = make_case((1, 1, 1, 6), torch.tensor([[[6]]]), device)
    position = state["position"][0, 0, 0].clone()
    newest = position.sort().values[-budget:]
    scores = torch.where(position > 5, -0.0, 0.0)[None, None, None]
    t = torch.tensor([20], dtype=torch.int32, device=device)
    run(state, t=t, buffer=6 - budget, scores=scores, impl=impl)
    assert torch.equal(state["position"][0, 0, 0, :budget].sort().values, newest)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_score_is_rounded_after_the_product(impl: str, device: str) -> None:
    """Two tokens that tie only if the product is rounded first; then the older one goes."""
    rng = torch.Generator().manual_seed(0)
    slope, offset = -torch.rand(4000, generator=rng), torch.rand(4000, generator=rng) * 600
    age = torch.randint(3, 999, (4000,), generator=rng)
    fused = (slope.double() * age + offset.double()).float()
    heads = 20
    higher = (fused > slope * age + offset).nonzero()[:heads, 0]  # fused, they would stay
    assert len(higher) == heads
    slope, offset, age = slope[higher], offset[higher], age[higher]
    newest = torch.full_like(age, 999)
    state = {
        "key": torch.zeros(1, 1, heads, 2, 1),
        "value": torch.zeros(1, 1, heads, 2, 1),
        "position": torch.stack((1000 - age, newest), dim=-1).int()[None, None],
        "num_valid": torch.full((1, 1, heads), 2, dtype=torch.int32),
        "slope": torch.stack((slope, torch.zeros(heads)), dim=-1)[None, None],
        "offset": torch.stack((offset, slope * age + offset), dim=-1)[None, None],
    }
    state = {name: tensor.to(device) for name, tensor in state.items()}
    t = torch.tensor([1000], dtype=torch.int32, device=device)
    run(state, t=t, buffer=1, impl=impl)
    assert (state["position"][..., 0] == 999).all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("buffer", [1, 7])
def test_slot_order_does_not_matter(impl: str, buffer: int, device: str) -> None:
    rng = torch.Generator().manual_seed(3)
    scores = torch.randint(4, (1, 1, 2, 40), generator=rng).float().to(device)
    state = make_case(scores.shape, torch.full((1, 1, 2), 40), device)
    del state["wide_field"]
    order = torch.rand(1, 1, 2, 40, generator=rng).argsort(-1).to(device)
    shuffled = oracle.clone(state)
    for name in state.keys() - {"num_valid"}:
        index = order[..., None] if state[name].dim() == 5 else order
        shuffled[name] = state[name].take_along_dim(index, 3)
    t = torch.tensor([90], dtype=torch.int32, device=device)
    budget = 40 - buffer
    run(state, t=t, buffer=buffer, scores=scores, impl=impl)
    run(shuffled, t=t, buffer=buffer, scores=scores.take_along_dim(order, 3), impl=impl)
    kept, kept_shuffled = (
        x["position"][..., :budget].sort(dim=-1).values for x in (state, shuffled)
    )
    assert torch.equal(kept, kept_shuffled)


def test_both_implementations_leave_the_same_slots(device: str) -> None:
    rng = torch.Generator().manual_seed(4)
    scores = torch.randint(9, (2, 2, 1, 70), generator=rng).float().to(device)
    state = make_case(scores.shape, torch.full((2, 2, 1), 70), device)
    other = oracle.clone(state)
    t = torch.tensor([150, 160], dtype=torch.int32, device=device)
    run(state, t=t, buffer=20, scores=scores, recent=3, impl="torch")
    run(other, t=t, buffer=20, scores=scores, recent=3, impl="triton")
    for name in state:
        x, y = state[name], other[name]
        assert torch.equal(x, y) if x.dim() == 3 else torch.equal(x[:, :, :, :50], y[:, :, :, :50])


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_compiles_without_a_break(impl: str, device: str) -> None:
    state = make_case((1, 1, 2, 9), torch.tensor([[[9, 8]]]), device)
    scores = torch.rand(1, 1, 2, 9, generator=torch.Generator().manual_seed(5)).to(device)
    expected = oracle.clone(state)
    t = torch.tensor([30], dtype=torch.int32, device=device)
    run(expected, t=t, buffer=3, scores=scores, impl=impl)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    compiled(state, t=t, buffer=3, scores=scores, impl=impl)
    oracle.assert_same(state, expected)


def test_triton_op_is_registered_exactly(device: str) -> None:
    state = oracle.make_state(1, 1, 2, 9, 4, torch.float32, device)
    state["num_valid"].fill_(9)
    t = torch.tensor([30], dtype=torch.int32, device=device)
    state["nan_seen"] = torch.zeros(1, dtype=torch.int32, device=device)
    op = evict.registered["triton"]
    affine = oracle.with_slots(state)
    torch.library.opcheck(op, evict.flat(**affine, t=t, buffer=3, sinks=1, recent=2))
    scores, _ = state.pop("slope"), state.pop("offset")
    field = torch.rand(1, 1, 2, 9, 2, device=device)
    scored = oracle.with_slots(state | {"fields": (field,), "nan_seen": None})
    torch.library.opcheck(op, evict.flat(**scored, t=t, buffer=3, scores=scores.clone()))


@pytest.mark.parametrize(
    ("num_slots", "buffer", "block_r", "num_warps"),
    [(513, 1, 1, 4), (640, 128, 16, 4), (4224, 128, 16, 16), (20000, 5, 8, 16)],
)
def test_launch_comes_from_shapes(
    num_slots: int, buffer: int, block_r: int, num_warps: int
) -> None:
    assert MODULE.evict_config(num_slots, buffer) == MODULE.EvictConfig(block_r, num_warps)


SHAPES = {
    "key": "[layers, batch, num_kv_heads, num_slots, head_dim]",
    "value": "[1, 2, 2, 6, 16]",
    "position": "[1, 2, 2, 6]",
    "num_valid": "[1, 2, 2]",
    "capacity": "[1, 2, 2]",
    "t": "[2]",
    "slope": "[1, 2, 2, 6]",
    "offset": "[1, 2, 2, 6]",
    "scores": "[1, 2, 2, 6]",
    "nan_seen": "[1]",
}


def arguments(device: str, name: str) -> dict[str, Tensor]:
    """Valid arguments; with ``scores`` instead of slope and offset when that is ``name``."""
    state = oracle.make_state(1, 2, 2, 6, 16, torch.float32, device)
    if name == "scores":
        state["scores"] = state.pop("slope")
        del state["offset"]
    t = torch.zeros(2, dtype=torch.int32, device=device)
    state["capacity"] = torch.full_like(state["num_valid"], 6)
    return {**state, "t": t, "nan_seen": torch.zeros(1, dtype=torch.int32, device=device)}


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_tensor_is_named(name: str, device: str) -> None:
    good = arguments(device, name)
    longer = good[name][..., None]
    message = f"{name} must have shape {SHAPES[name]}, got {list(longer.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run({**good, name: longer}, buffer=2)
    # The key decides dtype and device, so value is the one to disagree with it.
    named = "value" if name == "key" else name
    wrong = good[name].double() if good[name].is_floating_point() else good[name].long()
    with pytest.raises(ValueError, match=rf"^{named} must have dtype \w+, got \w+$"):
        run({**good, name: wrong}, buffer=2)
    with pytest.raises(ValueError, match=rf"^{named} must be on (meta|{device}.*), got "):
        run({**good, name: good[name].to("meta")}, buffer=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffer": 6}, "buffer must be between 1 and 5, got 6"),
        ({"buffer": 0}, "buffer must be between 1 and 5, got 0"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"recent": -1}, "recent must be at least 0, got -1"),
        ({"slope": None}, "either slope and offset or scores must be given, got offset"),
        (
            {"slope": None, "offset": None},
            "either slope and offset or scores must be given, got none",
        ),
        (
            {"fields": [torch.zeros(1, 2, 2, 5)]},
            "fields[0] must have shape [1, 2, 2, 6], got [1, 2, 2, 5]",
        ),
        ({"impl": "fast"}, "impl must be one of 'auto', 'triton', 'torch', got 'fast'"),
    ],
)
def test_wrong_option_is_named(changes: dict[str, object], message: str, device: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evict(**oracle.with_slots({**arguments(device, ""), "buffer": 2, **changes}))


def test_fields_of_another_device_or_layout_are_named(device: str) -> None:
    good = arguments(device, "")
    field = torch.zeros(1, 2, 2, 6, device=device)
    with pytest.raises(ValueError, match=r"^fields\[1\] must be on .*, got meta$"):
        evict(**oracle.with_slots({**good, "fields": [field, field.to("meta")]}), buffer=2)
    with pytest.raises(ValueError, match=r"^fields\[0\] must be contiguous, got strides"):
        evict(
            **oracle.with_slots({**good, "fields": [torch.zeros(1, 2, 2, 2, 6, device=device).mT]}),
            buffer=2,
        )
    with pytest.raises(ValueError, match=r"^fields\[0\] must have shape"):
        evict(**oracle.with_slots({**good, "fields": [torch.zeros(3, device=device)]}), buffer=2)
