"""A good checkpoint or saved cache of every layout that is read, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import slots as small
import torch
from safetensors.torch import save_file

import trimkv_kernels as tk
from trimkv_kernels.files import to_json
from trimkv_kernels.gates import GateConfig, RetentionGates, load_gates, save_gates
from trimkv_kernels.gates.checkpoint import save_published
from trimkv_kernels.gates.static import StaticGates, load_static_gates, save_static_gates
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.fast_kvzip import FastKVzipConfig, FastKVzipGates
from trimkv_kernels.policies.kvzap import KVzapConfig, KVzapGates
from trimkv_kernels.policies.loc_ret import LocRetConfig, LocRetGates

SIZES = {"num_layers": 2, "num_kv_heads": 2}
RG = GateConfig("rg", 6, 4, **SIZES, budget=8, buffer=4, base_model="owner/base")
RG10 = GateConfig("rg10", 6, 4, **SIZES, tied=True)


@dataclass(frozen=True)
class Layout:
    """How a layout is written and read.

    Attributes:
        write: Writes a good one into a folder.
        load: Reads it; raises ``ValueError`` or returns something.
        weights: Name of the file with the tensors.
        config: Name of the file with the sizes, if there is one.
        sizes: Keys of that file that the weights contradict if they change.
    """

    write: Callable[[Path], object]
    load: Callable[[Path], Any]
    weights: str
    config: str | None = None
    sizes: tuple[str, ...] = ()


def write_published(folder: Path, *, images: bool) -> None:
    sizes = {"hidden_size": 6, "num_hidden_layers": 2, "num_key_value_heads": 2}
    base = {"model_type": "qwen3", **({"text_config": sizes} if images else sizes)}
    save_published(drawn(lambda: RetentionGates(RG)), folder, base_config=base)


def write_kvzap(folder: Path) -> None:
    gates = drawn(lambda: KVzapGates(KVzapConfig(**SIZES, input_size=6, intermediate_size=4)))
    save_file(
        {name: x.clone() for name, x in gates.state_dict().items()}, folder / "model.safetensors"
    )
    config = {
        "model_type": "kvzap",
        "n_modules": 2,
        "output_dim": 2,
        "input_dim": 6,
        "hidden_dim": 4,
    }
    (folder / "config.json").write_text(to_json(config))


def write_loc_ret(folder: Path) -> None:
    gates = drawn(lambda: LocRetGates(LocRetConfig(**SIZES, input_size=8, intermediate_size=4)))
    names = {
        f"model.{name.replace('.fc', '.self_attn.fc')}": x for name, x in gates.state_dict().items()
    }
    torch.save(names, folder / "heads.bin")


def write_fast_kvzip(folder: Path) -> None:
    gates = drawn(lambda: FastKVzipGates(FastKVzipConfig(**SIZES, input_size=6, head_dim=4)))
    torch.save({"module": [gate.state_dict() for gate in gates.layers]}, folder / "q1.pt")


def write_static(gates: Callable[[], StaticGates], folder: Path) -> None:
    save_static_gates(drawn(gates), folder)


def drawn(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


@cache
def _filled(policy: str, allocation: Allocation | None) -> tk.BoundedKVCache:
    cache = small.cache(policy, allocation=allocation)
    for seed in range(4):
        small.feed(cache, 9, seed)
        small.feed(cache, 1, seed + 4)
    return cache


def write_cache(policy: str, allocation: Allocation | None, folder: Path) -> None:
    _filled(policy, allocation).save(folder / "slots.safetensors")


def load_cache(policy: str, allocation: Allocation | None, folder: Path) -> tk.BoundedKVCache:
    """Load into a cache that holds something, which stays as it was if that fails."""
    cache = small.cache(policy, allocation=allocation)
    small.feed(cache, 5, seed=20)
    before = small.kept(cache), cache.t.tolist(), int(cache.seen), cache.keys(0).clone()
    try:
        cache.load(folder / "slots.safetensors")
    except BaseException:
        after = small.kept(cache), cache.t.tolist(), int(cache.seen)
        assert after == before[:3]
        assert torch.equal(cache.keys(0), before[3])
        raise
    return cache


def _own(config: GateConfig) -> Layout:
    def write(folder: Path) -> None:
        save_gates(drawn(lambda: RetentionGates(config)), folder)

    return Layout(write, load_gates, "trimkv_gates.safetensors", "trimkv_config.json", _SIZES)


def _published(*, images: bool) -> Layout:
    write, sizes = partial(write_published, images=images), () if images else _SIZES
    return Layout(write, load_gates, "trimkv_weights.pth", "config.json", sizes)


def _static(kind: type[StaticGates], config: Any) -> Layout:
    return Layout(
        partial(write_static, lambda: kind(config)),
        partial(load_static_gates, kind),
        f"{kind.kind}_gates.safetensors",
        f"{kind.kind}_config.json",
        ("num_layers", "num_kv_heads", "input_size"),
    )


def _published_static(kind: type[StaticGates], write: Any, *files: Any) -> Layout:
    return Layout(write, partial(load_static_gates, kind), *files)


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_key_value_heads",
    "retention_gate_intermediate_size",
)
_KVZAP_SIZES = ("n_modules", "output_dim", "input_dim", "hidden_dim")
GATES: dict[str, Layout] = {
    "rg": _own(RG),
    "rg10": _own(RG10),
    "published": _published(images=False),
    "published with images": _published(images=True),
    "kvzap": _static(KVzapGates, KVzapConfig(**SIZES, input_size=6)),
    "loc_ret": _static(LocRetGates, LocRetConfig(**SIZES, input_size=8, intermediate_size=4)),
    "fast_kvzip": _static(FastKVzipGates, FastKVzipConfig(**SIZES, input_size=6, head_dim=4)),
    "kvzap published": _published_static(
        KVzapGates, write_kvzap, "model.safetensors", "config.json", _KVZAP_SIZES
    ),
    "loc_ret published": _published_static(LocRetGates, write_loc_ret, "heads.bin"),
    "fast_kvzip published": _published_static(FastKVzipGates, write_fast_kvzip, "q1.pt"),
}
CACHES: dict[str, Layout] = {
    f"cache {policy} {allocation or ''}": Layout(
        partial(write_cache, policy, allocation),
        partial(load_cache, policy, allocation),
        "slots.safetensors",
    )
    for policy, allocation in (
        ("streaming_llm", None),
        ("h2o", None),
        ("snap_kv", None),
        ("key_norm", tk.GlobalTopK()),
        ("streaming_llm", tk.AdaptiveHeads()),
    )
}
