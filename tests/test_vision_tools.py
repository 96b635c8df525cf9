"""What reads images beside generate: decode_loop, measures, traces and gate training."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

import trimkv_kernels as tk
from trimkv_kernels import training
from trimkv_kernels.evaluation import compare_logits, kl, perplexity
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.inspection import draw, image_figure, kept_figure, page, text_figure, trace
from trimkv_kernels.integrations.discovery import find_parts
from trimkv_kernels.integrations.images import Prompt, token_grids
from trimkv_kernels.training import GateModel, collate, image_row
from vision import IMAGE, LONG, NAMES, VIDEO, Row, inputs, make

SMALL = {"budget": 12, "buffer": 3, "sinks": 1, "recent": 3}


@pytest.fixture(scope="module", params=NAMES)
def stock(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


@pytest.fixture
def model(stock: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(stock)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["stock"]


def text_with_images(name: str, seed: int = 0) -> Row:
    row = Row(name, seed).text(6).image().text(5)
    return (row.image() if name == "LLaVA" else row.image(LONG)).text(8)


def extended(given: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """A text that goes on with more words."""
    ones = torch.ones_like(tokens)
    more = {"input_ids": tokens, "attention_mask": ones, "mm_token_type_ids": 0 * ones.int()}
    return {
        name: torch.cat((value, more[name]), 1) if name in more else value
        for name, value in given.items()
    }


def test_a_prompt_in_pieces_is_the_prompt(stock: PreTrainedModel, name: str) -> None:
    """Embeddings, positions and the features between layers, wherever the text is cut."""
    rows = [text_with_images(name), Row(name, 1).text(2).image().text(4)]
    if name != "LLaVA":
        rows[0].video().text(2)
    given = inputs(*rows)
    parts, total = find_parts(stock), given["input_ids"].shape[1]
    prompt = Prompt.of(parts, given["input_ids"], given, given["attention_mask"])
    assert ("deepstack_visual_embeds" in prompt.arguments) == (name == "Qwen3-VL")
    with torch.no_grad():
        want = stock.model(**given, use_cache=False).last_hidden_state
        handle = tk.patch(copy.deepcopy(stock), "full", budget=total)
        cache, pieces = handle.new_cache(), []
        cache.chunked = True  # a row may begin after the first piece
        for start, stop in pairwise((0, 9, 10, 17, 19, total)):
            mask = given["attention_mask"][:, :stop]
            pieces.append(prompt.read(handle.parts, cache, start, stop, mask))
    real = given["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], want[real], atol=2e-5, rtol=2e-5)


def test_what_is_no_prompt(stock: PreTrainedModel, name: str, qwen3: Qwen3ForCausalLM) -> None:
    given = inputs(text_with_images(name))
    ids = given["input_ids"]
    with pytest.raises(ValueError, match="input_ids hold tokens of images: pass images="):
        kl(stock, ids, "random", **SMALL)
    with pytest.raises(ValueError, match="images must be arguments of .*, got .'pixels'"):
        kl(stock, ids, "random", images={**given, "pixels": ids}, **SMALL)
    with pytest.raises(ValueError, match="images must be None for a model that reads text alone"):
        kl(qwen3, ids, "random", images={"pixel_values": ids}, **SMALL)
    if "mm_token_type_ids" in given:
        less = {key: value for key, value in given.items() if key != "mm_token_type_ids"}
        with pytest.raises(ValueError, match="images must hold mm_token_type_ids"):
            kl(stock, ids, "random", images=less, **SMALL)


def drained(model: PreTrainedModel, given: Mapping[str, Tensor], **options: Any) -> Tensor:
    loop = tk.decode_loop(
        model,
        given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=10,
        eos_token_id=(),
        **options,
    )
    return torch.stack(list(loop), 1)


@pytest.mark.parametrize("chunk", [None, 7])
def test_decode_loop(
    chunk: int | None, stock: PreTrainedModel, model: PreTrainedModel, name: str
) -> None:
    """A prompt and a later turn of text, against generate from the start."""
    given = inputs(text_with_images(name), Row(name, 3).text(4).image().text(3))

    def expected(given: Mapping[str, Tensor]) -> Tensor:
        return stock.generate(**given, max_new_tokens=10, do_sample=False, eos_token_id=None)

    handle = tk.patch(model, "full", budget=110, impl="torch", prefill_chunk=chunk)
    cache = handle.new_cache()
    first = drained(model, given, images=given, past_key_values=cache)
    want = expected(given)
    assert torch.equal(first, want[:, -10:])
    turn = extended(given, torch.cat((first, torch.arange(5, 12).expand(2, -1)), 1))
    second = drained(model, turn, past_key_values=cache)
    assert torch.equal(second, expected(turn)[:, -10:])


def test_decode_loop_with_an_image_in_a_later_turn(
    stock: PreTrainedModel, model: PreTrainedModel, name: str
) -> None:
    row = Row(name).text(5).image().text(4)
    handle = tk.patch(model, "full", budget=80, impl="torch")
    cache = handle.new_cache()
    whole = inputs(Row(name).text(5).image().text(4).text(12).image().text(4))
    first = inputs(row)
    for key in set(first) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        first[key] = whole[key][: len(whole[key]) // 2]
    answer = drained(model, first, images=first, past_key_values=cache)
    start = first["input_ids"].shape[1]
    whole["input_ids"][:, start : start + 10] = answer
    got = drained(model, whole, images=whole, past_key_values=cache)
    want = stock.generate(**whole, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(got, want[:, -10:])
    more = extended(whole, got)
    more["input_ids"][:, -1] = IMAGE
    with pytest.raises(ValueError, match="input_ids hold tokens of images: pass images="):
        drained(model, more, past_key_values=cache)


def test_conversations_do_not_move_each_others_positions(
    stock: PreTrainedModel, model: PreTrainedModel, name: str
) -> None:
    """Turn about on one model, one of them without images; rows of a copy keep their own."""
    handle = tk.patch(model, "full", budget=110, impl="torch")
    talks = [inputs(Row(name).text(9)), inputs(text_with_images(name), Row(name, 3).text(28))]
    caches = [handle.new_cache() for _ in talks]
    answers = []
    for given, cache in zip(talks, caches, strict=True):
        images = given if "pixel_values" in given else None
        answers.append(drained(model, given, images=images, past_key_values=cache))
    for given, cache, first in zip(talks, caches, answers, strict=True):
        more = torch.arange(5, 9).expand(len(first), -1)
        turn = extended(given, torch.cat((first, more), 1))
        want = stock.generate(**turn, max_new_tokens=10, do_sample=False, eos_token_id=None)
        forked = cache.fork(2)
        assert torch.equal(drained(model, turn, past_key_values=cache), want[:, -10:])
        twice = {key: turn[key].repeat_interleave(2, 0) for key in ("input_ids", "attention_mask")}
        got = drained(model, twice, past_key_values=forked)
        assert torch.equal(got, want[:, -10:].repeat_interleave(2, 0))


def test_measures(stock: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    """Against the stock model's logits, and those of the same calls by hand."""
    given = inputs(text_with_images(name))
    ids, total = given["input_ids"], given["input_ids"].shape[1]
    found = kl(model, ids, "key_norm", images=given, chunk=2, **SMALL)
    read = perplexity(model, ids, "key_norm", images=given, chunk=2, **SMALL)
    prompt = Prompt.of(find_parts(stock), ids, given, given["attention_mask"])
    with torch.no_grad():
        full = stock(**given, use_cache=False).logits[0, :-1]
        handle = tk.patch(model, "key_norm", **SMALL)
        cache = handle.new_cache()
        hidden = [
            prompt.read(handle.parts, cache, start, min(start + 2, total - 1))
            for start in range(0, total - 1, 2)
        ]
        bounded = stock.lm_head(torch.cat(hidden, 1)[0])
    divergence, _ = compare_logits(full, bounded)
    assert found.bounded_tokens == total - 1 - 16
    assert found.kl == pytest.approx(divergence[16:].mean().item(), rel=1e-4)
    assert divergence[:16].max() < 1e-9
    assert found.kl > 1e-3
    loss = torch.nn.functional.cross_entropy(bounded.double(), ids[0, 1:], reduction="none")
    assert read.loss == pytest.approx(loss.mean().item(), rel=1e-5)
    assert read.bounded_loss == pytest.approx(loss[16:].mean().item(), rel=1e-5)
    assert found.bounded_loss == pytest.approx(read.bounded_loss, rel=1e-6)
    with pytest.raises(ValueError, match="beside_text=True counts the text of a prompt"):
        kl(make(name), ids, "key_norm", images=given, beside_text=True, **SMALL)


def test_a_trace_marks_images(model: PreTrainedModel, name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = inputs(text_with_images(name))
    ids = given["input_ids"]
    total = ids.shape[1]
    traced = trace(model, ids, "key_norm", images=given, prompt_length=9, protect="text", budget=28)
    assert traced.is_image.tolist() == [token == IMAGE for token in ids[0].tolist()]
    assert traced.grids == ((2, 2), (2, 2) if name == "LLaVA" else (4, 2))
    assert traced.kept(total - 1)[:, :, ~traced.is_image].all()
    traced = trace(model, ids, "streaming_llm", images=given, **SMALL)
    words = [f"w{token} " for token in ids[0].tolist()]
    written = draw(traced, words, tmp_path)
    assert [path.name for path in written] == ["kept.png", "text.png", "image.png", "inspect.html"]
    share = traced.kept(total - 1).float().mean((0, 1))[traced.is_image]
    figure = image_figure(traced, pictures=[torch.rand(4, 4, 3).numpy()] * 2)
    shown = [axes.images[0].get_array() for axes in figure.axes[2:4]]
    assert torch.cat([torch.tensor(x.tolist()).flatten() for x in shown]).tolist() == share.tolist()
    lines = [line for axes in kept_figure(traced).axes for line in axes.lines]
    assert [line.get_xdata().tolist() for line in lines[:2]] == [
        [start - 0.5, stop - 0.5] for start, stop in ((7, 11), (18, 18 + len(share) - 4))
    ]
    colours = {line.get_color() for axes in text_figure(traced, words).axes for line in axes.lines}
    assert "#e69f00" in colours
    assert '"isImage": [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0' in page(traced, words)
    with pytest.raises(ValueError, match="pictures must have one entry for each of 2 images"):
        image_figure(traced, pictures=[share])


def test_pictures_without_images(model: PreTrainedModel, name: str) -> None:
    text = trace(model, inputs(Row(name).text(30))["input_ids"], "streaming_llm", **SMALL)
    assert text.grids == ()
    assert not text.is_image.any()
    with pytest.raises(ValueError, match="the trace must know rows and columns of its images"):
        image_figure(text)


def test_grids_of_images_and_frames_in_the_order_of_the_text() -> None:
    row = Row("Qwen2.5-VL").image(LONG).text(2).video().text(1).image()
    given = inputs(row)
    parts = find_parts(make("Qwen2.5-VL"))
    grids = token_grids(parts, given["input_ids"][0], given)
    assert grids == ((4, 2), (2, 2), (2, 2), (2, 2))
    assert token_grids(parts, given["input_ids"][0], {}) == ()
    assert VIDEO in row.ids


def gates(bias: float) -> RetentionGates:
    torch.manual_seed(0)
    config = GateConfig(
        kind="rg",
        hidden_size=64,
        intermediate_size=8,
        num_layers=2,
        num_kv_heads=2,
        bias_init=bias,
    )
    return RetentionGates(config)


def rows_of(name: str) -> list[dict[str, Tensor]]:
    texts = [text_with_images(name), Row(name, 4).text(15), Row(name, 3).text(3).image().text(9)]
    return [image_row(inputs(text)) for text in texts]


def test_teacher_and_student(stock: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    """Gates that forget nothing make the student the stock model, in a batch of unequal rows."""
    rows = rows_of(name)
    batch = collate(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    student = GateModel(model, gates(100.0), budget=4, base_loss="fwkl_ntp")
    with student.attached():
        together = student(**batch)
    assert together["fwkl"].abs() < 1e-6
    losses, counts = [], []
    for row in rows:
        ids = row["input_ids"]
        tokens = ("input_ids", "mm_token_type_ids")
        given = {key: value[None] if key in tokens else value for key, value in row.items()}
        mask = torch.ones_like(ids)[None]
        with torch.no_grad():
            logits = stock(**given, attention_mask=mask, use_cache=False).logits[0, :-1].double()
        counted = ids[1:] != IMAGE
        losses.append(torch.nn.functional.cross_entropy(logits[counted], ids[1:][counted]))
        counts.append(int(counted.sum()))
    want = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    assert together["ntp"].item() == pytest.approx(want.item(), abs=1e-5)


def test_gradients_and_padding_of_rows_with_images(model: PreTrainedModel, name: str) -> None:
    """A row in a batch trains gates as it does alone."""
    rows = [row for row in rows_of(name) if "pixel_values" in row]
    student = GateModel(model, gates(1.0), budget=4, base_loss="fwkl", capacity_weight=0.0)

    def gradient(rows: list[dict[str, Tensor]]) -> Tensor:
        with student.attached():
            loss = student(**collate(rows))["loss"]
            found = torch.autograd.grad(loss, list(student.gates.parameters()))
        return torch.cat([x.flatten() for x in found])

    tokens = [int((row["input_ids"][1:] != IMAGE).sum()) for row in rows]
    alone = [gradient([row]) * count for row, count in zip(rows, tokens, strict=True)]
    want = sum(alone) / sum(tokens)
    assert want.abs().max() > 1e-4
    torch.testing.assert_close(gradient(rows), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_packed_texts(name: str) -> None:
    """Packed documents do not see each other, with positions of any number of axes."""
    model = make(name)
    one, two = Row(name, 1).text(9).ids, Row(name, 2).text(7).ids
    (packed,) = training.pack([one, two], 16)
    student = GateModel(model, gates(2.0), budget=4, base_loss="fwkl_ntp")
    with student.attached(), torch.no_grad():
        found = student(**collate([packed]))
        alone = [student(torch.tensor([ids])) for ids in (one, two)]
    for loss in ("fwkl", "ntp"):
        want = (8 * alone[0][loss] + 6 * alone[1][loss]) / 14
        torch.testing.assert_close(found[loss], want, rtol=1e-4, atol=1e-6)


def test_a_training_run(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    policy = training.train(
        model,
        rows_of(name)[::2],
        budget=4,
        out=tmp_path,
        max_steps=2,
        intermediate_size=8,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    assert policy.gates.config.steps == 2
    given = inputs(text_with_images(name))
    handle = tk.patch(model, policy, budget=10, buffer=2)
    cache = handle.new_cache()
    model.generate(**given, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert cache.stats().evictions.min() > 0


def test_rows_of_the_models_own_processor(tmp_path: Path) -> None:
    """LLaVA's, which needs nothing that is not installed."""
    vocabulary = {f"w{i}": i for i in range(96) if i != IMAGE} | {"<image>": IMAGE}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    picture = torch.randint(0, 255, (12, 10, 3), dtype=torch.uint8).numpy()
    text = " ".join(f"w{i}" for i in range(5, 20)) + " <image> w4 w7"
    encoded = processor(text=text, images=picture, return_tensors="pt")
    row = image_row(encoded)
    assert (row["input_ids"] == IMAGE).sum() == 4
    student = GateModel(make("LLaVA"), gates(100.0), budget=4, base_loss="fwkl")
    with student.attached():
        assert student(**collate([row]))["fwkl"].abs() < 1e-6
    model = make("LLaVA")
    traced = trace(model, encoded["input_ids"], "key_norm", images=encoded, budget=12, buffer=2)
    assert traced.grids == ((2, 2),)


def test_rows_that_cannot_be_trained_on() -> None:
    given = inputs(text_with_images("Qwen3-VL"))
    two = inputs(text_with_images("Qwen3-VL"), Row("Qwen3-VL").text(3).image().text(2))
    with pytest.raises(ValueError, match=r"encoded must be one text, .* got \[2, "):
        image_row(two)
    padded = {**given, "attention_mask": given["attention_mask"].clone()}
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="encoded must not be padded"):
        image_row(padded)
    with pytest.raises(ValueError, match=r"or pixel_values and the rest of image_row\(\), got"):
        image_row({**given, "audio": given["input_ids"]})
    row = image_row(given, labels=given["input_ids"][0])
    assert row["labels"].equal(row["input_ids"])
    (packed,) = training.pack([[3, 4, 5]], 8)
    with pytest.raises(ValueError, match="cannot be put together with packed rows"):
        collate([row, packed])
    student = GateModel(make("LLaVA"), gates(2.0), budget=4)
    ids = torch.full((1, 4), 5)
    with student.attached():
        with pytest.raises(ValueError, match="position_ids must be None with images"):
            student(ids, position_ids=torch.arange(4)[None], pixel_values=ids)
        with pytest.raises(ValueError, match="input_ids hold tokens of images"):
            student(torch.full((1, 4), IMAGE))
