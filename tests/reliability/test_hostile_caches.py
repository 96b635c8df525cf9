"""Saved caches that no cache wrote: each is refused in words, and the cache stays as it was."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import slots as small
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import trimkv_kernels as tk
from trimkv_kernels.policies.base import policy_name

STREAMING = {"budget": 8, "buffer": 4, "sinks": 1, "recent": 1}
Change = Callable[[dict[str, Tensor]], object]


def saved(cache: tk.BoundedKVCache, path: Path, change: Change | None = None, **said: str) -> Path:
    """Save a cache with changed tensors or metadata."""
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | said
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change is not None:
        change(tensors)
    save_file(tensors, path, metadata=metadata)
    return path


def full(policy: str = "key_norm", **options: object) -> tk.BoundedKVCache:
    cache = small.cache(policy, **options)
    for seed in range(3):
        small.feed(cache, 9, seed)
    for seed in range(3, 8):
        small.feed(cache, 1, seed)
    return cache


def put(name: str, number: float, *index: int) -> Change:
    return lambda tensors: tensors[name].__setitem__(index, number)


def scale(name: str, number: float) -> Change:
    return lambda tensors: tensors[name].mul_(number)


def twice(tensors: dict[str, Tensor]) -> None:
    tensors["0.position"][1, 0, 1, 0] = tensors["0.position"][1, 0, 1, 1]


def descend(tensors: dict[str, Tensor]) -> None:
    tensors["0.first_page"] = tensors["0.first_page"].flip(-1).contiguous()


def crowd(tensors: dict[str, Tensor]) -> None:
    """Let every head hold 14 pairs: its page has room for 16, its budget and buffer for 12."""
    own = tensors["t"] - tensors["0.cut"]
    tensors["0.kept"] = (14 - own)[..., None].expand_as(tensors["0.kept"]).contiguous()


NAN, INF = float("nan"), float("inf")
DENSE: dict[str, tuple[str, Change]] = {
    "num_valid beyond the slots": ("0.num_valid", put("0.num_valid", 13, ...)),
    "num_valid below 0": ("0.num_valid", put("0.num_valid", -1, ...)),
    "num_valid of one head": ("0.num_valid", put("0.num_valid", 3, 1, 1, 0)),
    "more pairs than tokens": ("0.num_valid", lambda x: x["t"].fill_(3)),
    "t below 0": ("t", put("t", -5, 0)),
    "t beyond seen": ("t", put("t", 2**31 - 1, 1)),
    "seen below 0": ("seen", put("seen", -(2**40))),
    "seen where the clock ends": ("seen", put("seen", 2**31 - 1)),
    "a position below 0": ("0.position", put("0.position", -1, 0, 0, 0, 0)),
    "a position beyond t": ("0.position", put("0.position", 1000, 0, 1, 1, 3)),
    "a position twice": ("0.position", twice),
    "a key that is NaN": ("0.key", put("0.key", NAN, 0, 0, 0, 0, 0)),
    "a key in an empty slot": ("0.key", put("0.key", NAN, 0, 0, 0, -1, 0)),
    "a value that is infinite": ("0.value", put("0.value", INF, 1, 1, 1, 1, 1)),
    "a flag that is no flag": ("0.nan_seen", put("0.nan_seen", 7, 0)),
}
AFFINE: dict[str, tuple[str, Change]] = {
    "a slope that is NaN": ("0.slope", put("0.slope", NAN, 0, 0, 0, 0)),
    "an offset that is NaN": ("0.offset", put("0.offset", NAN, 0, 0, 0, 0)),
}
PAGED: dict[str, tuple[str, Change]] = {
    "a page out of range": ("0.page", put("0.page", 1000, 0, 0, 0)),
    "a page below 0": ("0.page", put("0.page", -1, 0, 0, 0)),
    "a page twice": ("0.page", put("0.page", 0, 0, 0, ...)),
    "pages that begin out of range": ("0.first_page", put("0.first_page", 99, 0, 0, -1)),
    "pages that begin below 0": ("0.first_page", put("0.first_page", -1, 0, 1, 0)),
    "pages that descend": ("0.first_page", descend),
    "no page of its own": ("0.kept", put("0.first_page", 0, 0, 0, 1)),
    "more pairs than room": ("0.kept", put("0.kept", 30, 0, 0, 0)),
    "more pairs than the slots of all": ("0.kept", crowd),
    "fewer pairs than none": ("0.kept", put("0.kept", -1, 0, 0, 0)),
    "a cut in the future": ("0.cut", put("0.cut", 1000, 0, 0)),
    "a cut before all": ("0.cut", put("0.cut", -1, 0, 0)),
    "a position beyond t": ("0.position", scale("0.position", 1000)),
    "a position twice": ("0.position", put("0.position", 3, 0, 0, ...)),
    "a key that is NaN": ("0.key", put("0.key", NAN, 0, 0, 0, 0)),
}  # fmt: skip


def refused(cache: tk.BoundedKVCache, path: Path, name: str) -> None:
    """Loading raises, naming file and tensor, and changes nothing."""
    loaded = full_like(cache)
    small.feed(loaded, 5, seed=9)
    before, kept = copy.deepcopy(loaded), small.kept(loaded)
    with pytest.raises(ValueError, match=rf"{path.name}: {name} must be"):
        loaded.load(path)
    assert small.kept(loaded) == kept
    for one, other in zip(small.feed(loaded, 3), small.feed(before, 3), strict=True):
        assert torch.equal(one, other)


def full_like(cache: tk.BoundedKVCache) -> tk.BoundedKVCache:
    return small.cache(policy_name(cache.policy), allocation=cache.allocation)


@pytest.mark.parametrize("case", DENSE)
def test_dense(tmp_path: Path, case: str) -> None:
    name, change = DENSE[case]
    cache = full()
    refused(cache, saved(cache, tmp_path / "slots", change), name)


@pytest.mark.parametrize("case", AFFINE)
def test_affine(tmp_path: Path, case: str) -> None:
    name, change = AFFINE[case]
    cache = full("streaming_llm")
    refused(cache, saved(cache, tmp_path / "slots", change), name)


@pytest.mark.parametrize("allocation", [tk.GlobalTopK(), tk.AdaptiveHeads()], ids=str)
@pytest.mark.parametrize("case", PAGED)
def test_paged(tmp_path: Path, case: str, allocation: object) -> None:
    name, change = PAGED[case]
    cache = full("key_norm", allocation=allocation)
    refused(cache, saved(cache, tmp_path / "slots", change), name)


@pytest.mark.parametrize(
    ("slots", "heads"),
    [(-1, slice(0, 2)), (1000, slice(0, 2)), (2, slice(0, 2)), (2, slice(2, 4)), (4, 0)],
    ids=str,
)
def test_table_of_a_layer_preference(tmp_path: Path, slots: int, heads: int | slice) -> None:
    """With 2 slots or less a head could drop what sinks and recent protect."""
    cache = full("key_norm", allocation=tk.LayerPreference(window=2, min_per_head=3))
    path = saved(cache, tmp_path / "slots", put("0.table", slots, 0, 0, heads))
    refused(cache, path, "0.table")


@pytest.mark.parametrize(
    "allocation",
    [tk.LayerPreference(window=2, min_per_head=3), tk.HeadTable(((3, 13), (8, 8)))],
    ids=["preference", "table"],
)
def test_pins_beyond_the_slots_of_the_smallest_head(tmp_path: Path, allocation: object) -> None:
    """Three slots hold a sink, a recent pair and what is not protected; the budget is 8."""
    cache = full("key_norm", allocation=allocation)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["pins"] = torch.tensor([[[20, 21]]] * 2, dtype=torch.int32)

    path = saved(cache, tmp_path / "slots", change)
    with pytest.raises(ValueError, match="slots: budget must exceed the protected slots: budget=3"):
        full_like(cache).load(path)


@pytest.mark.parametrize(
    "spans",
    [[[-1, 3]], [[5, 2]], [[0, 2**31 - 1]], [[10, 19]], [[2, 6], [10, 14]]],
)
def test_pins(tmp_path: Path, spans: list[list[int]]) -> None:
    cache = full()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["pins"] = torch.tensor([spans, spans], dtype=torch.int32)

    path = saved(cache, tmp_path / "slots", change)
    with pytest.raises(ValueError, match=r"slots: (pins must be|budget must exceed)"):
        full_like(cache).load(path)


@pytest.mark.parametrize("shape", [(2, 1, 2, 1), (2, 2), (1, 1, 2), (2, 1, 3)])
def test_pins_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    cache = full()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["pins"] = torch.zeros(shape, dtype=torch.int32)

    path = saved(cache, tmp_path / "slots", change)
    with pytest.raises(ValueError, match=r"slots: pins must be torch\.int32 \[2, spans, 2\]"):
        full_like(cache).load(path)


@pytest.mark.parametrize(
    "policy", ["key_norm", "streaming_llm", "h2o", "snap_kv", "r_kv", "random"]
)
@pytest.mark.parametrize("tokens", [0, 5, 30])
def test_what_a_cache_wrote_is_taken(tmp_path: Path, policy: str, tokens: int) -> None:
    cache = small.cache(policy, protect=[(2, 3)])
    if tokens:
        small.feed(cache, tokens)
        small.feed(cache, 1, seed=1)
        cache.reset(rows=[0])
        small.feed(cache, 1, seed=2)
    cache.save(tmp_path / "slots")
    loaded = small.cache(policy, protect=[(2, 3)])
    loaded.load(tmp_path / "slots")
    assert small.kept(loaded) == small.kept(cache)
    for seed in range(3):
        for one, other in zip(*(small.feed(x, 4, seed) for x in (cache, loaded)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "allocation",
    [
        tk.GlobalTopK(),
        tk.AdaptiveHeads(),
        tk.Threshold(-1.5),
        tk.LayerPreference(2, min_per_head=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 40])
def test_what_a_paged_cache_wrote_is_taken(tmp_path: Path, allocation: object, steps: int) -> None:
    cache = small.cache(allocation=allocation)
    if steps:
        small.feed(cache, 21)
    for seed in range(steps):
        small.feed(cache, 1, seed)
    cache.save(tmp_path / "slots")
    loaded = small.cache(allocation=allocation)
    loaded.load(tmp_path / "slots")
    assert small.kept(loaded) == small.kept(cache)


class TestDeclaredRows:
    """A new cache takes its rows from the file, and memory only for rows that are there."""

    @pytest.mark.parametrize("rows", ["0", "1", "3", "1000000000", "9" * 5000, "-1", "٢", ""])
    def test_of_the_file(self, tmp_path: Path, rows: str) -> None:
        model = tiny.llama()
        with tk.patch(model, "streaming_llm", **STREAMING) as handle:
            cache = handle.new_cache()
            with torch.no_grad():
                model(tiny.ids(2, 20), past_key_values=cache)
            path = tmp_path / "slots"
            cache.save(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() | {"batch_size": rows}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            handle.new_cache().load(path)
            save_file(tensors, path, metadata=metadata)
            fresh = handle.new_cache()
            with pytest.raises(ValueError, match="slots"):
                fresh.load(path)
            assert fresh.slots is None

    def test_no_file(self, tmp_path: Path) -> None:
        with tk.patch(tiny.llama(), "streaming_llm", **STREAMING) as handle:
            for path in (tmp_path / "none", tmp_path):
                with pytest.raises(ValueError, match=r"must be a file written by save\(\)"):
                    handle.new_cache().load(path)
        with pytest.raises(ValueError, match=r"must be a file written by save\(\)"):
            small.cache().load(tmp_path)
