"""Any sequence of calls on a cache against the contract in plain Python, dense and in pages.

``make soak`` runs 10,000 sequences: the number is in ``TRIMKV_SEQUENCES``.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from model import Model

import trimkv_kernels as tk
from trimkv_kernels.policies import make_policy

SEQUENCES = int(os.environ.get("TRIMKV_SEQUENCES", "500"))
LAYERS, KV_HEADS, HEADS, HEAD_DIM = 2, 2, 4, 4
SIZES = {"budget": 5, "buffer": 3, "sinks": 1, "recent": 1}
# fp32 against fp64 over at most 40 keys of norm below 3: some hundred roundings of 6e-8
CLOSE = {"atol": 5e-5, "rtol": 0.0}

Step = tuple[Any, ...]
SMALL = st.integers(0, 9)
STEPS = st.one_of(
    st.tuples(st.just("call"), st.integers(1, 12), st.just(0)),
    st.tuples(st.just("call"), st.just(1), st.just(0)),
    st.tuples(st.just("padded"), st.integers(1, 6), st.integers(0, 10**4)),
    st.tuples(st.sampled_from(["hold", "release", "save", "reset"])),
    st.tuples(st.sampled_from(["settle", "one_by_one"]), st.integers(0, 4)),
    st.tuples(st.just("crop"), st.integers(0, 4)),
    st.tuples(st.sampled_from(["fork", "forked"]), st.integers(1, 2)),
    st.tuples(
        st.sampled_from(["reorder", "select", "rows"]), st.lists(SMALL, min_size=1, max_size=3)
    ),
)


class Pair:
    """A cache and its model, which take the same steps."""

    def __init__(self, policy: str, is_shared: bool, rows: int, seed: int) -> None:
        self.policy, self.is_shared, self.is_restarted = policy, is_shared, False
        self.cache = self.make(rows)
        self.model = Model(
            policy, is_shared=is_shared, rows=rows, layers=LAYERS, kv_heads=KV_HEADS, **SIZES
        )
        self.draw = torch.Generator().manual_seed(seed)
        self.norms, self.drawn = torch.randperm(8192, generator=self.draw), 0

    def make(self, rows: int) -> tk.BoundedKVCache:
        return tk.BoundedKVCache(
            make_policy(self.policy), num_layers=LAYERS, num_kv_heads=KV_HEADS, num_heads=HEADS,
            head_dim=HEAD_DIM, batch_size=rows, dtype=torch.float32, device="cpu",
            allocation=tk.GlobalTopK() if self.is_shared else None, **SIZES,
        )  # fmt: skip

    def states(self, new: int) -> list[torch.Tensor]:
        """Queries, keys and values; no two norms of keys are closer than fp32 can tell."""
        rows = self.cache.batch_size
        shape = (LAYERS, rows, KV_HEADS, new, HEAD_DIM)
        query = torch.randn(LAYERS, rows, HEADS, new, HEAD_DIM, generator=self.draw)
        key, value = (torch.randn(shape, generator=self.draw) for _ in range(2))
        count = key[..., 0].numel()
        norms = self.norms[self.drawn : self.drawn + count]  # never the same twice
        self.drawn += count
        key = (
            key
            / key.norm(dim=-1, keepdim=True)
            * (1 + norms.view(key.shape[:-1])[..., None] / 8192)
        )
        return [query, key, value]

    def call(self, new: int, valid: torch.Tensor | None) -> None:
        query, key, value = self.states(new)
        got = [self.cache.attend(x, query[x], key[x], value[x], valid=valid) for x in range(LAYERS)]
        self.cache.evict()
        real = torch.ones(self.cache.batch_size, new, dtype=torch.bool) if valid is None else valid
        self.model.is_masked |= valid is not None
        expected = self.model.call(*(x.double() for x in (query, key, value)), real.tolist())
        at = real[None, :, None, :, None]
        torch.testing.assert_close(torch.stack(got).double() * at, expected, **CLOSE)

    def both(self, act: Any, model: Any) -> None:
        """Both do it, or both refuse and stay as they were."""
        try:
            model()
        except ValueError:
            with pytest.raises(ValueError, match="got"):
                act()
        else:
            act()

    def step(self, step: Step) -> None:
        cache, model, rows = self.cache, self.model, self.cache.batch_size
        waits = bool(model.rows[0].waiting)
        match step:
            case ("call", new, _):
                self.call(new, None)
            case ("padded", new, bits):
                counts = [(bits // 7**b) % (new + 1) for b in range(rows)]
                column = torch.arange(new)
                self.call(new, column >= new - torch.tensor(counts)[:, None])
            case ("hold",):
                cache.hold()
                model.is_holding = True
            case ("release",):
                cache.release()
                model.settle(0)
                model.is_holding = False
            case ("settle" | "one_by_one" as how, drop):
                one_by_one = how == "one_by_one"
                self.both(
                    lambda: cache.settle(drop, one_by_one=one_by_one),
                    lambda: model.settle(drop, one_by_one=one_by_one),
                )
            case ("crop", count) if self.is_restarted and not model.is_holding:
                # a loaded cache may not know its counts yet, and then takes nothing back
                with contextlib.suppress(ValueError):
                    cache.crop(count)
                    model.crop(count)
            case ("crop", count):
                self.both(lambda: cache.crop(count), lambda: model.crop(count))
            case ("reset",):
                cache.reset()
                model.reset()
                self.is_restarted = False
            case ("rows", index):
                index = sorted({b % rows for b in index})
                cache.reset(rows=index)
                model.reset(index)
            case ("save",) if not waits:
                self.restart()
            case ("reorder", index) if not waits:
                index = [index[b % len(index)] % rows for b in range(rows)]
                cache.reorder(index)
                model.select(index)
            case ("select", index) if not waits:
                index = [b % rows for b in index]
                cache.select(index)
                model.select(index)
            case ("fork", copies) if not waits and rows * copies <= 4:
                self.cache = cache.fork(copies)
                model.select([b for b in range(rows) for _ in range(copies)])
            case ("forked", copies) if not waits:
                twin = cache.fork(copies)  # what it does must not reach this one
                state = torch.ones(rows * copies, HEADS, 9, HEAD_DIM)
                for layer in range(LAYERS):
                    twin.attend(layer, state, state[:, :KV_HEADS], state[:, :KV_HEADS])
                twin.evict()
            case _:
                name = "save" if step[0] == "save" else "fork"
                if waits:
                    with pytest.raises(ValueError, match="settle"):
                        cache.save("unused") if name == "save" else cache.fork(1)

    def restart(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "slots")
            self.cache.save(path)
            restarted = self.make(self.cache.batch_size)
            restarted.load(path)
        if self.model.is_holding:
            restarted.hold()
        self.cache, self.model.undoable = restarted, 0
        self.is_restarted = True

    def check(self) -> None:
        held = [
            [[sorted(p for p in head if p >= 0) for head in row] for row in x.tolist()]
            for x in map(self.cache.positions, range(LAYERS))
        ]
        assert held == self.model.positions()
        assert self.cache.t.tolist() == [row.t for row in self.model.rows]
        if not self.model.is_holding:
            self.check_crop()

    def check_crop(self) -> None:
        """A copy takes back as many tokens as the model allows, and not one more."""
        most, twin = self.model.undoable, self.cache.fork(1)
        with pytest.raises(ValueError, match="got"):
            twin.crop(most + 1)
        if most == 0 or self.is_restarted:  # then it may not know its counts
            return
        twin.crop(most)
        held = sorted(twin.positions(LAYERS - 1)[-1, -1].tolist())
        row = self.model.rows[-1]
        left = [p for p in row.heads[self.model.names[-1]] if p < row.t - most]
        assert [p for p in held if p >= 0] == sorted(left)


@pytest.mark.parametrize(("policy", "is_shared", "share"), [
    ("key_norm", False, 0.5), ("streaming_llm", False, 0.2), ("key_norm", True, 0.3)
])  # fmt: skip
def test_any_sequence(policy: str, is_shared: bool, share: float) -> None:
    @hypothesis.settings(
        max_examples=round(SEQUENCES * share), derandomize=True, deadline=None, database=None
    )
    @hypothesis.given(
        st.integers(1, 3), st.integers(0, 99), st.lists(STEPS, min_size=3, max_size=14)
    )
    def run(rows: int, seed: int, steps: list[Step]) -> None:
        pair = Pair(policy, is_shared, rows, seed)
        for step in steps:
            pair.step(step)
            pair.check()

    run()
