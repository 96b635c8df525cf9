"""Vision-language models: against the stock model, and against the masked full cache."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import trimkv_kernels as tk
from conftest import make_qwen3
from test_models import FAMILIES as DECODERS
from test_patch import trimkv
from trimkv_kernels.integrations import INTEGRATIONS, compat
from trimkv_kernels.integrations.discovery import find_handle, find_parts
from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.testing import masked_reference
from vision import (
    GREEDY,
    IMAGE,
    NAMES,
    VIDEO,
    Row,
    in_calls,
    inputs,
    kept_of,
    make,
    run,
    two_images,
    whole,
)

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


def test_a_copy_of_a_patched_model(model: PreTrainedModel, name: str) -> None:
    given = inputs(two_images(name))
    tk.patch(model, "streaming_llm", **SMALL)
    want = model.generate(**given, **GREEDY)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**given, **GREEDY), want)


@pytest.mark.parametrize("name", ["Qwen3-VL", "LLaVA"])
def test_compiled_step(name: str) -> None:
    model = make(name)
    given = inputs(two_images(name))
    handle = tk.patch(model, "streaming_llm", **SMALL, impl="torch")
    total = given["input_ids"].shape[1]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = []
    for step in (model, compiled):
        cache = handle.new_cache()
        with torch.no_grad():
            model(**given, past_key_values=cache)
            for column in range(total, total + 6):
                output = step(
                    input_ids=torch.tensor([[column % 80 + 3]]),
                    position_ids=torch.tensor([[column]]),
                    cache_position=torch.tensor([column]),  # what transformers 5.0 would derive
                    past_key_values=cache,
                )
                logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits[6:]), torch.cat(logits[:6]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("policy", "allocation"),
    [
        ("key_norm", None),
        ("streaming_llm", None),
        ("snap_kv", None),
        ("trimkv", None),
        ("trimkv", tk.GlobalTopK(min_per_head=2)),
        ("key_norm", tk.AdaptiveHeads()),
    ],
)
def test_bounded_equals_the_masked_full_cache(
    policy: str,
    allocation: Allocation | None,
    stock: PreTrainedModel,
    model: PreTrainedModel,
    name: str,
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
    cache = tk.patch(model, chosen, **SMALL, impl="torch", allocation=allocation).new_cache()
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
    evictions = cache.stats().evictions
    assert evictions.sum(dim=(0, 2)).min() >= 15 * evictions[:, 0].numel()  # in every row
    assert allocation is not None or evictions.min() >= 15
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
