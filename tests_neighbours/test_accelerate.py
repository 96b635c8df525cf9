"""accelerate: weights that are elsewhere until a layer runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
from accelerate.hooks import remove_hook_from_submodules

import agreement
import trimkv_kernels as tk

CPU = torch.device("cpu")
TEXT = agreement.distinct()


def on_cpu(model: Any, folder: Path) -> None:
    accelerate.cpu_offload(model, CPU)


def on_disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), CPU)


def dispatched(model: Any, folder: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"lm_head": "disk"}
    accelerate.dispatch_model(
        model, places, main_device=CPU, offload_dir=str(folder), force_hooks=True
    )


WAYS = [on_cpu, on_disk, dispatched]


def moved(way: Callable[[Any, Path], None], folder: Path) -> Any:
    model = tiny.llama()
    way(model, folder)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_before_the_patch(way: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model = moved(way, tmp_path)
    agreement.check_evicting(model, tiny.llama())
    agreement.check_whole(model, moved(way, tmp_path / "stock"))


@pytest.mark.parametrize("way", WAYS)
def test_after_the_patch(way: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model = tiny.llama()
    handle = tk.patch(model, "key_norm", **agreement.OPTIONS)
    way(model, tmp_path)
    agreement.check_patched(handle, model, tiny.llama())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["patch", "move"])
@pytest.mark.parametrize("undone", ["patch", "move"])
def test_undone_in_any_order(
    way: Callable[[Any, Path], None], first: str, undone: str, tmp_path: Path
) -> None:
    """The stock model comes back, whichever was first to come and first to go."""
    model = tiny.llama()
    if first == "move":
        way(model, tmp_path)
    handle = tk.patch(model, "key_norm", **agreement.OPTIONS)
    if first == "patch":
        way(model, tmp_path)
    undo = [handle.unpatch, lambda: remove_hook_from_submodules(model)]
    for step in undo if undone == "patch" else reversed(undo):
        step()
    model.load_state_dict(tiny.llama().state_dict(), assign=True)  # the weights that were moved
    with torch.no_grad():
        got = model(TEXT, use_cache=True)
        want = tiny.llama()(TEXT, use_cache=True)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.past_key_values.layers[1].keys, want.past_key_values.layers[1].keys)
    agreement.check_evicting(model, tiny.llama())
