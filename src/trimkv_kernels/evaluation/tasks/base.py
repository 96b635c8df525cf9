"""Tasks: they make cases from material, and grade each case after a reader has read it."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from trimkv_kernels.loading import read_text
from trimkv_kernels.suggestions import did_you_mean

if TYPE_CHECKING:
    from trimkv_kernels.evaluation.reader import Reader

TaskClass = TypeVar("TaskClass", bound="type[Task]")
_REGISTRY: dict[str, type[Task]] = {}


@dataclass(frozen=True)
class Material:
    """The source of cases. The same material gives the same cases.

    Attributes:
        tokenizer: The model's.
        length: Tokens of a case's prompt or text.
        samples: How many cases.
        seed: Seed of all random choices.
        text: Running text; None if no file is given.
        data: Files of questions by the name of their task.
    """

    tokenizer: Any
    length: int
    samples: int
    seed: int = 0
    text: str | None = None
    data: Mapping[str, Path] = field(default_factory=dict)

    def rng(self, task: str, case: int) -> random.Random:
        """The random generator of one case."""
        return random.Random(f"{self.seed}/{task}/{self.length}/{case}")

    def tokens(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question(self, *turns: str) -> list[int]:
        """Token ids of a conversation, which begins and ends with the user.

        A model without a chat template gets the turns one after the other.
        """
        if self.tokenizer.chat_template is None:
            return self.tokens("\n".join(turns) + "\n")
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        prompt = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokens(prompt)

    def excerpts(self) -> list[list[int]]:
        """Texts of ``length`` tokens, spread evenly over the text.

        Raises:
            ValueError: there is no text, or it is too short.
        """
        if self.text is None:
            raise ValueError("this task reads a text: pass text_file")
        tokens = self.tokens(self.text)
        if len(tokens) < self.length:
            raise ValueError(
                f"text_file must have at least length={self.length:,} tokens, got {len(tokens):,}"
            )
        step = (len(tokens) - self.length) // max(self.samples - 1, 1)
        count = self.samples if step else 1
        return [tokens[i * step : i * step + self.length] for i in range(count)]

    def rows(self, task: str, hub: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The first ``samples`` questions of a data set.

        Args:
            task: Name of the task, the key in ``data``.
            hub: Fetches the questions if ``data`` has no file for the task.

        Raises:
            ValueError: the file holds no list of JSON objects.
            OSError: it cannot be read.
        """
        path = self.data.get(task)
        rows = hub() if path is None else read_rows(path)
        return rows[: self.samples]


class Task(ABC):
    """One thing to measure.

    Attributes:
        name: Its registered name.
        unit: Of its figures.
        higher_is_better: Whether a larger figure is better.
    """

    name: ClassVar[str] = ""
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def cases(self, material: Material) -> list[Any]:
        """The cases to read.

        Raises:
            ValueError: the material is not enough for a case.
        """

    @abstractmethod
    def measure(self, cases: Sequence[Any], reader: Reader) -> list[float]:
        """One number per case or block. The figure of the cell is :meth:`figure` of their mean."""

    def figure(self, mean: float) -> float:
        """The figure to show for a mean."""
        return mean


@dataclass(frozen=True)
class Case:
    """A prompt, and what is needed to grade its answer.

    Attributes:
        prompt: Token ids.
        truth: The right answer, to compare with.
        new: Most tokens of the answer.
    """

    prompt: list[int]
    truth: Any
    new: int


class AnswerTask(Task):
    """A task whose prompts are answered greedily, and each answer gets a mark from 0 to 1."""

    @abstractmethod
    def cases(self, material: Material) -> list[Case]:
        """Prompts, with what is needed to grade the answers."""

    @abstractmethod
    def grade(self, case: Case, answer: str) -> float:
        """The mark of an answer, from 0 to 1."""

    def measure(self, cases: Sequence[Case], reader: Reader) -> list[float]:
        """The marks."""
        answers = reader.answers(cases)
        return [self.grade(case, answer) for case, answer in zip(cases, answers, strict=True)]


def register_task(name: str) -> Callable[[TaskClass], TaskClass]:
    """Class decorator: make a task available by name.

    Raises:
        ValueError: another class has this name.
    """

    def register(cls: TaskClass) -> TaskClass:
        known = _REGISTRY.setdefault(name, cls)
        if known.__qualname__ != cls.__qualname__:
            raise ValueError(f"task name {name!r} is already taken by {known.__qualname__}")
        cls.name = name
        return cls

    return register


def available_tasks() -> tuple[str, ...]:
    """Names of all tasks, sorted."""
    return tuple(sorted(_REGISTRY))


def make_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: there is none; the message lists the known tasks.
    """
    if name not in _REGISTRY:
        known = available_tasks()
        raise ValueError(
            f"unknown task {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return _REGISTRY[name]()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a ``.jsonl`` file, one a line, or of a ``.json`` file with a list.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    text = read_text(path)
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data must be JSON, got {path}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data must hold JSON objects, one a line or in a list, got {path}")
    return rows


def field_of(row: Mapping[str, Any], name: str, task: str) -> Any:
    """A field of a question.

    Raises:
        ValueError: it is missing.
    """
    if name not in row:
        raise ValueError(f"the data of task {task!r} must have {name!r}, got {sorted(row)}")
    return row[name]


def from_hub(repository: str, split: str, name: str | None = None) -> list[dict[str, Any]]:
    """A data set of the hub, loaded with the package datasets. The download is untested.

    Raises:
        ImportError: datasets is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{repository} is fetched by the package datasets: pip install datasets, or pass a "
            "local file"
        ) from error
    return [dict(row) for row in load_dataset(repository, name, split=split)]
