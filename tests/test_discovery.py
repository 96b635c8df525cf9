"""A model's parts, found once for patching, training and evaluation; and changes to instances."""

import ast
import copy
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import Qwen3ForCausalLM

import trimkv_kernels
import trimkv_kernels as tk
from test_models import GEMMA_LAYERS, NAMES, WINDOW, make
from trimkv_kernels.integrations import INTEGRATIONS, BoundedCache
from trimkv_kernels.integrations.discovery import find_handle, find_parts
from trimkv_kernels.integrations.instance_patch import InstancePatch
from trimkv_kernels.integrations.protocol import AttentionCache
from trimkv_kernels.training.student import RetentionPass

PACKAGE = Path(trimkv_kernels.__file__).parent


class Wrapper(nn.Module):
    """As PEFT and accelerate put one around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_every_family(name: str) -> None:
    model = make(name)
    parts = find_parts(model)
    (integration,) = (i for i in INTEGRATIONS if i.name == name)
    assert parts.integration is integration
    assert parts.generator is model
    assert parts.base is model.model
    assert list(parts.layers) == [block.self_attn for block in model.model.layers]
    assert parts.gate_sizes() == {
        "num_layers": len(model.model.layers),
        "num_kv_heads": 2,
        "hidden_size": 64,
    }
    assert (parts.device, parts.config) == (model.device, model.config)
    handle = tk.patch(model, "random", budget=16)
    assert handle.shape.num_layers == len(parts.bounded_layers) == len(parts.devices())
    assert all("forward" in vars(layer) for layer in parts.bounded_layers)


def test_sliding_layers_are_parts_and_are_not_bounded() -> None:
    parts = find_parts(make("Gemma 3"))
    assert [layer.layer_idx for layer in parts.bounded_layers] == [1, 3]
    assert len(parts.layers) == len(GEMMA_LAYERS)
    assert parts.windows == [WINDOW, None, WINDOW, None, WINDOW]


def test_a_wrapper_and_a_decoder_stack_alone(qwen3: Qwen3ForCausalLM) -> None:
    whole = find_parts(Wrapper(Wrapper(qwen3)))
    assert (whole.generator, whole.base) == (qwen3, qwen3.model)
    stack = find_parts(Wrapper(qwen3.model))
    assert (stack.generator, stack.base) == (None, qwen3.model)
    assert stack.layers == whole.layers


def test_a_patched_model_is_found_by_its_handle(qwen3: Qwen3ForCausalLM) -> None:
    assert find_handle(qwen3) is None
    with tk.patch(qwen3, "random", budget=16) as handle:
        for module in (qwen3, qwen3.model, Wrapper(qwen3)):
            assert find_handle(module) is handle
            with pytest.raises(ValueError, match=r"already patched: call unpatch\(model\) first"):
                find_parts(module)
    assert find_handle(qwen3) is None


def test_the_outer_config_names_the_model(qwen3: Qwen3ForCausalLM) -> None:
    """As in a model whose text is one part of several, each with a config of its own."""
    qwen3.config = copy.copy(qwen3.config)
    qwen3.config._name_or_path, qwen3.config._commit_hash = "someone/whole", "abc"
    qwen3.model.config._name_or_path = ""
    parts = find_parts(qwen3)
    assert (parts.name_or_path, parts.revision) == ("someone/whole", "abc")
    assert parts.shape().name_or_path == "someone/whole"
    assert " someone/whole " in parts.fingerprint()["model"]
    assert parts.config is qwen3.model.config
    assert find_parts(qwen3.model).name_or_path == ""


@pytest.mark.parametrize("kind", [BoundedCache, RetentionPass])
def test_who_attends_takes_what_the_protocol_says(kind: type) -> None:
    assert AttentionCache in kind.__mro__
    assert kind.attend is not AttentionCache.attend
    assert inspect.signature(kind.attend) == inspect.signature(AttentionCache.attend)


def test_an_instance_gets_back_what_it_had() -> None:
    thing = SimpleNamespace(kept=1, none=None)
    patch = InstancePatch()
    assert patch.is_empty
    patch.set(thing, "kept", 2)
    patch.set(thing, "kept", 3)
    patch.set(thing, "none", 4)
    patch.set(thing, "new", 5)
    patch.keep(thing, "later")
    thing.later = 6
    assert vars(thing) == {"kept": 3, "none": 4, "new": 5, "later": 6}
    patch.restore()
    assert vars(thing) == {"kept": 1, "none": None}
    assert patch.is_empty
    patch.restore()


def test_what_others_have_set_since_stays_theirs() -> None:
    thing = SimpleNamespace(wrapped=1, removed=1)
    patch = InstancePatch()
    for name in ("wrapped", "removed", "new"):
        patch.set(thing, name, 2)
    thing.wrapped, thing.new = 3, 4
    del thing.removed
    patch.restore()
    assert vars(thing) == {"wrapped": 3, "new": 4}


def test_changes_are_undone_in_reverse_and_after_errors() -> None:
    thing, order = SimpleNamespace(value=0), []

    def fail() -> None:
        order.append("fail")
        raise OSError("cannot be undone")

    patch = InstancePatch()
    patch.set(thing, "value", 1)
    patch.on_restore(lambda: order.append("first"))
    patch.on_restore(fail)
    patch.on_restore(lambda: order.append(thing.value))
    patch.set(thing, "value", 2)
    with pytest.raises(OSError, match="cannot be undone"), patch:
        raise KeyError
    assert order == [1, "fail", "first"]
    assert vars(thing) == {"value": 0}


def imports() -> dict[str, set[str]]:
    """What each module of the package imports of it, at any place of the file."""
    files = {
        ".".join(("trimkv_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in names:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= (inner & names.keys()) or {node.module}
    return found


def test_no_module_of_the_integrations_imports_itself() -> None:
    """By way of others, function-level imports included."""
    graph = imports()
    for start in graph:
        if ".integrations" not in start and not start.endswith(("patching", "decoding")):
            continue
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen and name != "trimkv_kernels":
                seen.add(name)
                todo += graph[name]
        assert start not in seen, start


def test_integrations_know_neither_patching_nor_those_above() -> None:
    above = ("patching", "decoding", "training", "evaluation", "inspection", "cli")
    for name, imported in imports().items():
        if name.startswith("trimkv_kernels.integrations"):
            assert not [
                x for x in imported if x.startswith(tuple(f"trimkv_kernels.{a}" for a in above))
            ]
    for name, imported in imports().items():
        if name.startswith("trimkv_kernels.training"):
            assert "trimkv_kernels.patching" not in imported, name
