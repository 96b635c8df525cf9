"""Two gloo processes on the CPU: the same tokens and kept sets as one, and no further collective.

Run by torchrun this file is one of the processes: it writes what it saw.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3ForCausalLM

import trimkv_kernels as tk
from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.policies import ModelShape, example_policy, make_policy
from trimkv_kernels.policies.base import AttentionStat, Needs, RetentionPolicy
from trimkv_kernels.policies.gated import drawn
from trimkv_kernels.policies.trimkv import TrimKV
from trimkv_kernels.testing import example_shape

ROOT = Path(__file__).parents[1]
WORLD = 2
LAYERS, KV_HEADS = 3, 2
NEW = 20
OPTIONS = {"budget": 24, "buffer": 6, "sinks": 2, "recent": 4}
POLICIES = ("rg", "rg10", "random", "snap_kv", "h2o", "critical_kv")
REFUSED = ("tova", "kvzap", "vatp_of_tova", "all_heads")


class AllHeads(RetentionPolicy):
    """Reads what no process of several knows."""

    needs = Needs(attention=AttentionStat(group="all_heads"))


def gates(kind: str) -> RetentionGates:
    return drawn_gates(GateConfig(kind, 64, 8, LAYERS, KV_HEADS, tied=kind == "rg10"))


def drawn_gates(config: GateConfig) -> RetentionGates:
    made = drawn(lambda: RetentionGates(config))
    made.tie()
    return made


def policy_named(name: str) -> RetentionPolicy:
    return TrimKV(gates(name)) if name.startswith("rg") else make_policy(name)


def prompt() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(93, generator=generator)[:40] + 3 for _ in range(2)])


def generate(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Tokens, and the kept positions ``[layers, batch, heads of this process, slots]``."""
    with tk.patch(model, policy_named(name), **OPTIONS) as handle:
        cache = handle.new_cache()
        call = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        tokens = model.generate(prompt(), past_key_values=cache, **call)
        slots = {tuple(x.slots.key.shape) for x in cache.slots.storages}
        kept = torch.stack([cache.positions(i).sort(dim=-1).values for i in range(LAYERS)])
        assert cache.stats().evictions.min() > 0
    return {"tokens": tokens[:, 40:], "slots": slots, "kept": kept}


def count_collectives(model: PreTrainedModel, cache: object = None) -> dict[str, int]:
    """Of one decode step, by name."""
    from torch.distributed.tensor.debug import CommDebugMode

    with torch.no_grad():
        first = model(prompt(), past_key_values=cache, use_cache=True)
        with CommDebugMode() as counted:
            model(prompt()[:, :1], past_key_values=first.past_key_values, use_cache=True)
    return {str(name): count for name, count in counted.get_comm_counts().items() if count}


def refusal(model: PreTrainedModel, name: str) -> str:
    shape = ModelShape(LAYERS, KV_HEADS, 16, torch.float32, torch.device("cpu"), 4, 64)
    policies = {
        "tova": make_policy("tova"),
        "kvzap": example_policy("kvzap", shape),
        "vatp_of_tova": make_policy("vatp", base=make_policy("tova")),
        "all_heads": AllHeads(),
    }
    try:
        tk.patch(model, policies[name], **OPTIONS)
    except ValueError as error:
        return str(error)
    return ""


def main(page: Path, folder: Path) -> None:
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    seen: dict[str, Any] = {name: generate(model, name) for name in POLICIES}
    seen["stock"] = count_collectives(model)
    with tk.patch(model, "h2o", **OPTIONS) as handle:
        seen["patched"] = count_collectives(model, handle.new_cache())
    seen["refused"] = {name: refusal(model, name) for name in REFUSED}
    torch.save(seen, folder / f"{dist.get_rank()}.pt")
    sys.argv = ["page", str(EMBEDDED_MODEL)]
    exec(compile(page.read_text(), page, "exec"), {})
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # without Python's own exit, in which a thread of gloo sometimes aborts


def script(number: int, folder: Path) -> Path:
    """A Python block of docs/distributed.md, as the file that its command names."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    path = folder / re.findall(r"^    torchrun --nproc-per-node 2 (\S+)", text, re.M)[number]
    path.write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number])
    return path


def torchrun(*arguments: object) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *options, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_tensor_parallelism(qwen3: Qwen3ForCausalLM, tmp_path: Path) -> None:
    """One launch for all that concerns it: most of the time goes into starting processes."""
    qwen3.save_pretrained(tmp_path / "model")
    printed = torchrun(__file__, script(0, tmp_path), tmp_path).strip().splitlines()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for name in POLICIES:
        check_equal_to_one_process(generate(qwen3, name), [saw[name] for saw in ranks])
    for saw in ranks:
        assert saw["patched"] == saw["stock"]
        # attention and MLP of each layer, the embedding and the logits
        assert sum(saw["stock"].values()) == 2 * LAYERS + 2
        for message in saw["refused"].values():
            assert "needs all 2 KV heads of a layer, and this process has 1" in message
    answer, heads = printed[-2:]
    assert answer.split()
    assert heads == f"[1, {KV_HEADS // WORLD}, {64 + 128}] of {KV_HEADS} KV heads"


def check_equal_to_one_process(alone: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        assert torch.equal(shard["tokens"], alone["tokens"])
        assert shard["slots"] == {(LAYERS, 2, KV_HEADS // WORLD, 30, 16)}
    assert torch.equal(torch.cat([shard["kept"] for shard in shards], dim=2), alone["kept"])
    assert not torch.equal(alone["kept"][:, :, 0], alone["kept"][:, :, 1])


@pytest.mark.slow
def test_the_data_parallel_script_of_the_page(tmp_path: Path) -> None:
    path = script(1, tmp_path)
    alone = subprocess.run(
        [sys.executable, path, EMBEDDED_MODEL],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    answers = alone.stdout.strip().splitlines()[-5:]
    assert len({*answers}) > 1
    assert torchrun(path, EMBEDDED_MODEL).strip().splitlines()[-5:] == answers


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_gates_of_some_heads_are_those_heads_of_all(kind: str) -> None:
    whole = drawn_gates(GateConfig(kind, 12, 8, 3, 6, tied=kind == "rg10"))
    part = whole.for_heads(2, 5)
    assert part.config.num_kv_heads == 3
    hidden = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        assert torch.equal(part(layer, hidden), whole(layer, hidden)[:, 2:5])
    if kind == "rg10":
        assert part.layers[1].linear3.weight is part.layers[0].linear3.weight
    for start, stop in ((-1, 2), (2, 2), (4, 7)):
        with pytest.raises(ValueError, match="must name some of 6 KV heads"):
            whole.for_heads(start, stop)


def test_a_policy_is_bound_to_its_heads_once() -> None:
    whole = example_shape()
    sizes = {**vars(whole), "total_kv_heads": whole.num_kv_heads, "num_kv_heads": 1}
    shard = ModelShape(**{**sizes, "kv_head_offset": 1})
    unaware = ModelShape(**{**sizes, "total_kv_heads": None})  # as a cache binds it again
    policy = TrimKV.example(whole)
    bound = policy.bind(shard)
    assert bound.bind(unaware) is bound
    last = policy.gates.layers[0].linear2.weight[1:2]
    assert torch.equal(bound.gates.layers[0].linear2.weight, last)
    drawing = make_policy("random").bind(shard)
    assert drawing.bind(unaware) is drawing


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
