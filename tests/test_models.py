"""Every supported model family: against the stock model, and against the masked full cache."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import trimkv_kernels as tk
from conftest import make_qwen3
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.integrations import INTEGRATIONS, support_table
from trimkv_kernels.policies import SlotView, make_policy
from trimkv_kernels.testing import masked_reference
from trimkv_kernels.training import GateModel

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 16
GEMMA_LAYERS = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "Llama": (LlamaConfig, LlamaForCausalLM, {}),
    "Mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 24}),
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "Qwen3-MoE": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "Phi-3": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
            "sliding_window": 8192,  # wider than any text
        },
    ),
    "Gemma 3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 16,
            "num_hidden_layers": 5,
            "layer_types": GEMMA_LAYERS,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 40,
        },
    ),
}
NAMES = ["Qwen3", *FAMILIES]
BUDGET = {"budget": 24, "buffer": 6, "sinks": 2, "recent": 4}


def make(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model whose keys are spread out."""
    if name == "Qwen3":
        return make_qwen3(num_hidden_layers=2, **changes)
    config_class, model_class, extra = FAMILIES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **extra, **changes})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "k_norm" in parameter_name or "q_norm" in parameter_name:
                parameter.uniform_(0.2, 2.0)
            elif "proj" in parameter_name and parameter.dim() == 1:
                parameter.uniform_(-1.0, 1.0)
            elif parameter.dim() == 2 and "embed" not in parameter_name:
                parameter.mul_(6.0)
    return model


def batch(padding: tuple[int, ...], total: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(93, generator=generator)[:total] + 3 for _ in padding])
    mask = (torch.arange(total) >= torch.tensor(padding)[:, None]).long()
    return ids * mask, mask


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    return request.param, make(request.param)


@pytest.fixture
def stock(family: tuple[str, PreTrainedModel]) -> PreTrainedModel:
    return family[1]


@pytest.fixture
def model(stock: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(stock)


def run(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, calls: list[int]) -> Tensor:
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits, start = [], 0
    with torch.no_grad():
        for new in calls:
            stop = start + new
            logits.append(
                model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=position[:, start:stop],
                    past_key_values=cache,
                ).logits
            )
            start = stop
    return torch.cat(logits, 1) * mask[..., None]


def test_every_family_is_here() -> None:
    """Those that read text alone; the others are in ``test_vision``."""
    text = [x for x in INTEGRATIONS if "ConditionalGeneration" not in x.causal_model.__name__]
    assert sorted(NAMES) == sorted(integration.name for integration in text)


@pytest.mark.parametrize("padding", [(0,), (9, 0)])
def test_a_full_budget_gives_the_stock_logits(
    padding: tuple[int, ...], model: PreTrainedModel, stock: PreTrainedModel
) -> None:
    ids, mask = batch(padding, 60)
    calls = [30, 1, 1, 1, 12, 1, 1, 13]
    want = run(stock, DynamicCache(config=stock.config), ids, mask, calls)
    for policy in ("full", "h2o"):  # the second leaves the prompt to no attention of the model
        with tk.patch(model, policy, budget=64, impl="torch") as handle:
            got = run(model, handle.new_cache(), ids, mask, calls)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("policy", ["key_norm", "streaming_llm", "snap_kv"])
def test_bounded_equals_the_masked_full_cache(
    policy: str, model: PreTrainedModel, stock: PreTrainedModel
) -> None:
    cache = tk.patch(model, policy, **BUDGET, impl="torch").new_cache()
    ids, mask = batch((13, 0, 5), 70)
    got, want = masked_reference(
        model, stock, ids, attention_mask=mask, calls=[40, *[1] * 14, 9, *[1] * 7], cache=cache
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert (cache.stats().evictions[:, 1] >= 40).all()
    full = run(stock, DynamicCache(config=stock.config), ids, mask, [70])
    assert (got - full).abs().max() > 1e-2  # the bound shows


def test_generate(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    ids, mask = batch((6, 0), 20)
    call = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    expected = stock.generate(ids, **call)
    beams = stock.generate(ids, **call, num_beams=2)
    with tk.patch(model, "full", budget=64):
        assert torch.equal(model.generate(ids, **call), expected)
        assert torch.equal(model.generate(ids, **call, num_beams=2), beams)
    with tk.patch(model, "streaming_llm", **BUDGET) as handle:
        cache = handle.new_cache()
        together = model.generate(ids, past_key_values=cache, **call)
        assert cache.stats().budget_reached
        alone = model.generate(ids[:1, 6:], **{**call, "attention_mask": mask[:1, 6:]})
        assert torch.equal(together[0, 20:], alone[0, 14:])
        chunked = model.generate(ids, prefill_chunk_size=7, **call)
        assert chunked.shape == expected.shape


def test_unpatch_is_exact(model: PreTrainedModel) -> None:
    before = [dict(module.__dict__) for module in model.modules()]
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with tk.patch(model, "random", budget=16):
        assert [dict(module.__dict__) for module in model.modules()] != before
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("name", ["Llama", "Phi-3"])  # Qwen3's is tested elsewhere
def test_compiled_step(name: str) -> None:
    model = make(name)
    handle = tk.patch(model, "streaming_llm", **BUDGET, impl="torch")
    ids, mask = batch((0,), 36)
    want = run(model, handle.new_cache(), ids, mask, [27, *[1] * 9])
    cache = handle.new_cache()
    assert cache.is_compileable
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = [model(ids[:, :27], past_key_values=cache).logits]
        for i in range(27, 36):
            got.append(
                step(
                    input_ids=ids[:, i : i + 1],
                    position_ids=torch.tensor([[i]]),
                    cache_position=torch.tensor([i]),  # what transformers 5.0 would derive
                    past_key_values=cache,
                ).logits
            )
    torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-5, rtol=2e-5)


class Adapted(nn.Module):
    """A frozen linear layer beside one of low rank, as PEFT wraps them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Quantised(nn.Module):
    """Codes and a scale for each row; there is no ``weight``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = base.bias

    def dense(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)


def replace_projections(model: PreTrainedModel, kind: type[nn.Module]) -> PreTrainedModel:
    torch.manual_seed(3)
    for name, module in list(model.named_modules()):
        for child, linear in list(module.named_children()):
            if ".self_attn" in f".{name}" and isinstance(linear, nn.Linear):
                setattr(module, child, kind(linear))
    return model.eval()


@pytest.mark.parametrize("kind", [Adapted, Quantised])
def test_wrapped_projections(kind: type[nn.Module], model: PreTrainedModel) -> None:
    replace_projections(model, kind)
    stock = copy.deepcopy(model)
    ids, mask = batch((5, 0), 50)
    cache = tk.patch(model, "key_norm", **BUDGET, impl="torch").new_cache()
    got, want = masked_reference(
        model, stock, ids, attention_mask=mask, calls=[40, *[1] * 10], cache=cache
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_output_weights_are_what_the_projections_do(stock: PreTrainedModel) -> None:
    plain = tk.patch(copy.deepcopy(stock), "streaming_llm", budget=16).shape.output_weights
    quantised = replace_projections(copy.deepcopy(stock), Quantised)
    layers = [m for m in quantised.modules() if isinstance(getattr(m, "o_proj", None), Quantised)]
    handle = tk.patch(quantised, "critical_kv", budget=16)
    made = handle.shape.output_weights
    assert len(made) == len(plain) == len(handle.policy.output_weights)
    types = getattr(stock.config, "layer_types", ["full_attention"] * len(layers))
    bounded = [x for x, kind in zip(layers, types, strict=True) if kind == "full_attention"]
    for index, layer in enumerate(bounded):
        torch.testing.assert_close(made[index], layer.o_proj.dense(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(made[index], plain[index], atol=2e-2, rtol=0)
        assert torch.equal(handle.policy.output_weights[index], made[index])


def test_scale_and_rope(family: tuple[str, PreTrainedModel], model: PreTrainedModel) -> None:
    name, _ = family
    shape = tk.patch(model, "streaming_llm", budget=16).shape
    head_dim = {"Mistral": 24}.get(name, 16)
    assert shape.head_dim == head_dim
    assert shape.scale == pytest.approx(40**-0.5 if name == "Gemma 3" else head_dim**-0.5)
    if name == "Phi-3":
        assert shape.inv_freq is None  # it rotates half of each head
    else:
        theta = 1e6 if name == "Gemma 3" else 1e4
        exponent = torch.arange(0, head_dim, 2) / head_dim
        torch.testing.assert_close(shape.inv_freq, theta**-exponent)


@pytest.mark.parametrize("name", ["snap_kv", "pyramid_kv", "r_kv"])
def test_policies_that_weigh_logits_take_the_models_scale(name: str) -> None:
    policy = make_policy(name, window=4)
    bound = tk.patch(make("Gemma 3"), policy, budget=64).policy
    assert bound.scale == 40**-0.5
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 12, 16, generator=generator)
    queries = torch.randn(1, 4, 4, 16, generator=generator)

    def score(policy: tk.RetentionPolicy, queries: Tensor) -> Tensor:
        position = torch.arange(12, dtype=torch.int32)
        return policy.score(
            SlotView(
                policy=name,
                layer=0,
                t=torch.tensor([12], dtype=torch.int32),
                position=position.expand(1, 2, 12),
                valid=torch.ones(1, 2, 12, dtype=torch.bool),
                given={"key": key, "queries": queries, "query_position": position[None, 8:]},
            )
        )

    # scores of the default scale, 16 ** -0.5, on queries that make up for the difference
    torch.testing.assert_close(score(bound, queries), score(policy, queries * 4 * 40**-0.5))
    assert not torch.equal(score(bound, queries), score(policy, queries))


def test_gates_of_a_published_checkpoint(
    family: tuple[str, PreTrainedModel], model: PreTrainedModel, tmp_path: Any
) -> None:
    """The layout of the Llama and Phi-3 checkpoints, with made-up numbers."""
    name, _ = family
    layers = model.config.num_hidden_layers if name != "Gemma 3" else 2
    width = 1024 if name == "Phi-3" else 512
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.self_attn.retention_gate."
        tensors |= {
            prefix + "linear1.weight": torch.randn(width, 64, generator=generator) / 8,
            prefix + "linear1.bias": torch.zeros(width),
            prefix + "linear2.weight": torch.randn(2, width, generator=generator) / width**0.5,
            prefix + "bias": torch.full((2,), 2.0),
        }
    torch.save(tensors, tmp_path / "trimkv_weights.pth")
    config = model.config.to_dict() | {
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "retention_gate": "rg",
        "retention_gate_intermediate_size": width,
        "memory_size": 24.0,
        "buffer_size": 6,
        "base_model": "someone/base",
    }
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    handle = tk.patch(model, tk.TrimKV.from_pretrained(tmp_path))
    assert "budget=24, buffer=6" in repr(handle)
    entered: dict[int, Tensor] = {}
    bounded = [m for m in model.modules() if hasattr(m, "o_proj") and "forward" in m.__dict__]
    for index, layer in enumerate(bounded):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: entered.update(
                {index: kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
    ids, mask = batch((0,), 60)
    cache = handle.new_cache()
    run(model, cache, ids, mask, [60])
    for index in range(layers):
        prefix = f"model.layers.{index}.self_attn.retention_gate."
        gate = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        hidden = nn.functional.silu(entered[index] @ gate["linear1.weight"].T)
        logit = hidden @ gate["linear2.weight"].T + gate["bias"]
        log_beta = -torch.log1p(torch.exp(-logit.double()))[0].T  # [num_kv_heads, 60]
        score = log_beta * (60 + 1 - torch.arange(60))
        want = score.topk(24).indices.sort().values
        got = cache.slots.positions(index)[0].sort().values[:, -24:]
        assert torch.equal(got.long(), want)


def test_the_student_of_gate_training(
    family: tuple[str, PreTrainedModel], model: PreTrainedModel
) -> None:
    """Gates that forget nothing make it the teacher, which is the stock model."""
    config = GateConfig(
        kind="rg",
        hidden_size=64,
        intermediate_size=8,
        num_layers=model.config.num_hidden_layers,
        num_kv_heads=2,
        bias_init=100.0,
    )
    if family[0] == "Gemma 3":
        with pytest.raises(TypeError, match="every layer must have full attention"):
            GateModel(model, RetentionGates(config), budget=4)
        return
    student = GateModel(model, RetentionGates(config), budget=4, base_loss="fwkl")
    with student.attached():
        losses = student(batch((0, 0), 20)[0])
    assert losses["fwkl"].abs() < 1e-6


def test_another_class_is_refused_with_the_list() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(TypeError) as error:
        tk.patch(gpt2)
    names = ", ".join(integration.causal_model.__name__ for integration in INTEGRATIONS)
    assert str(error.value) == (
        f"model must contain one of {names}, got GPT2LMHeadModel, which is not supported"
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", {"sliding_window": 512}),
        ("Phi-3", {"sliding_window": 2047}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("Qwen3-MoE", {"use_sliding_window": True, "sliding_window": 8}),
    ],
)
def test_sliding_windows_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(
        TypeError, match=r"got layers with .'sliding_attention'.*sliding_window=None"
    ):
        tk.patch(make(name, **changes), "random")
    changes = {**changes, "sliding_window": None}
    tk.patch(make(name, **changes), "random", budget=16)


def test_gemma_3_that_cannot_be_bounded() -> None:
    with pytest.raises(TypeError, match="some layer must have full attention, got none"):
        tk.patch(make("Gemma 3", layer_types=["sliding_attention"] * 5), "random")
    with pytest.raises(TypeError, match="attention must be causal"):
        tk.patch(make("Gemma 3", use_bidirectional_attention=True), "random")


def test_a_multimodal_model_is_refused() -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**SIZES, **FAMILIES["Gemma 3"][2]}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with pytest.raises(TypeError, match="got Gemma3ForConditionalGeneration, which is not"):
        tk.patch(Gemma3ForConditionalGeneration(config))


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    return make("Gemma 3")


def test_sliding_layers_keep_their_own_cache(gemma: PreTrainedModel) -> None:
    model = copy.deepcopy(gemma)
    cache = tk.patch(model, "streaming_llm", **BUDGET).new_cache()
    ids, mask = batch((0,), 60)
    run(model, cache, ids, mask, [40, *[1] * 20])
    assert cache.is_sliding == [kind == "sliding_attention" for kind in GEMMA_LAYERS]
    assert [layer.keys.shape[2] for layer in cache.layers] == [15, 30, 15, 30, 15]
    assert cache.get_seq_length() == 60
    assert not cache.is_compileable  # they grow
    assert cache.positions(3).shape == (1, 2, 30)
    assert cache.stats().slots_used.shape == (2, 1, 2)
    with pytest.raises(ValueError, match="layer 2 has a sliding window and holds no slots"):
        cache.positions(2)


def test_rows_of_sliding_layers_follow(gemma: PreTrainedModel) -> None:
    model = copy.deepcopy(gemma)
    handle = tk.patch(model, "streaming_llm", **BUDGET)
    ids, mask = batch((0, 0), 45)

    def step(cache: Any, column: int, rows: list[int]) -> Tensor:
        with torch.no_grad():
            return model(ids[rows, column : column + 1], past_key_values=cache).logits

    cache = handle.new_cache()
    run(model, cache, ids[:, :40], mask[:, :40], [40])
    plain = step(copy.deepcopy(cache), 40, [0, 1])
    forked = cache.fork(2)
    torch.testing.assert_close(step(forked, 40, [0, 0, 1, 1]), plain[[0, 0, 1, 1]])
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(step(swapped, 40, [1, 0]), plain[[1, 0]])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([3, 0]))
    torch.testing.assert_close(step(repeated, 40, [1, 0]), plain[[1, 0]])
    torch.testing.assert_close(step(cache, 40, [0, 1]), plain)
    cache.reset()
    assert cache.get_seq_length() == 0
    run(model, cache, ids[:, :40], mask[:, :40], [40])
    torch.testing.assert_close(step(cache, 40, [0, 1]), plain)


def test_drafts_with_sliding_layers(gemma: PreTrainedModel) -> None:
    model = copy.deepcopy(gemma)
    handle = tk.patch(model, "streaming_llm", **BUDGET)
    ids, mask = batch((0,), 50)
    want = run(model, handle.new_cache(), ids, mask, [40, *[1] * 10])
    cache = handle.new_cache()
    cache.activate_past_recording()
    wrong = ids.flip(1)
    with torch.no_grad():
        got = [model(ids[:, :40], past_key_values=cache).logits]
        cache.crop(0)
        for column in range(40, 50):
            tokens = torch.cat((ids[:, column : column + 1], wrong[:, :3]), 1)
            got.append(model(tokens, past_key_values=cache).logits[:, :1])
            cache.crop(-3)
    cache.stop_past_recording()
    torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-5, rtol=2e-5)
    assert cache.layers[0].keys.shape[2] == WINDOW - 1
    assert cache.get_seq_length() == int(cache.slots.seen) == 50
    with pytest.raises(ValueError, match="layers with a sliding window have dropped"):
        cache.crop(-1)
    assert int(cache.slots.seen) == 50


def test_what_sliding_layers_cannot_do(gemma: PreTrainedModel, tmp_path: Any) -> None:
    model = copy.deepcopy(gemma)
    cache = tk.patch(model, "random", **BUDGET).new_cache()
    ids, mask = batch((4, 0), 30)
    run(model, cache, ids[:, :20], mask[:, :20], [20])
    with torch.no_grad():
        with pytest.raises(ValueError, match="attention_mask must be given, with 21 columns"):
            model(ids[:, 20:21], past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask must have 21 columns.*got 1:"):
            model(ids[:, 20:21], attention_mask=mask[:, 20:21], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="save: layers with a sliding window"):
        cache.save(tmp_path / "slots")
    with pytest.raises(NotImplementedError, match="load: layers with a sliding window"):
        cache.load(tmp_path / "slots")
    with pytest.raises(NotImplementedError, match="reset of some rows"):
        cache.reset(rows=[0])


def test_phi_3_switches_to_long_frequencies_as_stock_does() -> None:
    """Past its original length, ``generate`` drops the cache and reads the text again."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 24,
    }
    options = {"rope_parameters": rope, "original_max_position_embeddings": 24}
    stock = make("Phi-3", max_position_embeddings=96, **options)
    model = copy.deepcopy(stock)
    ids, mask = batch((3, 0), 20)
    call = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = stock.generate(ids, **call)
    with tk.patch(model, "full", budget=64):
        assert torch.equal(model.generate(ids, **call), expected)


def test_the_support_table_is_up_to_date() -> None:
    start, end = "<!-- supported models: scripts/support_table.py -->\n", "\n<!-- end -->"
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("docs/models.md", "README.md")]
    tables = [page.split(start)[1].split(end)[0] for page in pages if start in page]
    assert start in pages[0]
    assert all(table == support_table(INTEGRATIONS) for table in tables)
    for integration in INTEGRATIONS:
        assert f"| {integration.name} | `{integration.causal_model.__name__}` |" in tables[0]
