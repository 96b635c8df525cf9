"""Long runs: a million tokens through a small cache, under every affine policy and three others.

    make soak                                    # about an hour on one core
    python scripts/soak.py --tokens 100000       # shorter

Random tokens come in calls of 112 and in 16 single steps by turns. Sixteen times in a run the cache
is saved, and a new cache loads the file; both read the next 1024 tokens, and must give the same
bits and keep the same positions. Every output must be finite, and resident memory must not grow
from a quarter of the run on. Writes ``build/soak/soak.json`` and ``docs/images/soak.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trimkv_kernels as tk
from trimkv_kernels.policies.base import ModelShape
from trimkv_kernels.policies.registry import policy_class

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "soak.png"
AFFINE = ("trimkv", "streaming_llm", "random", "kvzap", "fast_kvzip", "loc_ret")
OTHERS = ("h2o", "snap_kv", "key_norm")
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 4, 2, 16, 32
BUDGET, BUFFER = 64, 32
CALL, STEPS = 112, 16
CYCLE = CALL + STEPS
POINTS, BESIDE = 16, 8  # checks in a run, and cycles that both caches read at each
ALLOWED = 4 << 20  # bytes: the allocator's own, far below what 1000 leaked steps would take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--policies", nargs="+", default=[*AFFINE, *OTHERS])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "soak")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [soak(policy, options.tokens) for policy in options.policies]
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "tokens": options.tokens, "runs": runs}
    (options.out / "soak.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draw(runs)


def soak(policy: str, tokens: int) -> dict[str, Any]:
    """One run. Raises ``SystemExit`` where a promise does not hold."""
    torch.manual_seed(0)
    cache, generator = make(policy), torch.Generator().manual_seed(1)
    cycles = max(tokens // CYCLE, POINTS)
    every, memory, start = cycles // POINTS, [], time.perf_counter()
    with torch.inference_mode():
        for cycle in range(cycles):
            if cycle and cycle % every == 0:
                compare(policy, cache, generator.get_state(), cycle * CYCLE)
                memory.append((int(cache.t[0]), resident()))
            read(cache, generator)
    kept = [sorted(p for p in head if p >= 0) for head in cache.positions(0)[0].tolist()]
    settled = memory[len(memory) // 4 :]
    growth = settled[-1][1] - settled[0][1]
    if growth > ALLOWED:
        raise SystemExit(f"{policy}: resident memory grew by {growth} bytes")
    if cache.stats().nan_layers or int(cache.t[0]) != cycles * CYCLE:
        raise SystemExit(f"{policy}: {cache.stats()}")
    run = {
        "policy": policy,
        "tokens": cycles * CYCLE,
        "restarts": len(memory),
        "seconds": round(time.perf_counter() - start, 1),
        "memory": memory,
        "growth": growth,
        "oldest": min(map(min, kept)),
    }
    print(json.dumps(run), flush=True)
    return run


def make(policy: str) -> tk.BoundedKVCache:
    shape = ModelShape(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.float32,
        device=torch.device("cpu"), layer_devices=(torch.device("cpu"),) * LAYERS,
        num_heads=HEADS, hidden_size=HIDDEN,
    )  # fmt: skip
    torch.manual_seed(0)
    return tk.BoundedKVCache(
        policy_class(policy).example(shape), num_layers=LAYERS, num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM, num_heads=HEADS, batch_size=1, budget=BUDGET, buffer=BUFFER,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip


def read(cache: tk.BoundedKVCache, generator: torch.Generator) -> list[Tensor]:
    """One cycle; raises if an output is not finite."""
    outputs = []
    for new in (CALL, *(1,) * STEPS):
        for layer in range(LAYERS):
            query, key, value, query_nope, key_nope = (
                torch.randn(1, heads, new, HEAD_DIM, generator=generator)
                for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS, KV_HEADS)
            )
            outputs.append(
                cache.attend(
                    layer,
                    query,
                    key,
                    value,
                    query_nope=query_nope,
                    key_nope=key_nope,
                    hidden_states=torch.randn(1, new, HIDDEN, generator=generator),
                )
            )
        cache.evict()
    if not all(bool(x.isfinite().all()) for x in outputs):
        raise SystemExit(f"{cache}: an output is not finite")
    return outputs


def compare(policy: str, cache: tk.BoundedKVCache, state: Tensor, tokens: int) -> None:
    """A cache restarted from the saved state must go on as a copy that was never saved."""
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder, "slots.safetensors"))
        restarted, twin = make(policy), cache.fork(1)
        restarted.load(Path(folder, "slots.safetensors"))
    draws = [torch.Generator(), torch.Generator()]
    for draw in draws:
        draw.set_state(state)
    for _ in range(BESIDE):
        pairs = zip(read(twin, draws[0]), read(restarted, draws[1]), strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            raise SystemExit(f"{policy}: a restarted cache drifts after {tokens} tokens")
    for layer in range(LAYERS):
        if not torch.equal(twin.positions(layer), restarted.positions(layer)):
            raise SystemExit(f"{policy}: a restarted cache keeps other positions")


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, str]:
    return {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trimkv_kernels": tk.__version__,
    }


def draw(runs: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for run in runs:
        start = run["memory"][0][1]
        axis.plot(
            [tokens / 1e6 for tokens, _ in run["memory"]],
            [(held - start) / 2**20 for _, held in run["memory"]],
            label=run["policy"],
        )
    axis.set(xlabel="million tokens", ylabel="resident memory, MiB above its first check")
    axis.set_ylim(-ALLOWED / 2**20, ALLOWED / 2**20)
    axis.legend(ncols=3, fontsize="small")
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()
