"""What stays of a text with images: protection, budgets beside the text, gates of checkpoints."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import trimkv_kernels as tk
from trimkv_kernels.gates import GateConfig, load_gates
from trimkv_kernels.gates.checkpoint import convert_gates
from trimkv_kernels.integrations.discovery import find_handle
from vision import GREEDY, IMAGE, NAMES, Row, in_calls, inputs, kept_of, make, run


@pytest.fixture(scope="module", params=NAMES)
def stock(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


@pytest.fixture
def model(stock: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(stock)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["stock"]


@pytest.mark.parametrize("policy", ["random", "key_norm"])
def test_images_or_text_are_never_evicted(policy: str, model: PreTrainedModel, name: str) -> None:
    given = inputs(Row(name).text(5).image().text(4).image().text(3))
    image, text = kept_of(given, (IMAGE,)), kept_of(given, (IMAGE,), inside=False)
    total = given["input_ids"].shape[1]
    for protect, stay in (
        ("image", image),
        ("text", text),
        (["image", (0, 3)], image | {0, 1, 2}),
    ):
        sizes = {"budget": len(stay) + 2, "buffer": 2, "sinks": 0, "recent": 1}
        with tk.patch(model, policy, **sizes, protect=protect) as handle:
            cache = handle.new_cache()
            model.generate(**given, **GREEDY, past_key_values=cache)
            assert cache.stats().evictions.min() >= total + 11 - len(stay) - 4
            for layer in range(2):
                for head in cache.positions(layer)[0].tolist():
                    assert stay <= set(head)


def test_spans_of_the_caller_and_images_of_each_row(model: PreTrainedModel, name: str) -> None:
    rows = [Row(name).text(5).image().text(4), Row(name, 2).text(2).image().text(1)]
    given = inputs(*rows)
    options = {"budget": 12, "buffer": 2, "sinks": 0, "recent": 1}
    handle = tk.patch(model, "random", **options, protect="image")
    cache = handle.new_cache()
    cache.pin([[(1, 3)], []])  # spans of the caller, row by row
    model.generate(**given, **GREEDY, past_key_values=cache)
    for row, text in enumerate(rows):
        stay = {i for i, token in enumerate(text.ids) if token == IMAGE}
        stay |= {1, 2} if row == 0 else set()
        for head in cache.positions(1)[row].tolist():
            assert stay <= set(head)
    other = handle.new_cache()
    other.pin([[(0, 2)]])
    with pytest.raises(ValueError, match="spans must have one list for each of 2 rows, got 1"):
        model(**given, past_key_values=other)
    assert other.is_empty
    with pytest.raises(ValueError, match=r"spans must hold \(start, stop\)"):
        handle.new_cache().pin([[(3, 2)]])
    many = inputs(Row(name).text(2).image().image().image().text(9))
    full = handle.new_cache()
    with pytest.raises(ValueError, match="budget must exceed the protected slots: budget=12"):
        model(**many, past_key_values=full)
    assert full.is_empty


def test_images_of_a_later_turn_are_protected(model: PreTrainedModel, name: str) -> None:
    given = inputs(Row(name).text(4).image().text(8).image().text(9))
    calls = [13, 1, 1, 12, 1, 1, len(given["input_ids"][0]) - 29]
    more = in_calls(model, given, calls)
    handle = tk.patch(model, "key_norm", budget=12, buffer=2, sinks=0, recent=1, protect="image")
    cache = handle.new_cache()
    run(model, cache, given, calls, more)
    assert cache.stats().evictions.min() > 10
    for head in cache.positions(0)[0].tolist():
        assert kept_of(given, (IMAGE,)) <= set(head)


def test_protection_and_sizes_that_a_text_model_has_not(qwen3: PreTrainedModel) -> None:
    for name in ("image", "text"):
        with pytest.raises(ValueError, match=f"protect='{name}' is for vision-language models"):
            tk.patch(qwen3, "random", protect=name)
    with pytest.raises(ValueError, match="protect must name 'image' or 'text', got 'question'"):
        tk.patch(qwen3, "random", protect=["question"])
    with pytest.raises(ValueError, match="beside_text=True is for vision-language models"):
        tk.patch(qwen3, "random", beside_text=True)
    assert find_handle(qwen3) is None


def test_a_budget_beside_the_text(model: PreTrainedModel, name: str) -> None:
    row = Row(name).text(9).image().text(8)
    given, text = inputs(row), len([token for token in row.ids if token != IMAGE])
    handle = tk.patch(model, "key_norm", budget=3, buffer=2, sinks=0, recent=0, beside_text=True)
    model.generate(**given, **GREEDY)
    cache = handle.new_cache(given["input_ids"])
    model.generate(**given, **GREEDY, past_key_values=cache)
    assert cache.slots.budget == text + 3
    padded = inputs(row, row)  # a padded batch counts real tokens
    padded["input_ids"] = torch.nn.functional.pad(padded["input_ids"], (4, 0))
    padded["attention_mask"] = torch.nn.functional.pad(padded["attention_mask"], (4, 0))
    assert handle.new_cache(padded["input_ids"], padded["attention_mask"]) is not None
    with torch.no_grad():
        output = model(**given)  # a bare forward makes its own
    assert output.past_key_values.slots.budget == text + 3
    with pytest.raises(ValueError, match=r"pass new_cache\(input_ids=\.\.\., attention_mask"):
        handle.new_cache()
    other = inputs(row, Row(name, 3).text(2).image().text(2))
    message = r"same number of text tokens, got \[.*read the rows one by one"
    with pytest.raises(ValueError, match=message):
        model.generate(**other, **GREEDY)
    embeds = model.get_input_embeddings()(given["input_ids"])
    with pytest.raises(ValueError, match="by the text tokens of a prompt"), torch.no_grad():
        model(inputs_embeds=embeds)


def write_published(model: PreTrainedModel, folder: Path, base: str) -> dict[str, Tensor]:
    """Made-up gates as trimkv 0.1.5 writes them for a vision-language model."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    last = torch.randn(2, 32, generator=generator)
    for layer in range(2):
        prefix = f"model.language_model.layers.{layer}.self_attn.retention_gate."
        tensors |= {
            prefix + "linear1.weight": torch.randn(32, 64, generator=generator) / 8,
            prefix + "linear1.bias": torch.zeros(32),
            prefix + "linear2.weight": torch.randn(32, 32, generator=generator) / 6,
            prefix + "linear2.bias": torch.zeros(32),
            prefix + "linear3.weight": last,
            prefix + "bias": torch.full((2,), 2.0),
        }
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "trimkv_weights.pth")
    config = model.config.to_dict()
    config["text_config"] |= {
        "retention_gate": "rg10",
        "retention_gate_intermediate_size": 32,
        "retention_gate_bias_init": 18.0,
        "tie_retention_gate_layers": True,
        "max_seq_len": 32768,
    }
    config |= {
        "memory_size": 5,
        "buffer_size": 2,
        "global_capacity": True,
        "retention_weight": 1.0,
        "trainable_params": "self_attn.retention_gate",
        "base_model": base,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return tensors


@pytest.mark.parametrize("name", ["Qwen3-VL", "LLaVA"])
def test_a_published_checkpoint(name: str, tmp_path: Path) -> None:
    """Its memory is counted beside the text tokens of the prompt."""
    stock = make(name)
    stock.save_pretrained(tmp_path / "base")
    tensors = write_published(stock, tmp_path / "gates", "base")
    model = tk.from_pretrained(tmp_path / "gates")
    handle = find_handle(model)
    assert type(model) is type(stock)
    assert handle.options.beside_text
    assert (handle.options.budget, handle.options.buffer) == (5, 2)
    gates = handle.policy.gates
    assert (gates.config.kind, gates.config.tied, gates.config.shared_budget) == (
        "rg10",
        True,
        True,
    )
    for layer in range(2):
        for part, tensor in gates.layers[layer].state_dict().items():
            key = f"model.language_model.layers.{layer}.self_attn.retention_gate.{part}"
            assert torch.equal(tensor, tensors[key])
    row = Row(name).text(6).image().text(9)
    given = inputs(row)
    entered: dict[int, Tensor] = {}
    for index, layer in enumerate(handle.parts.bounded_layers):

        def note(module: Any, args: Any, kwargs: dict[str, Any], index: int = index) -> None:
            entered[index] = kwargs["hidden_states"]

        layer.register_forward_pre_hook(note, with_kwargs=True)
    cache = handle.new_cache(given["input_ids"])
    with torch.no_grad():
        model(**given, past_key_values=cache)
    total, budget = len(row.ids), len([x for x in row.ids if x != IMAGE]) + 5
    assert cache.slots.budget == budget
    fixed = tk.from_pretrained(tmp_path / "gates", beside_text=False, budget=8)
    with torch.no_grad():
        output = fixed(**given)
    kept = output.past_key_values
    assert kept.slots.budget == 8
    scores = []
    for index in range(2):  # the formula of the paper, on what entered each layer
        gate = gates.layers[index].state_dict()
        hidden = entered[index].double()
        for part in ("linear1", "linear2"):
            weight, bias = gate[f"{part}.weight"].double(), gate[f"{part}.bias"].double()
            hidden = nn.functional.silu(hidden @ weight.T + bias)
        logit = hidden @ gate["linear3.weight"].double().T + gate["bias"].double()
        log_beta = -torch.log1p(torch.exp(-logit))[0].T
        scores.append(log_beta * (total + 1 - torch.arange(total)))
    score = torch.stack(scores)  # one budget for all heads, as these gates say
    want = torch.zeros(score.numel(), dtype=torch.bool)
    want[score.flatten().topk(8 * score[..., 0].numel()).indices] = True
    for index, heads in enumerate(want.view_as(score)):
        held = kept.positions(index)[0]
        for head, tokens in enumerate(heads):
            assert sorted(held[head][held[head] >= 0].tolist()) == tokens.nonzero()[:, 0].tolist()


def test_gates_go_to_the_published_layout_and_back(tmp_path: Path) -> None:
    stock = make("Qwen2.5-VL")
    stock.save_pretrained(tmp_path / "base")
    tensors = write_published(stock, tmp_path / "gates", "base")
    convert_gates(tmp_path / "gates", tmp_path / "ours", layout="safetensors")
    convert_gates(tmp_path / "ours", tmp_path / "again", layout="published")
    again = torch.load(tmp_path / "again" / "trimkv_weights.pth")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    text = config["text_config"]
    assert (text["retention_gate"], text["retention_gate_intermediate_size"]) == ("rg10", 32)
    assert "retention_gate" not in config
    assert (config["memory_size"], config["buffer_size"]) == (5, 2)
    assert text["rope_scaling"]["mrope_section"] == [4, 2, 2]
    ours = load_gates(tmp_path / "again").config
    assert ours.to_dict() == load_gates(tmp_path / "ours").config.to_dict()
    assert isinstance(ours, GateConfig)
