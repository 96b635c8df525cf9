"""The tasks of `evaluate`: what their prompts hold, and the marks of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimkv_kernels.evaluation.tasks import AnswerTask, Case, Material, available_tasks, make_task
from trimkv_kernels.evaluation.tasks.base import read_rows
from trimkv_kernels.evaluation.tasks.gsm8k import number
from trimkv_kernels.evaluation.tasks.longproc import solves
from trimkv_kernels.evaluation.tasks.math import boxed, plain

TASKS = (
    "agreement", "common_words", "conversation", "countdown", "gsm8k", "kl", "math",
    "needle_multi_key", "needle_multi_value", "needle_single", "path_traversal", "perplexity",
    "tom_tracking", "variable_tracking",
)  # fmt: skip
MADE = (
    "needle_single", "needle_multi_key", "needle_multi_value", "variable_tracking", "common_words",
    "conversation",
)  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "How many are 1,000 and 1?", "answer": "1000+1=<<1>>\n#### 1,001"},
    "math": {"problem": "Half?", "answer": "\\dfrac{1}{2}"},
    "path_traversal": {
        "context_nl": "You can travel from A to B C by bus.",
        "question_repr": ["A", "D"],
        "answer_nl": "From A, take a bus to B C.\nFrom B C, take an airship to D.\n",
    },
    "countdown": {"nums": [2, 3, 7], "target": 35},
    "tom_tracking": {
        "story_components": "Rooms: [the hall]", "story": "Step 0: Al is in the hall.",
        "question": "Where does Al believe the pen is?",
        "answer": ['"Al\'s belief on the pen": "the hall\'s rack"'],
    },
}  # fmt: skip


class Words:
    """A tokenizer with a token for each word and space."""

    chat_template = None

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = []
        for word in text.replace("\n", " \n ").split(" "):
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return {"input_ids": ids}

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def make_cases(task: str, tmp_path: Path, length: int = 300, **options: Any) -> Any:
    data = {}
    if task in ROWS:
        data[task] = tmp_path / f"{task}.json"
        data[task].write_text(json.dumps([ROWS[task]] * 5))
    material = Material(Words(), length, samples=3, data=data, **options)
    return material, make_task(task), make_task(task).cases(material)


def test_which_tasks_there_are() -> None:
    assert available_tasks() == TASKS
    with pytest.raises(ValueError, match=r"unknown task 'needle'; known: agreement, .* Did you me"):
        make_task("needle")


@pytest.mark.parametrize("task", MADE)
def test_made_prompts_fill_the_length_and_hold_the_answer(task: str, tmp_path: Path) -> None:
    material, made, cases = make_cases(task, tmp_path)
    assert len(cases) == 3
    prompts = [material.tokenizer.decode(case.prompt) for case in cases]
    assert len(set(prompts)) == 3
    for case, prompt in zip(cases, prompts, strict=True):
        assert 0.8 * 300 < len(case.prompt) <= 300
        # the text itself would be a perfect answer; a made-up one is none
        assert made.grade(case, prompt.rsplit("?", 1)[0]) == 1
        assert made.grade(case, "nothing") == 0
    assert [case.prompt for case in make_cases(task, tmp_path)[2]] == [c.prompt for c in cases]
    other = make_cases(task, tmp_path, seed=1)[2]
    assert [case.truth for case in other] != [case.truth for case in cases]


def test_needles_lie_in_the_text_that_is_given(tmp_path: Path) -> None:
    text = "A stone lay there. Nobody saw it! " * 4
    material, _, cases = make_cases("needle_single", tmp_path, text=text)
    prompt = material.tokenizer.decode(cases[0].prompt)
    assert "Nobody saw it!" in prompt
    assert "baker" not in prompt
    with pytest.raises(ValueError, match="length must leave room for the question, which alone"):
        make_cases("needle_single", tmp_path, length=20)


@pytest.mark.parametrize(
    ("task", "marks"),
    [
        ("gsm8k", {"It is 1,001.": 1, "1001": 1, "1001 and then 5": 0, "none": 0}),
        ("math", {"so \\boxed{\\frac{1}{2}}": 1, "\\boxed{1} \\boxed{ \\frac12 }": 0, "1/2": 0}),
        (
            "path_traversal",
            {
                "From A, take a bus to B C.\nFrom B C, take an airship to D.": 1,
                "Well:\nFrom A, take a bus to B C.\nFrom B C, take a bus to D.": 0.5,
                "From B C, take an airship to D.": 0,
            },
        ),
        (
            "countdown",
            {"2 + 3 = 5\n5 * 7 = 35": 1, "9 * 9 = 81\n2+3=5\n7*5=35": 1, "5 * 7 = 35": 0},
        ),
        (
            "tom_tracking",
            {"Answer: the hall's rack.": 1, "the hall's rack": 0, "Answer: x\nAnswer: shelf": 0},
        ),
    ],
)
def test_marks_of_answers_to_data(task: str, marks: dict[str, float], tmp_path: Path) -> None:
    _, made, cases = make_cases(task, tmp_path)
    assert isinstance(made, AnswerTask)
    assert len(cases) == 3  # of five rows
    assert {answer: made.grade(cases[0], answer) for answer in marks} == marks


def test_shares_of_several_answers() -> None:
    values = make_task("needle_multi_value")
    assert values.grade(Case([], ["12", "34", "56", "78"], 1), "12, 5,6 and 99") == 0.5  # type: ignore[attr-defined]
    chain = make_task("variable_tracking")
    assert chain.grade(Case([], ["ABCDE", "QWERT"], 1), "ABCDEF, QWERT") == 0.5  # type: ignore[attr-defined]


def test_parts_of_answers() -> None:
    assert (number("1,234.50 of -3."), number("no")) == (-3.0, None)
    assert boxed("\\boxed{a{b}c} \\boxed{\\frac{1}{2}} ") == "\\frac{1}{2}"
    assert (boxed("none"), boxed("\\boxed{open")) == (None, None)
    assert plain("\\left( 3, \\text{cm}\\right).") == "(3,cm)"
    steps = [("8", "/", "2", "4"), ("4", "-", "1", "3")]
    assert solves(steps, [1, 2, 8], 3)
    assert not solves(steps, [1, 2, 8], 4)
    assert not solves(steps, [1, 8], 3)
    assert not solves(steps[:1], [1, 2, 8], 4)  # one number is left
    assert not solves([("8", "/", "0", "0")], [8, 0], 0)


def test_excerpts_are_spread_over_the_text() -> None:
    tokenizer = Words()
    text = " ".join(f"w{i}" for i in range(100))
    tokenizer(text, add_special_tokens=False)
    made = Material(tokenizer, 20, 3, text=text).excerpts()
    assert [excerpt[0] for excerpt in made] == [0, 40, 80]
    assert all(len(excerpt) == 20 for excerpt in made)
    assert len(Material(tokenizer, 100, 3, text=text).excerpts()) == 1
    with pytest.raises(ValueError, match="at least length=101 tokens, got 100"):
        Material(tokenizer, 101, 3, text=text).excerpts()
    with pytest.raises(ValueError, match="pass text_file"):
        Material(tokenizer, 10, 3).excerpts()


def test_data_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"github.com/princeton-pli/LongProc and pass data count"):
        make_task("countdown").cases(Material(Words(), 10, 1))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a"}\n\n{"question": "b"}\n')
    assert [row["question"] for row in read_rows(file)] == ["a", "b"]
    file.with_name("bad.jsonl").write_text(json.dumps({**ROWS["tom_tracking"], "answer": ["x"]}))
    with pytest.raises(ValueError, match="'tom_tracking' must have an 'answer' such as"):
        make_task("tom_tracking").cases(
            Material(Words(), 10, 1, data={"tom_tracking": file.with_name("bad.jsonl")})
        )
    with pytest.raises(ValueError, match="'gsm8k' must have 'answer', got \\['question'\\]"):
        make_task("gsm8k").cases(Material(Words(), 10, 1, data={"gsm8k": file}))
    file.write_text("3\n")
    with pytest.raises(ValueError, match="must hold JSON objects, one a line or in a list"):
        read_rows(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="data must be JSON, got .*rows.jsonl"):
        read_rows(file)
