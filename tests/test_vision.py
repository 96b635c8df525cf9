"""Vision-language models: against the stock model, and against the masked full cache."""

import copy
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import trimkv_kernels as tk
from conftest import make_qwen3
from test_models import FAMILIES as DECODERS
from test_patch import trimkv
from trimkv_kernels.gates import GateConfig, load_gates
from trimkv_kernels.gates.checkpoint import convert_gates
from trimkv_kernels.integrations import INTEGRATIONS, compat
from trimkv_kernels.integrations.discovery import find_handle, find_parts
from trimkv_kernels.integrations.images import Prompt
from trimkv_kernels.policies import make_policy
from trimkv_kernels.testing import masked_reference
from vision import IMAGE, LONG, NAMES, VIDEO, Row, inputs, make

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
SMALL = {"budget": 14, "buffer": 4, "sinks": 2, "recent": 4}
M_ROPE = [name for name in NAMES if name != "LLaVA"]


@pytest.fixture(scope="module", params=NAMES)
def stock(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


@pytest.fixture
def model(stock: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(stock)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["stock"]


def two_images(name: str, seed: int = 0) -> Row:
    large = {} if name == "LLaVA" else {"grid": LONG}
    return Row(name, seed).text(6).image().text(5).image(**large).text(6)


def whole(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Prompt:
    """A text with its images, as the model itself puts them together."""
    return Prompt.of(find_parts(model), given["input_ids"], given, given["attention_mask"])


def in_calls(
    model: PreTrainedModel, given: Mapping[str, Tensor], calls: list[int]
) -> list[dict[str, Tensor]]:
    """What each call is given beside tokens: positions, and the images that begin in it."""
    position = whole(model, given).arguments["position_ids"]
    grid = given.get("image_grid_thw")
    ids = given["input_ids"]
    begins = [(ids[:, i] == IMAGE) & (ids[:, i - 1] != IMAGE) for i in range(1, ids.shape[1])]
    column = torch.stack(begins, 1).nonzero()[:, 1] + 1  # of each image, row by row
    sizes = [1] * len(column) if grid is None else grid.prod(1).tolist()
    pixels = given["pixel_values"].split(sizes)
    found = []
    for start, stop in pairwise(torch.tensor([0, *calls]).cumsum(0).tolist()):
        call = {"position_ids": position[..., start:stop]}
        chosen = ((column >= start) & (column < stop)).nonzero()[:, 0].tolist()
        if chosen:
            call["pixel_values"] = torch.cat([pixels[i] for i in chosen])
        if chosen and grid is not None:
            call["image_grid_thw"] = grid[chosen]
        found.append(call)
    return found


@torch.no_grad()
def run(
    model: PreTrainedModel,
    cache: Any,
    given: Mapping[str, Tensor],
    calls: list[int],
    more: list[dict[str, Tensor]],
) -> Tensor:
    """Logits, read call by call; ``more`` is of :func:`in_calls`."""
    edges = pairwise(torch.tensor([0, *calls]).cumsum(0).tolist())
    logits = [
        model(
            input_ids=given["input_ids"][:, start:stop],
            attention_mask=given["attention_mask"][:, :stop],
            past_key_values=cache,
            **call,
        ).logits
        for (start, stop), call in zip(edges, more, strict=True)
    ]
    return torch.cat(logits, 1) * given["attention_mask"][..., None]


# ---- what is found ------------------------------------------------------------------------------


def test_parts(stock: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    stock = copy.deepcopy(stock)
    stock.config._name_or_path = "someone/whole"
    parts = find_parts(stock)
    assert parts.integration.name == name
    assert (parts.generator, parts.body) == (stock, stock.model)
    assert parts.base is stock.model.language_model
    assert parts.name_or_path == "someone/whole"
    assert parts.gate_sizes() == {"num_layers": 2, "num_kv_heads": 2, "hidden_size": 64}
    assert parts.image_ids == ((IMAGE,) if name == "LLaVA" else (IMAGE, VIDEO))
    assert all(layer in list(parts.base.modules()) for layer in parts.layers)
    alone = find_parts(stock.model)  # the body without a head
    assert (alone.generator, alone.body, alone.base) == (None, stock.model, parts.base)
    before = [dict(module.__dict__) for module in model.modules()]
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with tk.patch(model, "random", budget=16) as handle:
        assert handle.shape.num_layers == 2
        assert (handle.shape.inv_freq is None) == (name != "LLaVA")
        assert find_handle(model.model) is handle
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_every_vision_family_is_here() -> None:
    found = {x.name for x in INTEGRATIONS if "ConditionalGeneration" in x.causal_model.__name__}
    assert found == set(NAMES)


# ---- a full budget ------------------------------------------------------------------------------


def test_a_full_budget_is_bit_identical(
    stock: PreTrainedModel, model: PreTrainedModel, name: str
) -> None:
    """Prompt, steps, and an image in a later turn; positions go on in three axes."""
    given = inputs(Row(name).text(4).image().text(8).image().text(9))
    total = given["input_ids"].shape[1]
    calls = [13, 1, 1, 12, 1, 1, total - 29]
    more = in_calls(stock, given, calls)
    want = run(stock, DynamicCache(config=stock.config.get_text_config()), given, calls, more)
    with tk.patch(model, "full", budget=total, impl="torch") as handle:
        cache = handle.new_cache()
        got = run(model, cache, given, calls, more)
        assert torch.equal(got, want)
        assert int(cache.slots.t) == total  # tokens, whatever their positions
        position = whole(stock, given).arguments["position_ids"]
        assert (int(position.max()) < total - 1) == (name != "LLaVA")
    with torch.no_grad():
        together = stock(**given, use_cache=False).logits
    torch.testing.assert_close(got, together, atol=2e-5, rtol=2e-5)


def test_generate_equals_stock(stock: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    given = inputs(two_images(name), Row(name, 3).text(4).image().text(3))
    expected = stock.generate(**given, **GREEDY)
    beams = stock.generate(**given, **GREEDY, num_beams=2)
    with tk.patch(model, "full", budget=64):
        assert torch.equal(model.generate(**given, **GREEDY), expected)
        assert torch.equal(model.generate(**given, **GREEDY, num_beams=2), beams)
    with tk.patch(model, "streaming_llm", **SMALL) as handle:
        cache = handle.new_cache()
        together = model.generate(**given, **GREEDY, past_key_values=cache)
        assert cache.stats().budget_reached
        assert torch.equal(together[:, : -GREEDY["max_new_tokens"]], given["input_ids"])
        for row, alone in enumerate((two_images(name), Row(name, 3).text(4).image().text(3))):
            one = inputs(alone)
            if row == 0:  # its pixels are the batch's first
                assert torch.equal(model.generate(**one, **GREEDY)[0, -12:], together[0, -12:])


def test_a_later_text_turn(stock: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    given = inputs(Row(name).text(4).image().text(3))
    more = torch.arange(5, 12)[None]

    def talk(model: PreTrainedModel, cache: Any) -> Tensor:
        first = model.generate(**given, **GREEDY, past_key_values=cache)
        ids = torch.cat((first, more), 1)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)

    want = talk(stock, DynamicCache(config=stock.config.get_text_config()))
    with tk.patch(model, "full", budget=64) as handle:
        assert torch.equal(talk(model, handle.new_cache()), want)


def test_prompts_in_chunks(stock: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    """An image can be cut where transformers encodes images before it cuts the prompt."""
    given = inputs(two_images(name), Row(name, 3).text(4).image().text(3))
    expected = stock.generate(**given, **GREEDY)
    with tk.patch(model, "full", budget=64, prefill_chunk=9):
        if not hasattr(model, "_supports_mm_encoder_outputs"):  # a version that cannot
            with pytest.raises(ValueError, match="no images came with them|do not match"):
                model.generate(**given, **GREEDY)
        else:
            assert torch.equal(model.generate(**given, **GREEDY), expected)


def test_generate_with_an_image_in_a_later_turn() -> None:
    """LLaVA alone takes one, where ``generate`` does not drop it; what it drops is refused."""
    stock = make("LLaVA")
    model = copy.deepcopy(stock)
    first = inputs(Row("LLaVA").text(5).image().text(4))
    later = inputs(Row("LLaVA", 2).text(2).image().text(3))

    def talk(model: PreTrainedModel, cache: Any) -> Tensor:
        answer = model.generate(**first, **GREEDY, past_key_values=cache)
        ids = torch.cat((answer, later["input_ids"]), 1)
        call = {"attention_mask": torch.ones_like(ids), "pixel_values": later["pixel_values"]}
        return model.generate(ids, **call, **GREEDY, past_key_values=cache)

    handle = tk.patch(model, "full", budget=80, impl="torch")
    if compat._NUMBERS_COLUMNS:
        with pytest.raises(ValueError, match=r"no images came with them.*use decode_loop"):
            talk(model, handle.new_cache())
        return
    want = talk(stock, DynamicCache(config=stock.config.get_text_config()))
    assert torch.equal(talk(model, handle.new_cache()), want)
    text = {x: y for x, y in first.items() if x != "pixel_values"}
    with pytest.raises(ValueError, match="and no images came with them: pass pixel_values"):
        model.generate(**text, **GREEDY)


@pytest.mark.parametrize("name", M_ROPE)
def test_videos(name: str) -> None:
    stock = make(name)
    model = copy.deepcopy(stock)
    given = inputs(Row(name).text(3).video().text(4).image().text(4), Row(name, 2).video().text(5))
    expected = stock.generate(**given, **GREEDY)
    with tk.patch(model, "full", budget=64):
        assert torch.equal(model.generate(**given, **GREEDY), expected)
    handle = tk.patch(model, "key_norm", **{**SMALL, "budget": 20}, protect="image")
    cache = handle.new_cache()
    alone = inputs(Row(name).text(3).video().text(4).image().text(4))
    model.generate(**alone, **GREEDY, past_key_values=cache)
    image = kept_of(alone, (IMAGE, VIDEO))
    assert len(image) == 12  # two frames and an image
    for layer in range(2):
        assert all(image <= set(head) for head in cache.positions(layer)[0].tolist())


@pytest.mark.parametrize("decoder", ["Qwen3", *DECODERS])
def test_llava_around_every_decoder(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qwen3 = type(make_qwen3().config)
    monkeypatch.setitem(DECODERS, "Qwen3", (qwen3, nn.Module, {"head_dim": 16}))
    stock = make("LLaVA", decoder)
    model = copy.deepcopy(stock)
    given = inputs(two_images("LLaVA"), Row("LLaVA", 3).text(4).image().text(3))
    expected = stock.generate(**given, **GREEDY)
    with tk.patch(model, "full", budget=64) as handle:
        assert handle.parts.integration.name == "LLaVA"
        assert torch.equal(model.generate(**given, **GREEDY), expected)


def test_embeddings_alone(stock: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    given = inputs(two_images(name))
    embeds = whole(stock, given).arguments["inputs_embeds"]
    call = {"inputs_embeds": embeds, "attention_mask": given["attention_mask"], **GREEDY}
    expected = stock.generate(**call)
    with tk.patch(model, "full", budget=64, impl="torch"):
        assert torch.equal(model.generate(**call), expected)
    with tk.patch(model, "random", budget=30, protect="text") as handle:
        cache = handle.new_cache()
        with pytest.raises(ValueError, match=r"protect= .* needs input_ids, got inputs_embeds"):
            model.generate(**call, past_key_values=cache)
        assert cache.is_empty


# ---- a small budget -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["key_norm", "streaming_llm", "snap_kv", "trimkv"])
def test_bounded_equals_the_masked_full_cache(
    policy: str, stock: PreTrainedModel, model: PreTrainedModel, name: str
) -> None:
    """Rows with different numbers of images, and an image in a later turn."""
    rows = [
        Row(name).text(9).image().text(6).image().text(8),
        Row(name, 1).image().text(3).image().text(6).image().text(12),
    ]
    given = inputs(*rows)
    total = given["input_ids"].shape[1]
    calls = [20, *[1] * 2, 9, *[1] * (total - 31)]
    chosen = trimkv(find_parts(stock).base) if policy == "trimkv" else make_policy(policy)
    cache = tk.patch(model, chosen, **SMALL, impl="torch").new_cache()
    got, want = masked_reference(
        model,
        stock,
        given["input_ids"],
        attention_mask=given["attention_mask"],
        calls=calls,
        cache=cache,
        inputs=in_calls(stock, given, calls),
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert cache.stats().evictions.min() >= 15  # in every row
    with torch.no_grad():
        full = stock(**given, use_cache=False).logits * given["attention_mask"][..., None]
    assert (got - full).abs().max() > 1e-2  # the bound shows


def test_a_row_keeps_what_it_keeps_alone(model: PreTrainedModel, name: str) -> None:
    rows = [two_images(name), Row(name, 3).text(12).image().text(7)]
    kept = []
    handle = tk.patch(model, "key_norm", **SMALL)
    given = inputs(*rows)
    cache = handle.new_cache()
    with torch.no_grad():
        model(**given, past_key_values=cache)
    alone = inputs(rows[0])
    single = handle.new_cache()
    with torch.no_grad():
        model(**alone, past_key_values=single)
    for layer in range(2):
        kept = [c.positions(layer)[0].sort(dim=-1).values for c in (cache, single)]
        assert torch.equal(*kept)


# ---- protection ---------------------------------------------------------------------------------


def kept_of(given: Mapping[str, Tensor], tokens: tuple[int, ...], inside: bool = True) -> set[int]:
    ids = given["input_ids"][0].tolist()
    return {position for position, token in enumerate(ids) if (token in tokens) == inside}


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


# ---- budgets beside the text --------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"as many text tokens, got \[.*read the rows one by one"):
        model.generate(**other, **GREEDY)
    embeds = model.get_input_embeddings()(given["input_ids"])
    with pytest.raises(ValueError, match="beside the text tokens of a prompt"), torch.no_grad():
        model(inputs_embeds=embeds)


# ---- checkpoints --------------------------------------------------------------------------------


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
    for index in range(2):  # the formula of the paper, on what entered each layer
        gate = gates.layers[index].state_dict()
        hidden = entered[index].double()
        for part in ("linear1", "linear2"):
            weight, bias = gate[f"{part}.weight"].double(), gate[f"{part}.bias"].double()
            hidden = nn.functional.silu(hidden @ weight.T + bias)
        logit = hidden @ gate["linear3.weight"].double().T + gate["bias"].double()
        log_beta = -torch.log1p(torch.exp(-logit))[0].T
        score = log_beta * (total + 1 - torch.arange(total))
        want = score.topk(8).indices.sort().values
        assert torch.equal(kept.positions(index)[0].sort().values[:, -8:].long(), want)


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


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", M_ROPE)
def test_expected_attention_needs_one_position_per_token(name: str) -> None:
    model = make(name)
    inv_freq = torch.ones(8)
    for policy in (
        "expected_attention",
        make_policy("expected_attention", inv_freq=inv_freq),
        make_policy("critical_kv", base=make_policy("expected_attention", inv_freq=inv_freq)),
    ):
        with pytest.raises(ValueError, match=r"this model takes 3 \(m-RoPE\): choose another"):
            tk.patch(model, policy, budget=16)
        assert find_handle(model) is None


def test_expected_attention_of_a_llava(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("LLaVA")
    given = inputs(two_images("LLaVA"))
    handle = tk.patch(model, "expected_attention", budget=10, buffer=2)
    cache = handle.new_cache()
    model.generate(**given, **GREEDY, past_key_values=cache)
    assert cache.stats().budget_reached


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen2-VL"])
def test_layers_are_read_as_full_attention(name: str) -> None:
    assert find_parts(make(name)).windows == [None, None]
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    with pytest.raises(TypeError, match=r"got layers with .'sliding_attention'"):
        tk.patch(make(name, **sliding), "random")
