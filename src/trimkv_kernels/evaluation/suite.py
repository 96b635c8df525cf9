"""``trimkv-kernels evaluate``: policies and budgets on tasks, a cell at a time.

A cell is one task at one length with one policy and budget. It is written to
``cells/<name>.json`` when it is done, and later runs skip it. A cell stores its setting. A folder
with cells of another setting is refused.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from trimkv_kernels.evaluation.contestants import (
    FULL,
    Contestant,
    is_trimkv,
    make_contestant,
    policy_group,
)
from trimkv_kernels.evaluation.perplexity import Head
from trimkv_kernels.evaluation.reader import FullCache, Reader
from trimkv_kernels.evaluation.report import write_report
from trimkv_kernels.evaluation.tasks import AnswerTask, Material, Task, make_task
from trimkv_kernels.files import read_config, to_json, write_files
from trimkv_kernels.gates.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from trimkv_kernels.gates.published import find_gates
from trimkv_kernels.loading import ModelSource, read_text
from trimkv_kernels.patching import patch
from trimkv_kernels.progress import count_off

_RESAMPLES = 2000
_Z = 1.959963984540054  # of a normal distribution, two-sided 95%


@dataclass(frozen=True)
class Cell:
    """One result.

    Attributes:
        task, length, policy, budget: Of the cell; the budget of the full cache is None.
        group: One of :data:`~trimkv_kernels.evaluation.contestants.GROUPS`.
        unit, higher_is_better: Of the figure.
        figure: The task's figure.
        low, high: Its 95% interval: Wilson's if every case is right or wrong, else by resampling
            cases.
        values: The numbers behind the figure, one per case or block.
        agreement: Mean share of each answer before it first differs from the full cache's; None
            if the task has no answers.
        answers: Token ids of the answers.
        kv_bytes: Largest size of the cache of one row, with all state of the policy.
        tokens_per_second: Tokens read and written, over all rows.
        setting: Everything that the figure depends on.
    """

    task: str
    length: int
    policy: str
    budget: int | None
    group: str
    unit: str
    higher_is_better: bool
    figure: float
    low: float
    high: float
    values: list[float]
    agreement: float | None
    answers: list[list[int]]
    kv_bytes: int
    tokens_per_second: float
    setting: dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Which cells to measure, and how.

    Attributes:
        policies, budgets, tasks, lengths: Every combination of these is a cell. A policy's name may
            be followed by how its budget is shared out: ``snap_kv+adaptive_heads``.
        samples: Cases of a cell.
        seed: Of the cases.
        buffer: Of the caches.
        chunk: Tokens of a prompt or text read at a time.
        batch: Prompts answered at once, at most.
        gates: Folder or hub id of retention gates, for TRIM-KV.
        text_file: Running text, for tasks that need one, and as haystack.
        data: Files of questions by task.
    """

    policies: Sequence[str]
    budgets: Sequence[int]
    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int = 10
    seed: int = 0
    buffer: int = 64
    chunk: int = 64
    batch: int = 4
    gates: str | Path | None = None
    text_file: str | Path | None = None
    data: Mapping[str, Path] = field(default_factory=dict)

    def contestants(self) -> list[tuple[str, int | None]]:
        """Policies with their budgets, the full cache first."""
        bounded = [policy for policy in self.policies if policy != FULL]
        return [(FULL, None), *((policy, b) for policy in bounded for b in self.budgets)]


def evaluate(
    grid: Grid, source: ModelSource, out: str | Path, *, progress: bool = False
) -> list[Cell]:
    """Measure the cells that are missing, and write a table, ``results.json`` and a plot.

    Args:
        grid: What to measure.
        source: The model.
        out: Folder for the cells and the report.
        progress: Show bars if it takes long.

    Returns:
        All cells of the grid.

    Raises:
        ValueError: a name is unknown, a policy needs more than its name, a task needs a text and
            has none, or ``out`` has cells of another setting. What can be checked without the
            model is checked before it loads.
        ImportError, OSError: a file, a model or matplotlib is missing.
    """
    out = Path(out)
    if out.is_file():
        raise ValueError(f"out must be a folder, got the file {out}")
    tasks = [make_task(name) for name in grid.tasks]
    chosen = {name: make_contestant(name, grid.gates) for name in grid.policies if name != FULL}
    text = None if grid.text_file is None else read_text(grid.text_file)
    setting = _setting(grid, source, text)
    wanted = [
        (task, length, *contestant)
        for task in tasks
        for length in grid.lengths
        for contestant in grid.contestants()
    ]
    tokenizer = source.load_tokenizer()
    run = _Run(grid, source, chosen, tokenizer, text, setting, out / "cells")
    cells = []
    for item in count_off(wanted, "cells", total=len(wanted), shown=progress):
        cells.append(run.cell(*item))
    write_report(out, cells, setting)
    return cells


class _Run:
    """The cells of one run. The model is loaded before the first measurement."""

    def __init__(
        self,
        grid: Grid,
        source: ModelSource,
        contestants: Mapping[str, Contestant],
        tokenizer: Any,
        text: str | None,
        setting: dict[str, Any],
        folder: Path,
    ) -> None:
        self._grid, self._source, self._contestants = grid, source, contestants
        self._tokenizer, self._text, self._setting = tokenizer, text, setting
        self._folder = folder
        self._model: Any = None
        self._cases: dict[tuple[str, int], list[Any]] = {}
        self._full: dict[tuple[str, int], FullCache] = {}

    def cell(self, task: Task, length: int, policy: str, budget: int | None) -> Cell:
        """A cell, from its file or measured now."""
        name = f"{task.name}-{length}-{policy}" + ("" if budget is None else f"-{budget}")
        path = self._folder / f"{name}.json"
        setting = {**self._setting, **self._policy_setting(policy)}
        full = self._full.setdefault((task.name, length), FullCache())
        found = _read_cell(path, setting)
        if found is None:
            found = self._measure(task, length, policy, budget, full, setting)
            write_files(self._folder, {path.name: to_json(asdict(found))})
        elif budget is None:
            full.answers = found.answers
        return found

    def _measure(
        self,
        task: Task,
        length: int,
        policy: str,
        budget: int | None,
        full: FullCache,
        setting: dict[str, Any],
    ) -> Cell:
        grid = self._grid
        cases = self._cases_of(task, length)
        if self._model is None:
            self._model = self._source.load_model()
            self._head = Head(self._model)
        options: dict[str, Any] = {"chunk": grid.chunk, "batch": grid.batch}
        if budget is None:
            reader = Reader(self._model, self._head, self._tokenizer, None, full, **options)
            values = task.measure(cases, reader)
        else:
            sizes: dict[str, Any] = {"budget": budget, "buffer": grid.buffer}
            sizes["prefill_chunk"] = grid.chunk
            chosen = self._contestants[policy]
            sizes["allocation"] = chosen.allocation
            with patch(self._model, chosen.policy, **sizes) as handle:
                reader = Reader(self._model, self._head, self._tokenizer, handle, full, **options)
                values = task.measure(cases, reader)
        low, high = interval(values, shares=task.unit == "share")
        return Cell(
            task=task.name,
            length=length,
            policy=policy,
            budget=budget,
            group=policy_group(policy),
            unit=task.unit,
            higher_is_better=task.higher_is_better,
            figure=task.figure(fmean(values)),
            low=task.figure(low),
            high=task.figure(high),
            values=values,
            agreement=fmean(reader.agreements()) if isinstance(task, AnswerTask) else None,
            answers=reader.spoken,
            kv_bytes=reader.kv_bytes,
            tokens_per_second=reader.tokens / max(reader.seconds, 1e-9),
            setting=setting,
        )

    def _cases_of(self, task: Task, length: int) -> list[Any]:
        key = (task.name, length)
        if key not in self._cases:
            grid = self._grid
            material = Material(
                self._tokenizer, length, grid.samples, grid.seed, self._text, grid.data
            )
            self._cases[key] = task.cases(material)
            if not self._cases[key]:
                raise ValueError(f"task {task.name!r} has no cases: samples or data are empty")
        return self._cases[key]

    def _policy_setting(self, policy: str) -> dict[str, Any]:
        """Further settings of a policy's cells: the gates."""
        if not is_trimkv(policy):
            return {}
        gates = self._grid.gates or find_gates(str(self._source.name))
        folder = Path(str(gates))
        files = [folder / name for name in (WEIGHTS_NAME, CONFIG_NAME)]
        if not all(file.is_file() for file in files):
            return {"gates": str(gates)}
        return {"gates": hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]}


def interval(values: Sequence[float], *, shares: bool = False) -> tuple[float, float]:
    """A 95% interval of the mean of a sample.

    Args:
        values: The sample.
        shares: Whether they are marks from 0 to 1.

    Returns:
        Wilson's interval if all marks are 0 or 1, else percentiles of the means of resampled
        values. The resampling is the same each time.
    """
    count, mean = len(values), fmean(values)
    if shares and set(values) <= {0.0, 1.0}:
        centre = (mean + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        half = mean * (1 - mean) / count + _Z**2 / (4 * count**2)
        reach = _Z * half**0.5 / (1 + _Z**2 / count)
        return max(0.0, centre - reach), min(1.0, centre + reach)
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=count)) for _ in range(_RESAMPLES))
    return means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]


def _setting(grid: Grid, source: ModelSource, text: str | None) -> dict[str, Any]:
    """What all cells depend on."""
    return {
        "model": "embedded" if source.model is None else str(source.model),
        "revision": source.revision,
        "dtype": source.dtype,
        "samples": grid.samples,
        "seed": grid.seed,
        "buffer": grid.buffer,
        "chunk": grid.chunk,
        "batch": grid.batch,
        "text": None if text is None else _digest(text.encode()),
        "data": {task: _digest(path.read_bytes()) for task, path in sorted(grid.data.items())},
    }


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:16]


def _cell(data: dict[str, Any]) -> Cell:
    """A cell of a file's contents. Raises ``TypeError`` or ``ValueError`` if they are not one."""
    cell = Cell(**data)
    for name, is_kind in _KINDS.items():
        if not is_kind(getattr(cell, name)):
            raise ValueError(f"{name} is {getattr(cell, name)!r}")
    return cell


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_list(value: object, of: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


_KINDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("task", "policy", "group", "unit"), _is_text),
    **dict.fromkeys(("length", "kv_bytes"), _is_integer),
    **dict.fromkeys(("figure", "low", "high", "tokens_per_second"), _is_number),
    "budget": lambda value: value is None or _is_integer(value),
    "higher_is_better": lambda value: isinstance(value, bool),
    "agreement": lambda value: value is None or _is_number(value),
    "values": lambda value: _is_list(value, _is_number),
    "answers": lambda value: _is_list(value, lambda answer: _is_list(answer, _is_integer)),
    "setting": lambda value: isinstance(value, dict),
}


def _read_cell(path: Path, setting: dict[str, Any]) -> Cell | None:
    """A cell that was measured before, or None.

    Raises:
        ValueError: it was measured with another setting, or is not a cell.
    """
    if not path.is_file():
        return None
    try:
        cell = read_config(path, _cell)
    except ValueError as error:
        raise ValueError(f"{path} is no cell ({error}): delete it, or pass another out") from error
    changed = [
        f"{name} was {cell.setting.get(name)!r} and is {setting.get(name)!r}"
        for name in sorted({*cell.setting, *setting})
        if cell.setting.get(name) != setting.get(name)
    ]
    if changed:
        raise ValueError(
            f"out has cells of another setting, {path.name}: {'; '.join(changed)}. Pass another "
            "folder, or delete the cell"
        )
    return cell
