"""Positions and ages beyond 2^24, where fp32 no longer tells neighbours apart.

A cache is saved, moved far on in time, and loaded: it must keep what a cache at the start keeps.
"""

from pathlib import Path

import pytest
import slots as small
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import trimkv_kernels as tk
from trimkv_kernels.policies.allocation import Allocation

FAR = 2**24 - 20


def moved(cache: tk.BoundedKVCache, fresh: tk.BoundedKVCache, path: Path, by: int) -> None:
    """Load into ``fresh`` what ``cache`` would hold if its tokens had come ``by`` tokens later."""
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name in ("t", "seen", "0.position", *(["0.cut"] if "0.cut" in tensors else [])):
        tensors[name] += by
    save_file(tensors, path, metadata=metadata)
    fresh.load(path)


@pytest.mark.parametrize("allocation", [None, tk.GlobalTopK()], ids=["dense", "pages"])
@pytest.mark.parametrize("policy", ["streaming_llm", "key_norm"])
def test_beyond_2_to_the_24(policy: str, allocation: Allocation | None, tmp_path: Path) -> None:
    """The window slides by one token at a time, across 2^24 and beyond it."""
    options = {"sinks": 0, "recent": 1, "allocation": allocation}
    near, far = (small.cache(policy, **options) for _ in range(2))
    small.feed(near, 13)
    small.feed(near, 1, 1)
    moved(near, far, tmp_path / "slots", FAR)
    for seed in range(2, 60):
        tokens = 3 if seed % 10 == 0 else 1
        for one, other in zip(*(small.feed(x, tokens, seed) for x in (near, far)), strict=True):
            # until it evicts, a loaded cache sums in another order
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0.0)
        expected = [[[[p + FAR for p in h] for h in r] for r in x] for x in small.kept(near)]
        assert small.kept(far) == expected
    assert int(far.t.min()) > 2**24


def test_an_age_beyond_2_to_the_24(tmp_path: Path) -> None:
    """A sink stays, and of two pairs 2^24 tokens old the newer one: fp32 ages are equal there."""
    cache, old = (small.cache("streaming_llm", sinks=2, recent=1) for _ in range(2))
    small.feed(cache, 7)
    cache.save(tmp_path / "slots")
    with safe_open(tmp_path / "slots", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name in ("t", "seen"):
        tensors[name] += 2**25
    save_file(tensors, tmp_path / "slots", metadata=metadata)
    old.load(tmp_path / "slots")
    for seed in range(5):
        small.feed(old, 1, seed)
    last = 2**25 + 7
    assert small.kept(old)[0][0][0] == [0, 1, 6, *range(last, last + 5)]
