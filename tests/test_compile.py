"""The decode step under `torch.compile`: one graph, whatever happens in the cache."""

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, Qwen3ForCausalLM

import trimkv_kernels as tk
from conftest import make_qwen3
from test_decode_loop import fake_graphs
from test_patch import BUDGET, batch, trimkv
from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.allocation import Allocation


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def read(model: Qwen3ForCausalLM, tokens: Tensor, cache: object) -> None:
    """A prompt, which is not compiled."""
    with torch.no_grad():
        model(tokens, past_key_values=cache)


def decode(step: Callable, tokens: Tensor, cache: object, start: int) -> list[Tensor]:
    """Logits of a step for each token from ``start`` on."""
    with torch.no_grad():
        return [
            step(
                input_ids=tokens[:, i : i + 1],
                position_ids=torch.tensor([[i]]),
                cache_position=torch.tensor([i]),  # what transformers 5.0 would derive
                past_key_values=cache,
            ).logits
            for i in range(start, tokens.shape[1])
        ]


def check_one_graph(
    model: Qwen3ForCausalLM, policy: tk.RetentionPolicy, backend: str, steps: int
) -> None:
    """The graph that the first step of a cache compiles serves all steps, and two more caches.

    The prompts fill the slots to the brink of the first eviction, hardly, and entirely.
    """
    handle = tk.patch(model, policy, impl="torch", **BUDGET)
    assert handle.new_cache().is_compileable
    step = torch.compile(model, backend=backend, fullgraph=True)
    text = torch.randint(3, 96, (1, 40 + steps), generator=torch.Generator().manual_seed(0))
    layers = range(model.config.num_hidden_layers)
    for prompt in (27, 9, 40):
        tokens, ours, theirs = text[:, : prompt + steps], handle.new_cache(), handle.new_cache()
        read(model, tokens[:, :prompt], ours)
        got = decode(step, tokens[:, : prompt + 1], ours, prompt)
        torch.compiler.set_stance("fail_on_recompile")
        got += decode(step, tokens, ours, prompt + 1)
        read(model, tokens[:, :prompt], theirs)
        for a, b in zip(got, decode(model, tokens, theirs, prompt), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
        for layer in layers:
            kept = [cache.positions(layer).sort(-1).values for cache in (ours, theirs)]
            assert torch.equal(*kept)
        assert ours.stats().evictions.min() >= 2 * BUDGET["buffer"]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["trimkv", "random"])
def test_a_step_is_one_graph_for_all_caches(name: str, qwen3: Qwen3ForCausalLM) -> None:
    policy = trimkv(qwen3) if name == "trimkv" else make_policy(name)
    check_one_graph(qwen3, policy, "eager", steps=40)


def test_a_step_is_one_graph_for_inductor() -> None:
    model = make_qwen3(num_hidden_layers=1)  # it compiles for some twenty seconds
    check_one_graph(model, trimkv(model), "inductor", steps=50)


@pytest.mark.slow
@pytest.mark.parametrize("allocation", [tk.GlobalTopK(1), tk.LayerPreference(4)], ids=str)
def test_a_step_that_shares_a_budget_is_one_graph(allocation: Allocation) -> None:
    """On Triton, where nothing is read back."""
    model = make_qwen3(num_hidden_layers=2)
    shared = {"budget": 8, "buffer": 3, "allocation": allocation}
    handle = tk.patch(model, trimkv(model), impl="triton", **shared)
    assert handle.new_cache().is_compileable
    step = torch.compile(model, backend="eager", fullgraph=True)
    text = torch.randint(3, 96, (1, 17), generator=torch.Generator().manual_seed(0))
    ours, theirs = handle.new_cache(), handle.new_cache()
    for cache in (ours, theirs):
        read(model, text[:, :9], cache)
    got = decode(step, text[:, :10], ours, 9)
    torch.compiler.set_stance("fail_on_recompile")
    got += decode(step, text, ours, 10)
    for a, b in zip(got, decode(model, text, theirs, 9), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    assert ours.stats().evictions.sum() >= 2 * 3 * 4
    for layer in range(2):
        kept = [cache.positions(layer).sort(-1).values for cache in (ours, theirs)]
        assert torch.equal(*kept)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["trimkv", "key_norm"])
def test_decode_loop_compiles_its_step_once(
    name: str, captured: bool, qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all caches, over evictions and ends of rows; draws stay those of torch."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    tk.patch(qwen3, trimkv(qwen3) if name == "trimkv" else name, impl="torch", **BUDGET)
    text = batch((9, 0), 20)
    for number, options in enumerate(({"eos_token_id": 95}, {"do_sample": True, "top_k": 9}), 1):
        for ids, mask in (text, batch((0, 3), 40)):
            call = options | {"attention_mask": mask, "max_new_tokens": 40, "check_every": 3}
            torch.manual_seed(0)
            expected = list(tk.decode_loop(qwen3, ids, **call))
            torch.manual_seed(0)
            with monkeypatch.context() as device:
                tapes = fake_graphs(device) if captured else []
                got = list(tk.decode_loop(qwen3, ids, compile=True, **call))
            assert torch.equal(torch.stack(got), torch.stack(expected))
            assert len(tapes) == captured
        assert counters["stats"]["unique_graphs"] == number
    assert not counters["graph_break"]


def test_a_step_that_does_not_compile_runs_as_it_is(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: object) -> None:
        raise RuntimeError("no such instruction")

    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids = batch((0,), 20)[0]
    expected = list(tk.decode_loop(qwen3, ids, max_new_tokens=20))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    got = list(tk.decode_loop(qwen3, ids, max_new_tokens=20, compile=True))
    assert torch.equal(torch.stack(got), torch.stack(expected))
    assert caplog.text.count("runs without being compiled") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pack_weights", "matmuls", "most"),
    [
        ("trimkv", False, 9, 14),  # q, k, v, two of the gate, o, gate, up, down
        ("streaming_llm", False, 7, 12),
        ("trimkv", True, 5, 10),  # q with k, v and one of the gate; gate with up
        ("streaming_llm", True, 4, 9),
    ],
)
def test_launches_per_layer(name: str, pack_weights: bool, matmuls: int, most: int) -> None:
    """Of Inductor's code for a decode step: fused loops, matrix products and our operators.

    Without Inductor a layer launches 63 kernels. On a CPU this is a proxy: a fused function may
    hold loops that would be several kernels on a GPU.
    """
    fewer, more = (_launches(name, pack_weights, layers) for layers in (1, 3))
    per_layer = {kind: (more[kind] - fewer[kind]) / 2 for kind in more}
    assert per_layer["append_attention"] == 1
    assert per_layer["mm"] + per_layer.get("linear_side_by_side", 0) == matmuls
    assert sum(per_layer.values()) <= most, per_layer
    assert more["evict"] == fewer["evict"] == 1


def _launches(name: str, pack_weights: bool, layers: int) -> Counter[str]:
    """The calls in the code of a step, by kind."""
    torch.compiler.reset()
    model = make_qwen3(num_hidden_layers=layers)
    policy = trimkv(model) if name == "trimkv" else name
    tk.patch(model, policy, impl="triton", pack_weights=pack_weights, **BUDGET)
    ids = batch((0,), 20)[0]
    _, codes = run_and_get_code(
        lambda: list(tk.decode_loop(model, ids, max_new_tokens=3, compile=True, eos_token_id=()))
    )
    (code,) = codes
    calls = re.findall(
        r"^ +(?:\w+ = )?(cpp_fused|[\w.]+\.(?:mm|addmm|\w+\.default))\w*\(", code, re.M
    )
    kinds = (re.sub(r"\.default$", "", call).rpartition(".")[2] for call in calls)
    return Counter("mm" if kind == "addmm" else kind for kind in kinds)


def test_generate_compiles_once_for_all_caches(qwen3: Qwen3ForCausalLM) -> None:
    """As transformers compiles decoding on an accelerator by itself, over evictions and caches."""
    tk.patch(qwen3, trimkv(qwen3), impl="torch", **BUDGET)
    config = CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = True
    call = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    for prompt in (12, 40):
        ids, mask = batch((9, 0), prompt)
        expected = qwen3.generate(ids, attention_mask=mask, disable_compile=True, **call)
        got = qwen3.generate(ids, attention_mask=mask, compile_config=config, **call)
        assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_state_on_an_accelerator_is_promised_to_stay() -> None:
    """Without that Inductor skips CUDA graphs, because the step writes to its inputs."""

    def unmarked(cache: tk.BoundedKVCache) -> int:
        state = [cache.t, cache.seen, *(x for storage in cache.storages for x in storage.tensors())]
        return sum(getattr(x, "_dynamo_static_input_type", None) != "unguarded" for x in state)

    options = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "num_heads": 4, "batch_size": 2}
    sizes = {"budget": 12, "buffer": 4, "dtype": torch.float32, "impl": "torch"}
    for name in ("streaming_llm", "h2o", "snap_kv"):
        cache = tk.BoundedKVCache(make_policy(name), **options, **sizes, device="meta")
        twins = [cache.fork(2), copy.deepcopy(cache)]
        cache.select([1, 0, 1])
        assert [unmarked(x) for x in (cache, *twins)] == [0, 0, 0]
        on_cpu = tk.BoundedKVCache(make_policy(name), **options, **sizes, device="cpu")
        assert unmarked(on_cpu) > 5  # there it would only load the compiler


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm"])
def test_generate_compiles_itself_with_cuda_graphs(policy: str) -> None:
    model = make_qwen3().to("cuda")
    tk.patch(model, trimkv(model) if policy == "trimkv" else policy, **BUDGET)
    ids, mask = (x.to("cuda") for x in batch((9, 0), 40))
    call = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, disable_compile=True, **call)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **call), expected)
    assert counters["inductor"]["cudagraph_skips"] == 0, counters["inductor"]
    assert counters["stats"]["unique_graphs"] == 1
