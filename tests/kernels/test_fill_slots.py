"""`fill_slots`, both implementations, against Python's sort."""

import importlib
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from torch import Tensor

from trimkv_kernels.kernels import fill_slots

pytestmark = pytest.mark.numeric

MODULE = importlib.import_module("trimkv_kernels.kernels.ops.fill_slots")

INF, NAN = float("inf"), float("nan")
# Few values, so that ties are the rule.
SCORES = [-INF, -2.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3.0e38, INF, NAN]
LAYERS, LAYER, DIM = 2, 1, 3
SLOT_NUMBERS = ("key", "value", "position", "slope", "offset")
FIELDS = ("field", "wide_field", "bool_field")

SETTINGS = hypothesis.settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def numbers_of(position: Tensor) -> dict[str, Tensor]:
    """What a slot holds, told by its token: as many dimensions as ``position``, and inner ones."""
    token = position.to(torch.float32)
    key = (token[..., None] + torch.arange(DIM, device=position.device) / 4).half()
    return {
        "position": position,
        "key": key,
        "value": -key,
        "field": token * 3,
        "wide_field": torch.stack((token, -token), -1).double().unsqueeze(-2),
        "bool_field": position % 4 > 1,
    }


def make_case(
    num_valid: Tensor, num_slots: int, new: int, device: str, *, fields: bool = True, seed: int = 0
) -> oracle.State:
    """Slots at even positions, new tokens at odd ones, sliced out of larger tensors."""
    batch, heads = num_valid.shape
    rng = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(LAYERS, batch, heads, num_slots, generator=rng).argsort(dim=-1)
    state = numbers_of((2 * shuffled).int().to(device))
    new_position = (2 * torch.rand(batch, new, generator=rng).argsort(dim=-1) + 1).int().to(device)
    tokens = numbers_of(new_position[:, None].expand(batch, heads, new))
    fused = torch.zeros(batch, new, 2, heads, DIM + 2, dtype=torch.half, device=device)
    for index, name in enumerate(("key", "value")):
        state[f"new_{name}"] = fused[:, :, index, :, 2:].transpose(1, 2)
        state[f"new_{name}"].copy_(tokens[name])
    state["new_position"] = new_position
    state["num_valid"] = num_valid.int().to(device).repeat(LAYERS, 1, 1)
    for name in FIELDS:
        if fields:
            state[f"new_{name}"] = tokens[name]
        else:
            del state[name]
    return state


def run(state: oracle.State, **options: object) -> None:
    """Call `fill_slots` on a state whose extra fields have names."""
    fields = [name for name in FIELDS if name in state]
    named = {x: y for x, y in state.items() if x.removeprefix("new_") not in FIELDS}
    named["fields"] = tuple(state[name] for name in fields)
    named["new_fields"] = [state[f"new_{name}"] for name in fields]
    fill_slots(**oracle.with_slots({**named, "layer": LAYER, **options}))


def kept_by_rule(
    state: oracle.State,
    scores: Tensor,
    valid: Tensor | None,
    t: Tensor,
    buffer: int,
    sinks: int = 0,
    recent: int = 0,
) -> dict[tuple[int, int], list[int]]:
    """Positions that each (row, head) keeps; in the order of the slots where none is dropped."""
    num_slots, held_slots = (
        state["position"].shape[-1],
        scores.shape[-1] - state["new_key"].shape[2],
    )
    capacities = state.get("capacity", torch.full_like(state["num_valid"], num_slots))
    kept = {}
    for row, head in itertools.product(*map(range, scores.shape[:2])):
        count = int(state["num_valid"][LAYER, row, head])
        capacity = int(capacities[LAYER, row, head])
        held = state["position"][LAYER, row, head, :count].tolist()
        real = torch.ones_like(state["new_position"][row]).bool() if valid is None else valid[row]
        positions = held + state["new_position"][row][real].tolist()
        if len(positions) >= capacity:
            own = scores[row, head]
            positions = sorted(
                oracle.kept_positions(
                    own[:count].tolist() + own[held_slots:][real].tolist(),
                    positions, max(capacity - buffer, 0), int(t[row]), sinks, recent,
                )
            )  # fmt: skip
        kept[row, head] = positions
    return kept


def check(
    before: oracle.State, after: oracle.State, kept: dict[tuple[int, int], list[int]], impl: str
) -> None:
    """Each head of the layer holds those tokens, whole; the other layer is as it was."""
    before, after = ({name: x.cpu() for name, x in state.items()} for state in (before, after))
    names = [name for name in before if name in (*SLOT_NUMBERS, *FIELDS)]
    for name in (*names, "num_valid"):
        assert torch.equal(after[name][1 - LAYER], before[name][1 - LAYER]), name
    for name in before:
        if name.startswith("new_"):
            assert torch.equal(after[name], before[name]), name
    for (row, head), positions in kept.items():
        where = (LAYER, row, head)
        count = len(positions)
        assert after["num_valid"][where] == count
        held = before["position"][where][: int(before["num_valid"][where])].tolist()
        got = after["position"][where][:count].tolist()
        if set(held) <= set(positions):  # no slot was freed
            stayed = len(held)
            assert got[:stayed] == held
        assert sorted(got) == sorted(positions)
        if impl == "triton":  # what stays in the front has not moved
            for slot, position in enumerate(held[:count]):
                assert position not in got or got[slot] == position
        for name in names:
            own, new = before[name][where], before.get(f"new_{name}")
            for slot, position in enumerate(got):
                if position in held:
                    expected = own[held.index(position)]
                else:
                    token = before["new_position"][row].tolist().index(position)
                    expected = new[row, token] if name == "position" else new[row, head, token]
                assert torch.equal(after[name][where][slot], expected), name


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    batch, heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    num_slots, new = draw(st.integers(2, 12)), draw(st.integers(0, 20))
    most = [num_slots] * (batch * heads)
    if draw(st.booleans()):  # a head may have less than it has slots, even less than goes
        most = [draw(st.integers(1, num_slots)) for _ in most]
    size = batch * heads * (num_slots + new)
    return {
        "scores": draw(st.lists(st.sampled_from(SCORES), min_size=size, max_size=size)),
        "capacity": torch.tensor(most).view(batch, heads),
        "num_valid": torch.tensor(
            [draw(st.integers(0, size) | st.sampled_from([0, size])) for size in most]
        ).view(batch, heads),
        "valid": draw(
            st.none()
            | st.lists(st.booleans(), min_size=batch * new, max_size=batch * new).map(torch.tensor)
        ),
        "num_slots": num_slots,
        "new": new,
        "buffer": draw(st.integers(1, num_slots - 1) | st.just(1)),
        "sinks": draw(st.sampled_from([0, 0, 4])),
        "recent": draw(st.sampled_from([0, 0, 5])),
        "seed": draw(st.integers(0, 99)),
    }


def check_case(impl: str, device: str, case: dict[str, object]) -> None:
    num_valid, num_slots, new = case["num_valid"], case["num_slots"], case["new"]
    state = make_case(num_valid, num_slots, new, device, seed=case["seed"])
    state["capacity"] = case["capacity"].int().to(device).repeat(LAYERS, 1, 1)
    scores = torch.tensor(case["scores"]).view(*num_valid.shape, num_slots + new).to(device)
    valid = case["valid"]
    if valid is not None:
        valid = valid.bool().view(len(num_valid), new).to(device)
    t = torch.arange(len(num_valid), dtype=torch.int32, device=device) + num_slots + new
    limits = {name: case[name] for name in ("buffer", "sinks", "recent")}
    kept = kept_by_rule(state, scores, valid, t, **limits)
    nan_seen = torch.zeros(LAYERS, dtype=torch.int32, device=device)
    after = oracle.clone(state)
    run(after, t=t, scores=scores, valid=valid, nan_seen=nan_seen, impl=impl, **limits)
    check(state, after, kept, impl)
    real = torch.ones(scores.shape, dtype=torch.bool, device=device)
    real[..., :num_slots] = torch.arange(num_slots, device=device) < num_valid[..., None].to(device)
    if valid is not None:
        real[..., num_slots:] = valid[:, None]
    seen = (scores.isnan() & real).any()
    assert nan_seen.tolist() == [0, int(seen)]


@hypothesis.given(case=cases())
@hypothesis.settings(SETTINGS, max_examples=150)
def test_torch_keeps_what_a_sort_keeps(device: str, case: dict[str, object]) -> None:
    check_case("torch", device, case)


# The interpreter takes its time: few examples, and a failing one is not made smaller.
@hypothesis.given(case=cases())
@hypothesis.settings(SETTINGS, max_examples=40, phases=[hypothesis.Phase.generate])
def test_triton_keeps_what_a_sort_keeps(device: str, case: dict[str, object]) -> None:
    check_case("triton", device, case)


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize(
    ("num_slots", "buffer", "new"), [(2, 1, 1), (40, 1, 100), (60, 37, 23), (100, 64, 300)]
)
def test_affine_scores_over_many_blocks(
    impl: str, num_slots: int, buffer: int, new: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(MODULE, "fill_config", lambda _: MODULE.FillConfig(32, 8, num_warps=1))
    num_valid = torch.tensor([[num_slots, num_slots // 2], [0, num_slots - 1]])
    state = make_case(num_valid, num_slots, new, device, fields=False)
    rng = torch.Generator().manual_seed(7)
    for name, shape in (("", state["position"].shape), ("new_", (2, 2, new))):
        state[f"{name}slope"] = -torch.rand(shape, generator=rng).to(device)
        # sliced out of one tensor, as a gate gives them
        state[f"{name}offset"] = torch.randn(*shape, generator=rng).round().to(device)
    state["new_offset"] = state["new_offset"].mT.contiguous().mT
    valid = torch.arange(new, device=device) >= torch.tensor([[0], [new // 3]], device=device)
    t = torch.tensor([2 * num_slots + new, 5 * num_slots], dtype=torch.int32, device=device)
    pool = {
        name: torch.cat((state[name][LAYER], state[f"new_{name}"]), dim=-1)
        for name in ("slope", "offset")
    }
    positions = state["new_position"][:, None].expand(2, 2, new)
    pool["position"] = torch.cat((state["position"][LAYER], positions), dim=-1)
    scores = oracle.affine_scores(**pool, t=t).to(device)
    limits = {"buffer": buffer, "sinks": 1, "recent": 2}
    kept = kept_by_rule(state, scores, valid, t, **limits)
    after = oracle.clone(state)
    run(after, t=t, valid=valid, impl=impl, **limits)
    check(state, after, kept, impl)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_score_is_rounded_after_the_product(impl: str, device: str) -> None:
    """Two tokens that tie only if the product is rounded first; then the older one goes."""
    rng = torch.Generator().manual_seed(0)
    slope, offset = -torch.rand(4000, generator=rng), torch.rand(4000, generator=rng) * 600
    age = torch.randint(3, 999, (4000,), generator=rng)
    fused = (slope.double() * age + offset.double()).float()
    heads = 12
    higher = (fused > slope * age + offset).nonzero()[:heads, 0]  # fused, they would stay
    slope, offset, age = slope[higher], offset[higher], age[higher]
    slots = (1, heads, 1, 2)
    state = {
        "key": torch.zeros(*slots, 1),
        "value": torch.zeros(*slots, 1),
        "position": torch.zeros(slots, dtype=torch.int32),
        "num_valid": torch.zeros(slots[:3], dtype=torch.int32),
        "slope": torch.zeros(slots),
        "offset": torch.zeros(slots),
        "new_key": torch.zeros(*slots[1:], 1),
        "new_value": torch.zeros(*slots[1:], 1),
        "new_position": torch.stack((1000 - age, torch.full_like(age, 999)), dim=-1).int(),
        "new_slope": torch.stack((slope, torch.zeros(heads)), dim=-1)[:, None],
        "new_offset": torch.stack((offset, slope * age + offset), dim=-1)[:, None],
        "t": torch.full((heads,), 1000, dtype=torch.int32),
    }
    state = {name: tensor.to(device) for name, tensor in state.items()}
    fill_slots(**oracle.with_slots(state), layer=0, buffer=1, impl=impl)
    assert (state["position"][..., 0] == 999).all()


@pytest.mark.parametrize("impl", oracle.IMPLS)
@pytest.mark.parametrize("max_valid", [None, 3, 4])
def test_what_fits_is_appended_in_order(impl: str, max_valid: int | None, device: str) -> None:
    num_valid = torch.tensor([[3, 0], [1, 2]])
    state = make_case(num_valid, 10, 6, device)
    valid = torch.arange(6, device=device) >= torch.tensor([[0], [4]], device=device)
    t = torch.tensor([30, 30], dtype=torch.int32, device=device)
    scores = torch.zeros(2, 2, (10 if max_valid is None else max_valid) + 6, device=device)
    after = oracle.clone(state)
    run(after, t=t, buffer=1, scores=scores, valid=valid, max_valid=max_valid, impl=impl)
    for row, head in itertools.product(range(2), range(2)):
        where, count = (LAYER, row, head), int(num_valid[row, head])
        expected = state["position"][where][:count].tolist()
        expected += state["new_position"][row][valid[row]].tolist()
        assert after["num_valid"][where] == len(expected)
        assert after["position"][where][: len(expected)].tolist() == expected
    check(state, after, kept_by_rule(state, scores, valid, t, 1), impl)


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_nothing_held_and_nothing_read(impl: str, device: str) -> None:
    """With ``max_valid=0`` a prompt is chosen whatever lies in the slots."""
    state = make_case(torch.zeros(1, 2), 8, 40, device, fields=False)
    scores = torch.randn(1, 2, 40, generator=torch.Generator().manual_seed(1)).to(device)
    t = torch.tensor([80], dtype=torch.int32, device=device)
    kept = kept_by_rule(state, scores, None, t, 3)
    for name in ("key", "value"):
        state[name][LAYER] = NAN
    after = oracle.clone(state)
    run(after, t=t, buffer=3, scores=scores, max_valid=0, impl=impl)
    assert all(len(positions) == 5 for positions in kept.values())
    for name in ("key", "value"):
        assert after[name][LAYER][:, :, :5].isfinite().all()
        state[name][1 - LAYER] = after[name][1 - LAYER]
    check(state, after, kept, impl)


def test_two_blocks_of_the_real_size(device: str) -> None:
    """A prompt longer than one block, in which everything ties but for a few."""
    new, num_slots = 2100, 24
    state = make_case(torch.tensor([[20]]), num_slots, new, device, fields=False)
    scores = torch.zeros(1, 1, num_slots + new, device=device)
    scores[..., 100:105] = 1.0
    scores[..., 7] = 2.0
    t = torch.tensor([2 * new], dtype=torch.int32, device=device)
    kept = kept_by_rule(state, scores, None, t, 8)
    after = oracle.clone(state)
    run(after, t=t, buffer=8, scores=scores, impl="triton")
    check(state, after, kept, "triton")


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_compiles_without_a_break(impl: str, device: str) -> None:
    state = make_case(torch.tensor([[5, 2]]), 6, 7, device)
    scores = torch.rand(1, 2, 13, generator=torch.Generator().manual_seed(5)).to(device)
    expected = oracle.clone(state)
    t = torch.tensor([30], dtype=torch.int32, device=device)
    run(expected, t=t, buffer=2, scores=scores, impl=impl)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    compiled(state, t=t, buffer=2, scores=scores, impl=impl)
    oracle.assert_same(state, expected)


def test_triton_op_is_registered_exactly(device: str) -> None:
    state = make_case(torch.tensor([[5, 2]]), 6, 7, device)
    names = ("new_key", "new_value", "new_position", "key", "value", "position", "num_valid")
    shared = {name: state[name] for name in names} | {"layer": LAYER, "buffer": 2}
    shared["t"] = torch.tensor([30], dtype=torch.int32, device=device)
    slope, offset = torch.rand(2, *state["position"].shape, device=device)
    new_slope, new_offset = torch.rand(2, 1, 2, 7, device=device)
    affine = {
        **{"slope": slope, "offset": offset, "new_slope": new_slope, "new_offset": new_offset},
        "nan_seen": torch.zeros(LAYERS, dtype=torch.int32, device=device),
        "valid": torch.ones(1, 7, dtype=torch.bool, device=device),
        **{"sinks": 1, "recent": 2, "max_valid": 6},
    }
    scored = {
        "scores": torch.rand(1, 2, 13, device=device),
        "fields": (state["field"],),
        "new_fields": [state["new_field"]],
    }
    for options in (affine, scored):
        call = fill_slots.flat(**oracle.with_slots(shared | options))
        torch.library.opcheck(fill_slots.registered["triton"], call)


@pytest.mark.parametrize(
    ("candidates", "block_c", "num_warps"), [(0, 1024, 4), (1024, 1024, 4), (131072, 2048, 8)]
)
def test_launch_comes_from_shapes(candidates: int, block_c: int, num_warps: int) -> None:
    assert MODULE.fill_config(candidates) == MODULE.FillConfig(block_c, 16, num_warps)


SHAPES = {
    "key": "[layers, batch, num_kv_heads, num_slots, head_dim]",
    "value": "[1, 2, 2, 6, 16]",
    "position": "[1, 2, 2, 6]",
    "num_valid": "[1, 2, 2]",
    "capacity": "[1, 2, 2]",
    "t": "[2]",
    "new_key": "[batch, num_kv_heads, new, head_dim]",
    "new_value": "[2, 2, 4, 16]",
    "new_position": "[2, 4]",
    "valid": "[2, 4]",
    "slope": "[1, 2, 2, 6]",
    "offset": "[1, 2, 2, 6]",
    "new_slope": "[2, 2, 4]",
    "new_offset": "[2, 2, 4]",
    "scores": "[2, 2, 10]",
    "nan_seen": "[1]",
}
AFFINE = ("slope", "offset", "new_slope", "new_offset")


def arguments(device: str, name: str) -> dict[str, Tensor]:
    """Valid arguments; with ``scores`` instead of the affine terms when that is ``name``."""
    state = oracle.make_state(1, 2, 2, 6, 16, torch.float32, device)
    new = {
        "new_key": torch.zeros(2, 2, 4, 16),
        "new_value": torch.zeros(2, 2, 4, 16),
        "new_position": torch.zeros(2, 4, dtype=torch.int32),
        "new_slope": torch.zeros(2, 2, 4),
        "new_offset": torch.zeros(2, 2, 4),
        "t": torch.zeros(2, dtype=torch.int32),
        "capacity": torch.full((1, 2, 2), 6, dtype=torch.int32),
        "valid": torch.ones(2, 4, dtype=torch.bool),
        "nan_seen": torch.zeros(1, dtype=torch.int32),
    }
    state |= {name: tensor.to(device) for name, tensor in new.items()}
    if name == "scores":
        state = {x: y for x, y in state.items() if x not in AFFINE}
        state["scores"] = torch.zeros(2, 2, 10, device=device)
    return state


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_tensor_is_named(name: str, device: str) -> None:
    good = arguments(device, name)
    longer = good[name][..., None]
    message = f"{name} must have shape {SHAPES[name]}, got {list(longer.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill_slots(**oracle.with_slots({**good, name: longer}), layer=0, buffer=2)
    # The key decides dtype and device, so the next argument is the one to disagree with it.
    named = "new_key" if name == "key" else name
    wrong = good[name].double() if good[name].is_floating_point() else good[name].long()
    with pytest.raises(ValueError, match=rf"^{named} must have dtype \w+, got \w+$"):
        fill_slots(**oracle.with_slots({**good, name: wrong}), layer=0, buffer=2)
    with pytest.raises(ValueError, match=rf"^{named} must be on (meta|{device}.*), got "):
        fill_slots(**oracle.with_slots({**good, name: good[name].to("meta")}), layer=0, buffer=2)


ONE_OF_TWO = "either slope, offset, new_slope and new_offset or scores must be given, got "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 1}, "layer must be between 0 and 0, got 1"),
        ({"buffer": 6}, "buffer must be between 1 and 5, got 6"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"recent": -1}, "recent must be at least 0, got -1"),
        ({"max_valid": 7}, "max_valid must be between 0 and 6, got 7"),
        ({"new_slope": None}, f"{ONE_OF_TWO}slope and offset and new_offset"),
        (dict.fromkeys(AFFINE), f"{ONE_OF_TWO}none"),
        (
            {"fields": [torch.zeros(1, 2, 2, 6)]},
            "new_fields must have 1 tensors, one per field, got 0",
        ),
        (
            {"fields": [torch.zeros(1, 2, 2, 5)], "new_fields": [torch.zeros(2, 2, 4)]},
            "fields[0] must have shape [1, 2, 2, 6], got [1, 2, 2, 5]",
        ),
        (
            {"fields": [torch.zeros(1, 2, 2, 6, 3)], "new_fields": [torch.zeros(2, 2, 4)]},
            "new_fields[0] must have shape [2, 2, 4, 3], got [2, 2, 4]",
        ),
        (
            {"fields": [torch.zeros(1, 2, 2, 6)], "new_fields": [torch.zeros(2, 2, 4).half()]},
            "new_fields[0] must have dtype float32, got float16",
        ),
        (
            {"new_key": torch.zeros(2, 2, 4, 32)[..., ::2]},
            "new_key must have stride 1 in its last dimension, got 2",
        ),
        ({"impl": "fast"}, "impl must be one of 'auto', 'triton', 'torch', got 'fast'"),
    ],
)
def test_wrong_option_is_named(changes: dict[str, object], message: str, device: str) -> None:
    for name, given in changes.items():
        if isinstance(given, Tensor):
            changes = {**changes, name: given.to(device)}
        elif isinstance(given, list):
            changes = {**changes, name: [x.to(device) for x in given]}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill_slots(
            **oracle.with_slots({**arguments(device, ""), "layer": 0, "buffer": 2, **changes})
        )


def test_views_are_refused(device: str) -> None:
    good = arguments(device, "")
    for name in ("key", "slope"):
        view = good[name].mT.contiguous().mT
        with pytest.raises(ValueError, match=rf"^{name} must be contiguous, got strides"):
            fill_slots(**oracle.with_slots({**good, name: view}), layer=0, buffer=2)
