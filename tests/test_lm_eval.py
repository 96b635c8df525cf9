"""The adapter under lm-eval itself, on task files of our own: run by ``make test-lm-eval``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trimkv_kernels as tk
from trimkv_kernels.embedded import (
    EMBEDDED_MODEL,
    FIRST_HELD_OUT_SEED,
    embedded_model,
    make_recall_text,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="takes lm-eval, the extra eval: run by make test-lm-eval",
)
TOKENS, BUDGET, BUFFER, CHUNK = 260, 64, 8, 8
GENERATE = """
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 2, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: word, filter: [{function: remove_whitespace}, {function: take_first}]}]
doc_to_target: "{{answer}}"
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    found = []
    for seed in (0, 1):
        text = make_recall_text(TOKENS, seed=FIRST_HELD_OUT_SEED + seed)
        answers = sorted({question.answer for question in text.questions})
        found += [
            {"prompt": text.prompt(question), "answer": question.answer, "choices": answers}
            for question in text.questions
        ]
    return found


@pytest.fixture
def tasks(tmp_path: Path, questions: list[dict[str, Any]]) -> Path:
    """A folder with two task files about the same questions."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, kind in (("recall_generate", GENERATE), ("recall_choose", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path}}}\n"
            f'doc_to_text: "{{{{prompt}}}}"\n{kind}'
        )
    return tmp_path


def first_words(policy: str, questions: list[dict[str, Any]]) -> list[str]:
    """What the patched model answers first, without lm-eval."""
    model, tokenizer = embedded_model()
    words = []
    with tk.patch(model, policy, budget=BUDGET, buffer=BUFFER) as handle:
        for question in questions:
            ids = tokenizer(question["prompt"], return_tensors="pt").input_ids
            cache = handle.new_cache()
            with torch.no_grad():
                for part in ids.split(CHUNK, dim=1):
                    logits = model(part, past_key_values=cache).logits
            words.append(tokenizer.decode(logits[0, -1].argmax()).strip())
    return words


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm"])
def test_task_files(policy: str, tasks: Path, questions: list[dict[str, Any]]) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import trimkv_kernels.evaluation.lm_eval  # noqa: F401  (registers the model)

    sizes = f"budget={BUDGET},buffer={BUFFER},prefill_chunk={CHUNK}"
    found = lm_eval.simple_evaluate(
        model="trimkv",
        model_args=f"pretrained={EMBEDDED_MODEL},policy={policy},{sizes}",
        tasks=["recall_generate", "recall_choose"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    generated = found["recall_generate"]["exact_match,word"]
    words = first_words(policy, questions)
    right = [word == question["answer"] for word, question in zip(words, questions, strict=True)]
    assert generated == pytest.approx(sum(right) / len(right))
    chosen = found["recall_choose"]["acc,none"]
    if policy == "trimkv":
        assert generated == chosen == 1
    else:  # the facts are gone; by chance, one in len(choices) is chosen
        assert generated < 0.2
        assert chosen < 0.5
