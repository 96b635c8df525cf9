"""Slots, counters and gates of a model that lies on several devices of one process."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn

import trimkv_kernels as tk
from conftest import make_qwen3
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.policies import (
    AttentionStat,
    FieldSpec,
    ModelShape,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    example_policy,
)
from trimkv_kernels.policies.allocation import PerLayer

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN = 4, 4, 2, 8, 16
# The same device by two names: two groups with counters of their own, and numbers to compare.
TWO_NAMES = ["cpu", "cpu:0", "cpu:0", "cpu"]
SHAPE = ModelShape(
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    hidden_size=HIDDEN,
    dtype=torch.float32,
    device=torch.device("cpu"),
)
POLICIES = ("trimkv", "random", "h2o", "tova", "scissorhands", "snap_kv", "expected_attention")


def make_cache(policy: RetentionPolicy, device: Any, **changes: Any) -> tk.BoundedKVCache:
    options = {
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "batch_size": 3,
        "budget": 10,
        "buffer": 3,
        "sinks": 1,
        "recent": 2,
        "protect": [(5, 7)],
        "dtype": torch.float32,
        "device": device,
        "impl": "torch",
        **changes,
    }
    return tk.BoundedKVCache(policy, **options)


def call(cache: tk.BoundedKVCache, new: int, seed: int, valid: Tensor | None = None) -> Tensor:
    """Draw a call's inputs and run all layers; the outputs ``[layers, batch, heads, new, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    rows, outputs = cache.batch_size, []
    for layer, device in enumerate(cache.devices):
        draws = [
            torch.randn(rows, heads, new, DIM, generator=generator).to(device)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS, KV_HEADS)
        ]
        query, key, value, query_nope, key_nope = draws
        hidden = torch.randn(rows, new, HIDDEN, generator=generator).to(device)
        outputs.append(
            cache.attend(
                layer,
                query,
                key,
                value,
                hidden_states=hidden,
                query_nope=query_nope,
                key_nope=key_nope,
                valid=valid,
            )
        )
    cache.evict()
    first = [output for output in outputs if output.device.type != "meta"]
    return torch.stack([output.cpu() for output in first])


def live(cache: tk.BoundedKVCache, tmp_path: Path) -> list[Tensor]:
    """Everything a cache can do, and what it gave and held after each step."""
    seen: list[Tensor] = []

    def note(cache: tk.BoundedKVCache, *outputs: Tensor) -> None:
        seen.extend(outputs)
        seen.extend(cache.positions(layer).sort(-1).values.cpu() for layer in range(LAYERS))
        seen.extend((cache.t.cpu(), cache.seen.cpu(), cache.stats().slots_used))

    valid = torch.arange(9) >= torch.tensor([4, 0, 2])[:, None]
    note(cache, call(cache, 9, 0, valid)[..., 4:, :])
    for seed in range(1, 8):
        note(cache, call(cache, 1, seed))
    note(cache, call(cache, 6, 8))
    cache.reorder([2, 0, 1])
    note(cache, call(cache, 1, 9))
    cache.hold()
    note(cache, call(cache, 3, 10), call(cache, 2, 11))
    cache.crop(4)
    cache.release()
    note(cache, call(cache, 1, 12))
    cache.reset(rows=[1])
    note(cache, call(cache, 1, 13))
    forked = cache.fork(2)
    note(forked, call(forked, 1, 14))
    forked.select([0, 3, 5])
    note(forked, call(forked, 1, 15))
    note(cache, call(cache, 1, 16))  # it did not move with its fork
    cache.save(tmp_path / "slots")
    note(cache, call(cache, 1, 17))
    cache.load(tmp_path / "slots")
    note(cache, call(cache, 1, 17))
    twin = copy.deepcopy(cache)
    note(twin, call(twin, 1, 18))
    cache.reset()
    note(cache, call(cache, 12, 19))
    return seen


@pytest.mark.parametrize("name", POLICIES)
def test_groups_with_counters_of_their_own_change_nothing(name: str, tmp_path: Path) -> None:
    policy = example_policy(name, SHAPE)
    one, two = make_cache(policy, "cpu"), make_cache(policy, TWO_NAMES)
    assert [storage.layers for storage in two.storages] == [(0, 3), (1, 2)]
    assert two._state.t(0) is two.t
    assert two._state.t(1) is not two.t
    for got, want in zip(live(two, tmp_path), live(one, tmp_path), strict=True):
        assert torch.equal(got, want)


def test_a_counter_that_is_not_kept_up_to_date_shows(tmp_path: Path) -> None:
    policy = example_policy("trimkv", SHAPE)
    one, two = make_cache(policy, "cpu"), make_cache(policy, TWO_NAMES)
    two._state.clock._update_copies = lambda: None
    list(live(one, tmp_path))
    with pytest.raises(ValueError, match="position must be between 0 and t of its row"):
        list(live(two, tmp_path))  # positions of layer 1 beyond its count of tokens


def test_groups_are_by_budget_and_device() -> None:
    cache = make_cache(
        example_policy("h2o", SHAPE),
        ["cpu", "cpu", "meta", "meta"],
        allocation=PerLayer((10, 20, 20, 20)),
        budget=17,
        protect=(),
    )
    placed = {(x.layers, x.budget, x.device.type) for x in cache.storages}
    assert placed == {((0,), 10, "cpu"), ((1,), 20, "cpu"), ((2, 3), 20, "meta")}
    for storage in cache.storages:
        assert {tensor.device for tensor in storage.tensors()} == {storage.device}
        assert cache._state.t(storage.layers[0]).device == storage.device
    assert cache.t.device == cache.seen.device == torch.device("cpu")
    assert not cache.is_compileable


@pytest.mark.parametrize("name", ["trimkv", "kvzap", "loc_ret"])
def test_gates_lie_with_their_layers(name: str) -> None:
    devices = ["cpu", "meta", "cpu", "meta"]
    policy = example_policy(name, SHAPE)
    bound = make_cache(policy, devices).policy
    for gates, where in ((bound.gates, devices), (policy.gates, ["cpu"] * LAYERS)):
        found = [next(layer.parameters()).device.type for layer in gates.layers]
        assert found == where


def test_tied_gates_part_where_devices_differ() -> None:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_layers": LAYERS}
    config = GateConfig(kind="rg10", num_kv_heads=KV_HEADS, tied=True, **sizes)
    policy = tk.TrimKV(RetentionGates(config))
    bound = make_cache(policy, ["cpu", "cpu", "meta", "meta"]).policy
    assert [layer.bias.device.type for layer in bound.gates.layers] == ["cpu"] * 2 + ["meta"] * 2
    assert policy.gates.layers[3].bias is policy.gates.layers[0].bias


class Placed(RetentionPolicy):
    """Notes where everything is that it is given."""

    needs = Needs(
        insert=("key", "query"),
        score=("key",),
        attention=AttentionStat(),
        query_window=2,
        query_moments=True,
    )
    fields: ClassVar = {"attention": FieldSpec()}

    def __init__(self) -> None:
        self.places: set[tuple[int, str, str]] = set()

    def note(self, view: TokenView | SlotView | ObservationView) -> None:
        tensors = (view.t, view.position, view.valid, *view.fields.values(), *view.given.values())
        kind = type(view).__name__
        self.places |= {(view.layer, kind, tensor.device.type) for tensor in tensors}

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        self.note(tokens)
        return {}

    def observe(self, seen: ObservationView) -> None:
        self.note(seen)

    def score(self, slots: SlotView) -> Tensor:
        self.note(slots)
        return slots.key.sum(-1)


def test_policies_are_given_what_lies_with_the_layer() -> None:
    policy, devices = Placed(), ["cpu", "meta", "meta", "meta"]
    cache = make_cache(policy, devices)
    call(cache, 9, 0, torch.arange(9) >= torch.tensor([4, 0, 2])[:, None])
    for seed in range(1, 9):
        call(cache, 1, seed)
    call(cache, 6, 9)
    assert policy.places == {
        (layer, kind, device)
        for layer, device in enumerate(devices)
        for kind in ("TokenView", "SlotView", "ObservationView")
    }


def test_devices_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one for each of 4 layers, got 2"):
        make_cache(example_policy("random", SHAPE), ["cpu", "cpu"])
    cache = make_cache(example_policy("random", SHAPE), ["cpu", "meta", "meta", "meta"])
    states = [torch.zeros(3, heads, 1, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    cache.attend(0, *states)
    with pytest.raises(ValueError, match="query must be on meta, got cpu"):
        cache.attend(1, *states)


def to_meta(module: nn.Module) -> None:
    """Move a module, and whatever it is called with."""

    def move(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(map(there, args)), {name: there(value) for name, value in kwargs.items()}

    def there(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return value.to("meta") if isinstance(value, Tensor) else value

    module.to("meta")
    module.register_forward_pre_hook(move, with_kwargs=True)


def test_placement_in_a_patched_model() -> None:
    """The upper layers compute on the meta device: no operation may mix devices."""
    model = make_qwen3()
    for module in (*model.model.layers[1:], model.model.norm, model.lm_head):
        to_meta(module)
    config = {"hidden_size": 64, "intermediate_size": 8, "num_layers": 3, "num_kv_heads": 2}
    policy = tk.TrimKV(RetentionGates(GateConfig(kind="rg", **config)))
    handle = tk.patch(model, policy, budget=16, buffer=4, protect=[(3, 5)])
    where = ["cpu", "meta", "meta"]
    gates = [next(gate.parameters()).device.type for gate in handle.policy.gates.layers]
    assert gates == where
    cache = handle.new_cache()
    assert not cache.is_compileable
    ids = torch.arange(3, 63).view(2, 30)
    mask = torch.ones(2, 42, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        for start, stop in ((0, 30), *((i, i + 1) for i in range(30, 42))):
            tokens = ids[:, start:stop] if stop <= 30 else ids[:, :1]
            logits = model(tokens, attention_mask=mask[:, :stop], past_key_values=cache).logits
            assert logits.device.type == "meta"
    assert [cache.slots.keys(layer).device.type for layer in range(3)] == where
    assert [storage.layers for storage in cache.slots.storages] == [(0,), (1, 2)]
    assert int(cache.get_seq_length()) == 42
    held = cache.positions(0)[1, 0]
    assert held.max() == 37  # real tokens before the newest of the padded row
    assert {3, 4} <= set(held.tolist())


@pytest.mark.parametrize("policy", ["key_norm", "critical_kv"])
@pytest.mark.parametrize("kind", ["dispatched", "offloaded"])
def test_hooks_of_accelerate(kind: str, policy: str) -> None:
    """Attention layers then have a ``forward`` of their own, and weights may be elsewhere."""
    ids = torch.arange(3, 63).view(2, 30)
    options = {"budget": 16, "buffer": 4, "sinks": 2, "recent": 2}
    call = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = make_qwen3()
    tk.patch(plain, policy, **options)
    expected = plain.generate(ids, **call)
    if kind == "dispatched":
        model = dispatch_model(make_qwen3(), {"": "cpu"}, force_hooks=True)
    else:
        model = cpu_offload(make_qwen3(), execution_device=torch.device("cpu"))
        assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    forward = model.model.layers[0].self_attn.__dict__.get("forward")
    with tk.patch(model, policy, **options):
        assert torch.equal(model.generate(ids, **call), expected)
    assert model.model.layers[0].self_attn.__dict__.get("forward") is forward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
@pytest.mark.parametrize("name", ["streaming_llm", "trimkv", "h2o", "snap_kv"])
def test_gpu_and_cpu_in_one_model(name: str) -> None:
    shape = ModelShape(
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    options = {"budget": 24, "buffer": 6, "sinks": 2, "recent": 4}
    ids = (torch.randperm(93, generator=torch.Generator().manual_seed(1))[:80] + 3).view(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    on_gpu = ("embed_tokens", "rotary_emb", "layers.0", "layers.2", "norm")
    two = {f"model.{part}": 0 for part in on_gpu} | {"lm_head": 0, "model.layers.1": "cpu"}
    results = {}
    for which, device_map in {"one": {"": "cpu"}, "two": two}.items():
        model = dispatch_model(make_qwen3(), device_map, force_hooks=True)
        handle = tk.patch(model, example_policy(name, shape), **options)
        cache = handle.new_cache()
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
        )
        held = [cache.positions(layer).cpu().sort(-1).values for layer in range(3)]
        results[which] = [output.cpu(), *held]
        assert cache.stats().budget_reached
        if which == "two":
            assert [cache.slots.keys(i).device.type for i in range(3)] == ["cuda", "cpu", "cuda"]
    for got, want in zip(results["two"], results["one"], strict=True):
        assert torch.equal(got, want)
