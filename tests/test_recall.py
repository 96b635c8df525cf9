"""The recall texts, the embedded model's tokenizer, and what the model recalls."""

import dataclasses
import json
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from trimkv_kernels.embedded import (
    EMBEDDED_MODEL,
    EOS,
    FIRST_HELD_OUT_SEED,
    NAMES,
    VALUES,
    VOCABULARY,
    RecallText,
    encode,
    make_recall_text,
    predict_answers,
    read_in_chunks,
    recall,
    stack,
)


def held_out(num_tokens: int, count: int, **options) -> list[RecallText]:
    first = FIRST_HELD_OUT_SEED + 10_000
    return [make_recall_text(num_tokens, seed=first + i, **options) for i in range(count)]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.mark.parametrize("num_tokens", [15, 16, 17, 100, 511, 2048])
@pytest.mark.parametrize("spacing", [(24, 24), (24, 90), (11, 11)])
def test_length_and_spacing(num_tokens, spacing):
    for seed in range(5):
        text = make_recall_text(num_tokens, seed=seed, spacing=spacing)
        assert len(text.words) == num_tokens
        starts = [statement.start for statement in text.statements]
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        assert all(spacing[0] <= gap <= spacing[1] for gap in gaps)
        for statement in text.statements:
            end = statement.start + len(statement.words)
            assert text.words[statement.start : end] == statement.words
            assert text.words[statement.value_position] == statement.value


def test_a_text_follows_from_its_seed():
    assert make_recall_text(512, seed=3) == make_recall_text(512, seed=3)
    assert make_recall_text(512, seed=3) != make_recall_text(512, seed=4)


def test_every_fact_is_asked_once_and_no_decoy_ever():
    for seed in range(50):
        text = make_recall_text(512, seed=seed, spacing=(24, 24))
        asked = [question.name for question in text.questions]
        facts = {s.name for s in text.statements if s.kind == "fact"}
        decoys = {s.name for s in text.statements if s.kind == "decoy"}
        assert len(asked) == len(set(asked))
        assert set(asked) == facts
        assert not facts & decoys


def test_the_last_value_counts():
    corrections = 0
    for seed in range(50):
        text = make_recall_text(512, seed=seed, spacing=(24, 24))
        answers = {question.name: question for question in text.questions}
        for index, statement in enumerate(text.statements):
            if statement.kind != "correction":
                continue
            corrections += 1
            (fact,) = (s for s in text.statements[:index] if s.name == statement.name)
            assert fact.kind == "fact"
            assert fact.value != statement.value == answers[statement.name].answer
            assert answers[statement.name].source == statement.value_position
    assert corrections > 50


def test_only_facts_use_the_word_of_a_fact():
    text = make_recall_text(2048, seed=0)
    keeps = {index + 1 for index, word in enumerate(text.words) if word == "keeps"}
    assert keeps == {statement.value_position for statement in text.statements}


def test_names_and_values_of_facts_stand_in_the_filler():
    shared_names, shared_values, facts = 0, 0, 0
    for text in held_out(512, 20, spacing=(24, 24)):
        filler = list(text.words)
        for statement in text.statements:
            end = statement.start + len(statement.words)
            filler[statement.start : end] = [""] * len(statement.words)
        facts += len(text.questions)
        shared_names += sum(question.name in filler for question in text.questions)
        shared_values += sum(question.answer in filler for question in text.questions)
    assert shared_names > 0.5 * facts
    assert shared_values > 0.5 * facts


def test_shares_and_number_of_questions():
    kinds = [s.kind for t in held_out(2048, 20, spacing=(24, 24)) for s in t.statements]
    assert kinds.count("decoy") / len(kinds) == pytest.approx(0.15, abs=0.03)
    assert kinds.count("correction") / len(kinds) == pytest.approx(0.1, abs=0.03)
    plain = make_recall_text(512, seed=0, decoy_share=0, correction_share=0)
    assert {statement.kind for statement in plain.statements} == {"fact"}
    assert len(make_recall_text(512, seed=0, num_questions=3).questions) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 14}, "num_tokens: expected at least 15, got 14"),
        ({"num_tokens": 8192, "spacing": (24, 24)}, "num_tokens: expected a text that needs at"),
        ({"spacing": (10, 20)}, r"spacing: expected .* at least 11, got \(10, 20\)"),
        ({"spacing": (30, 24)}, r"spacing: expected two ascending .*, got \(30, 24\)"),
        ({"decoy_share": 1.5}, "decoy_share: expected a share between 0 and 1, got 1.5"),
        ({"correction_share": -1.0}, "correction_share: expected a share .* got -1.0"),
        ({"decoy_share": 0.6, "correction_share": 0.6}, "expected at most 1, got 0.6"),
        ({"num_questions": 1000}, r"num_questions: expected 0 to \d+ .*, got 1000"),
        ({"num_questions": -1}, r"num_questions: expected 0 to \d+ .*, got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make_recall_text(**{"num_tokens": 512, "seed": 0, **options})


def test_one_word_is_one_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == list(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))
    text = make_recall_text(1024, seed=0)
    encoded = encode(text, tokenizer)
    ids = tokenizer(text.text)["input_ids"]
    assert ids == encoded.input_ids[: encoded.num_context].tolist()
    assert tokenizer.decode(ids) == text.text
    answers = [question.answer for question in text.questions]
    assert tokenizer.convert_ids_to_tokens(encoded.answers.tolist()) == answers


def test_tokenizer_reads_what_a_user_types(tokenizer):
    typed = tokenizer("Ada keeps amber. What does Ada keep?")["input_ids"]
    assert tokenizer.decode(typed) == "ada keeps amber . what does ada keep ?"
    assert tokenizer.tokenize("ada keeps zeppelins") == ["ada", "keeps", tokenizer.unk_token]
    ids = tokenizer(["ada keeps amber .", "ada ."], padding=True)["input_ids"]
    assert ids[1][:2] == [tokenizer.pad_token_id] * 2
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "ada ."
    assert tokenizer.eos_token == EOS


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in EMBEDDED_MODEL.iterdir()) < 8e6


def test_the_model_is_a_plain_qwen3(model, tokenizer):
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= 8192


@pytest.mark.parametrize(
    ("num_tokens", "spacing", "count", "least"),
    [
        (512, (24, 90), 8, 0.98),
        (1024, (24, 90), 8, 0.98),
        (2048, (24, 90), 4, 0.98),
        (512, (24, 24), 8, 0.97),
        (1536, (24, 24), 2, 0.97),
    ],
)
def test_recall_with_the_full_cache(model, tokenizer, num_tokens, spacing, count, least):
    texts = held_out(num_tokens, count, spacing=spacing)
    assert recall(model, tokenizer, texts, question_chunk=4096) >= least


def test_token_by_token_is_the_same(model, tokenizer):
    texts = [*held_out(200, 3), *held_out(300, 2)]
    at_once = predict_answers(model, tokenizer, texts, question_chunk=4096)
    by_token = predict_answers(model, tokenizer, texts, new_cache=DynamicCache, batch_size=2)
    assert [len(row) for row in by_token] == [len(text.questions) for text in texts]
    in_chunks = predict_answers(model, tokenizer, texts, context_chunk=7, question_chunk=5)
    for left, middle, right in zip(at_once, in_chunks, by_token, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(left, middle)


def test_chunks_are_read_on_one_cache(model):
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.inference_mode():
        expected = model(ids).logits
    logits, cache = read_in_chunks(model, ids[:, :11], 4)
    rest, _ = read_in_chunks(model, ids[:, 11:], 4, cache)
    torch.testing.assert_close(torch.cat((logits, rest), dim=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 15


def test_rows_are_filled_up_at_the_end(tokenizer):
    encoded = [encode(text, tokenizer) for text in held_out(200, 3)]
    batch = stack(encoded)
    assert batch.shape == (3, max(len(text.input_ids) for text in encoded))
    for row, text in zip(batch, encoded, strict=True):
        assert torch.equal(row[: len(text.input_ids)], text.input_ids)
        assert not row[len(text.input_ids) :].any()


def test_generate_answers_and_stops(model, tokenizer):
    (text,) = held_out(512, 1)
    for question in text.questions[:4]:
        inputs = tokenizer(text.prompt(question), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        assert answer == f"{question.answer} . {EOS}"


def test_recall_needs_the_text(model, tokenizer):
    texts = held_out(512, 5)
    others = [
        dataclasses.replace(text, words=other.words)
        for text, other in zip(texts, texts[1:] + texts[:1], strict=True)
    ]
    assert recall(model, tokenizer, others) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_chunk": 0}, "context_chunk: expected at least 1, got 0"),
        ({"question_chunk": 0}, "question_chunk: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_bad_scoring_arguments(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        recall(model, tokenizer, held_out(256, 1), **options)


def test_no_questions(model, tokenizer):
    texts = held_out(64, 1, num_questions=0)
    with pytest.raises(ValueError, match="texts: expected at least one question"):
        recall(model, tokenizer, texts)


def test_names_and_values_do_not_overlap():
    assert not set(NAMES) & set(VALUES)


def test_the_training_script_writes_the_configs_that_ship(tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "train_embedded_model.py"
    functions = runpy.run_path(str(script))
    functions["save"](functions["make_model"](), functions["make_tokenizer"](), tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        folders = (tmp_path, EMBEDDED_MODEL)
        written, shipped = (json.loads((folder / name).read_text()) for folder in folders)
        for config in (written, shipped):
            config.pop("transformers_version", None)
        assert written == shipped
    name = "tokenizer.json"
    assert (tmp_path / name).read_bytes() == (EMBEDDED_MODEL / name).read_bytes()
