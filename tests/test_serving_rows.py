"""Rows in an engine's blocks, without the engine: a schedule of requests against each one alone.

The truth is `BoundedKVCache` with one row, whose prompt comes in chunks of its buffer and then
token by token.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimkv_kernels import BoundedKVCache, TrimKV
from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.integrations.vllm.grid import Grid
from trimkv_kernels.integrations.vllm.options import ServingOptions
from trimkv_kernels.integrations.vllm.rows import Blocks, BoundedRows, Step, check_servable
from trimkv_kernels.policies import available_policies, example_policy, make_policy
from trimkv_kernels.policies.base import ModelShape, RetentionPolicy
from trimkv_kernels.testing.tokens import Tokens, example_shape

GRID = Grid(budget=40, buffer=8)
SHAPE = example_shape()


def is_servable(name: str) -> bool:
    try:
        check_servable(example_policy(name, SHAPE))
    except ValueError:
        return False
    return True


SERVABLE = [name for name in available_policies() if is_servable(name)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 90))
def test_grid_is_that_of_a_row_that_decodes(factor: int, buffer: int, t: int) -> None:
    grid = Grid(factor * buffer, buffer)
    held = cuts = 0
    for seen in range(1, t + 1):
        held += 1
        is_cut = held == grid.budget + grid.buffer
        assert grid.is_cut(seen) == is_cut
        if is_cut:
            held, cuts = grid.budget, cuts + 1
    assert grid.held(t) == held
    assert grid.evicted(t) == cuts


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_any_chunks_have_the_same_cuts(factor: int, buffer: int, chunks: list[int]) -> None:
    grid = Grid(factor * buffer, buffer)
    ends, start = [], 0
    for chunk in chunks:
        pieces = grid.pieces(start, start + chunk)
        assert [begin for begin, _ in pieces] == [start, *(end for _, end in pieces[:-1])]
        ends += [end for _, end in pieces]
        for begin, end in pieces:
            assert grid.held(begin) + end - begin <= grid.capacity
        start += chunk
        assert ends[-1] == start
    cuts = [t for t in range(start + 1) if grid.is_cut(t)]
    assert [end for end in ends if grid.is_cut(end)] == cuts


def test_a_budget_off_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of buffer=16, got 40.*take 32 or 48"):
        Grid(40, 16)
    with pytest.raises(ValueError, match="take 16"):
        Grid(8, 16)
    with pytest.raises(ValueError, match="buffer must be an int of at least 1"):
        Grid(8, 0)


@dataclass(eq=False)
class Request:
    """A text of random tokens, of which the first ``prompt`` are there from the start."""

    tokens: Tokens
    prompt: int
    row: int = -1
    seen: int = 0
    read_until: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.tokens.real.shape[1]

    def inputs(self, layer: int, begin: int, end: int) -> dict[str, Tensor]:
        return {name: x[layer][..., begin:end, :] for name, x in self.tokens.inputs.items()}

    def take(self, begin: int, outputs: list[Tensor]) -> None:
        """Note ``[1, num_heads, new, head_dim]`` of every layer."""
        stacked = torch.stack(outputs)
        for index in range(stacked.shape[3]):
            self.outputs[begin + index] = stacked[:, 0, :, index]
        self.seen = begin + stacked.shape[3]


class Engine:
    """Hands out blocks as an engine does: what a request left in one, the next one finds."""

    def __init__(self, policy: RetentionPolicy, rows: int, grid: Grid, **options: str) -> None:
        self.rows = BoundedRows(policy, SHAPE, grid, **options)
        self.layers = [self._blocks(rows) for _ in range(SHAPE.num_layers)]
        self.free = list(range(rows))

    def _blocks(self, rows: int) -> Blocks:
        memory = torch.ones(rows, self.rows.nbytes + 48, dtype=torch.uint8)
        tensors, begin = [], 0
        for entry in self.rows.entries:
            flat = memory[:, begin : begin + entry.nbytes].view(entry.dtype)
            tensors.append(flat.view(rows, *entry.shape))
            begin += entry.nbytes
        return self.rows.blocks(tensors)

    def read(self, request: Request, count: int) -> None:
        begin, end = request.seen, request.seen + count
        outputs = [
            self.rows.read(
                layer, blocks, request.row, begin, request.inputs(layer, begin, end), None
            )
            for layer, blocks in enumerate(self.layers)
        ]
        request.take(begin, outputs)

    def step(self, requests: list[Request], due_known: bool = True) -> None:
        t = [request.seen + 1 for request in requests]
        due = [i for i, seen in enumerate(t) if self.rows.grid.is_cut(seen)]
        step = Step(
            torch.tensor([request.row for request in requests], dtype=torch.int32),
            torch.tensor(t, dtype=torch.int32),
            due if due_known or not self.rows.is_affine else None,
        )
        outputs = []
        for layer, blocks in enumerate(self.layers):
            parts = [r.inputs(layer, r.seen, r.seen + 1) for r in requests]
            inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            outputs.append(self.rows.step(layer, blocks, step, inputs, None))
        for index, request in enumerate(requests):
            request.take(request.seen, [x[index : index + 1] for x in outputs])

    def positions(self, request: Request) -> list[list[list[int]]]:
        """What each layer's heads hold, sorted."""
        found = []
        for blocks in self.layers:
            slots = blocks.slots.row(request.row)
            counts = slots.num_valid[0, 0].tolist()
            heads = zip(slots.position[0, 0].tolist(), counts, strict=True)
            found.append([sorted(head[:count]) for head, count in heads])
        return found


def alone(policy: RetentionPolicy, request: Request, grid: Grid, impl: str) -> Iterator[tuple]:
    """What a cache of the request's own gives: ``(seen, outputs, positions)`` after each call."""
    cache = BoundedKVCache(
        policy.bind(SHAPE), num_layers=SHAPE.num_layers, num_kv_heads=SHAPE.num_kv_heads,
        num_heads=SHAPE.num_heads, head_dim=SHAPE.head_dim, batch_size=1, budget=grid.budget,
        buffer=grid.buffer, dtype=SHAPE.dtype, device="cpu", impl=impl,
    )  # fmt: skip
    ends = [*range(grid.buffer, request.prompt, grid.buffer), request.prompt]
    begin = 0
    for end in [*ends, *range(request.prompt + 1, request.total + 1)]:
        outputs = request.tokens.feed(cache, begin, end)
        positions = [
            [sorted(p for p in head if p >= 0) for head in cache.positions(layer)[0].tolist()]
            for layer in range(SHAPE.num_layers)
        ]
        yield begin, end, outputs[:, 0], positions
        begin = end


def run_together(engine: Engine, requests: list[Request], rng: random.Random) -> dict:
    """All requests on few rows, in chunks of any size, some thrown out and read again.

    Returns:
        What each request held after each number of tokens, the latest time it was there.
    """
    held: dict[tuple[int, int], list] = {}
    waiting, running = list(requests), []
    restarts = 3
    while waiting or running:
        while waiting and engine.free and rng.random() < 0.7:
            request = waiting.pop(0)
            request.row = engine.free.pop(rng.randrange(len(engine.free)))
            request.seen, request.read_until = 0, max(request.prompt, request.seen)
            running.append(request)
        if restarts and running and rng.random() < 0.05:
            restarts -= 1
            request = running.pop(rng.randrange(len(running)))
            engine.free.append(request.row)
            waiting.append(request)
        rng.shuffle(running)
        decoding = [r for r in running if r.seen >= r.read_until]
        for request in [r for r in running if r.seen < r.read_until]:
            engine.read(request, rng.randint(1, request.read_until - request.seen))
        if decoding:
            engine.step(decoding, due_known=rng.random() < 0.5)
        for request in list(running):
            number = requests.index(request)
            held[number, request.seen] = engine.positions(request)
            if request.seen == request.total:
                running.remove(request)
                engine.free.append(request.row)
    return held


@pytest.mark.parametrize("name", SERVABLE)
def test_each_request_is_what_it_is_alone(name: str) -> None:
    policy = example_policy(name, SHAPE)
    lengths = [(3, 60), (70, 90), (56, 75), (48, 64), (17, 70)]
    requests = [
        Request(Tokens.random(SHAPE, total, (0,), seed=seed), prompt)
        for seed, (prompt, total) in enumerate(lengths)
    ]
    engine = Engine(policy, 3, GRID, impl="torch")
    held = run_together(engine, requests, random.Random(sum(map(ord, name))))
    for number, request in enumerate(requests):
        assert sorted(request.outputs) == list(range(request.total))
        compared = 0
        for begin, end, outputs, positions in alone(policy, request, GRID, "torch"):
            given = torch.stack([request.outputs[t] for t in range(begin, end)], dim=2)
            torch.testing.assert_close(given, outputs, rtol=1e-5, atol=1e-5)
            if (number, end) in held:
                compared += 1
                assert held[number, end] == positions, (number, end)
        assert compared >= request.total - request.prompt


def test_on_triton_too() -> None:
    pytest.importorskip("triton")
    grid = Grid(8, 4)
    policy = example_policy("trimkv", SHAPE)
    requests = [
        Request(Tokens.random(SHAPE, total, (0,), seed=total), prompt)
        for prompt, total in [(3, 14), (13, 17)]
    ]
    engine = Engine(policy, 2, grid, impl="triton")
    held = run_together(engine, requests, random.Random(0))
    for number, request in enumerate(requests):
        for begin, end, outputs, positions in alone(policy, request, grid, "torch"):
            given = torch.stack([request.outputs[t] for t in range(begin, end)], dim=2)
            torch.testing.assert_close(given, outputs, rtol=2e-5, atol=2e-5)
            if (number, end) in held:
                assert held[number, end] == positions


def test_a_row_has_the_same_bits_whatever_runs_beside_it() -> None:
    outputs = []
    for neighbours in (0, 1, 4):
        engine = Engine(make_policy("key_norm"), 6, GRID, impl="torch")
        requests = [
            Request(Tokens.random(SHAPE, 60, (0,), seed=seed), 40 + 3 * seed, row=5 - seed)
            for seed in range(1 + neighbours)
        ]
        for request in requests:
            engine.read(request, request.prompt)
        for _ in range(15):
            engine.step([r for r in requests if r.seen < r.total])
        outputs.append(torch.stack([requests[0].outputs[t] for t in range(55)]))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h2o", "needs the attention that each pair receives"),
        ("full", "never evicts"),
        ("pyramid_kv", "here every head has the same"),
    ],
)
def test_what_rows_cannot_give_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundedRows(make_policy(name), SHAPE, GRID)


def test_heads_of_one_process_are_enough_only_for_some_policies() -> None:
    half = {x: getattr(SHAPE, x) for x in ("num_layers", "head_dim", "dtype", "device")}
    shape = ModelShape(**half, num_kv_heads=1, num_heads=2, total_kv_heads=2, kv_head_offset=1)
    assert BoundedRows(make_policy("key_norm"), shape, GRID).nbytes < 2 * 48 * 16 * 4 * 1.2
    with pytest.raises(ValueError, match="needs all 2 KV heads"):
        BoundedRows(example_policy("fast_kvzip", SHAPE), shape, GRID)


def test_options_of_a_server() -> None:
    given = {"policy": "random", "options": {"seed": 3}, "budget": 48, "buffer": 16, "sinks": 2}
    options = ServingOptions.parse(given, "owner/model")
    assert options.policy == make_policy("random", seed=3)
    assert (options.grid, options.sinks, options.recent) == (Grid(48, 16), 2, None)
    assert str(options) == "policy random, budget 48, buffer 16"
    assert ServingOptions.parse(None, "owner/model").grid == Grid(512, 128)
    # gates: those that are given, else those that lie beside the model
    gates = str(EMBEDDED_MODEL / "retention_gates")
    for given, base in (
        ({"gates": gates, "options": {"age_offset": -1}}, "owner/model"),
        ({"policy": "trimkv"}, str(EMBEDDED_MODEL)),
        ({}, str(EMBEDDED_MODEL)),
    ):
        options = ServingOptions.parse({"budget": 48, "buffer": 16, **given}, base)
        assert isinstance(options.policy, TrimKV)
        assert options.policy.age_offset == given.get("options", {}).get("age_offset", 1)
    uniform = ServingOptions.parse({"policy": "pyramid_kv", "allocation": "uniform"}, "owner/model")
    assert BoundedRows(uniform.policy, SHAPE, uniform.grid, allocation=uniform.allocation).nbytes
    wrapped = ServingOptions.parse(
        {"policy": "critical_kv", "options": {"base": "key_norm"}}, "owner/model"
    )
    assert wrapped.policy.base == make_policy("key_norm")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "trimkv must be an object such as"),
        ({"bugdet": 1}, "got 'bugdet'. Did you mean 'budget'"),
        ({"policy": 3}, "policy must be a registered name, got 3"),
        ({"policy": "h3o"}, "unknown policy 'h3o'.*Did you mean 'h2o'"),
        ({"policy": "h2o"}, "needs the attention that each pair receives"),
        ({"policy": "key_norm", "options": 3}, "options must be an object"),
        ({"policy": "random", "options": {"sed": 1}}, "options of policy 'random' do not fit"),
        ({"policy": "key_norm", "gates": "folder"}, "policy 'key_norm' has no gates"),
        ({"budget": 40, "buffer": 16}, "take 32 or 48"),
        ({"budget": "48"}, "budget must be an int of at least 1, got '48'"),
        ({"policy": "pyramid_kv"}, 'say so with "allocation": "uniform"'),
        ({"allocation": "pyramid"}, "allocation must be 'uniform' or be left out, got 'pyramid'"),
    ],
)
def test_wrong_options_are_named(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions.parse(given, "owner/model")
