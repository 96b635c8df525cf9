"""Train the retention gates of SmolLM2-135M-Instruct: the recipe for any model.

    make train-smollm2 DATA=folder                    # or, with options:
    python scripts/train_smollm2_gates.py --data folder --out folder --steps 150 75

The folder holds text: ``*.txt`` files, and ``*.jsonl`` files of questions and answers (GSM8K's
``train.jsonl``). A file with "test" in its name is left out. docs/training.md says where ours come
from. Started again with the same options, it goes on from the last checkpoint in ``--out``.

A step is one row of 1,024 tokens: running text, questions with answers, or a text with facts in it
that are asked for at its end. The loss compares next-token distributions with the frozen model's at
a few hundred positions of the row. The sinks and recent positions that the cache will protect do
not fade in training either, and count towards the budget.

The model runs in bfloat16 and the gates in float32. Rows and initial weights follow from
``--seed``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from trimkv_kernels.files import write_files
from trimkv_kernels.gates import gate_card
from trimkv_kernels.gates.checkpoint import gate_files
from trimkv_kernels.loading import ModelSource
from trimkv_kernels.training import GateTrainer, TrainingConfig
from trimkv_kernels.training.trainer import last_checkpoint

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTEXT = 1024
BUDGET, BUFFER = 256, 64  # users' defaults
SINKS, RECENT = 4, 32
# How the trained gates are used: steps that a score sums over, and one budget for all heads.
LOOKAHEAD, SHARED_BUDGET = 512, True
BIAS_INIT = 6.0
WARMUP_STEPS = 10
IGNORED = -100
COUNTED = 320  # positions of a row with a loss; the head costs as much as several layers
PLAYS_WEIGHT = 0.4  # of a text of short lines beside one of prose

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """A part of the training: what it compares, and how fast it learns."""

    base_loss: str
    learning_rate: float


# First each layer's attention, which is cheap, then the model's predictions.
STAGES = (Stage("attention", 3e-3), Stage("fwkl", 1e-3))


def main() -> None:
    """Trains in two stages, and writes the gates with their card."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    source = ModelSource(args.model, dtype="bfloat16")
    model, tokenizer = source.load_model(), source.load_tokenizer()
    gates, logs = None, []
    for number, stage in enumerate(STAGES):
        steps = args.steps[number]
        if not steps:
            continue
        rows = Rows(tokenizer, args, steps, f"{args.seed}/{stage.base_loss}")
        trainer = make_trainer(stage, steps, model, rows, gates, args)
        trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
        gates = trainer.policy.gates
        logs += [
            {**entry, "stage": stage.base_loss, "error": entry[stage.base_loss]}
            for entry in trainer.state.log_history
            if stage.base_loss in entry
        ]
    gates.config = replace(
        gates.config,
        budget=BUDGET,
        buffer=BUFFER,
        lookahead=LOOKAHEAD,
        shared_budget=SHARED_BUDGET,
        steps=sum(args.steps),
    )
    folder = args.out / "gates"
    files = {**gate_files(gates), "README.md": gate_card(gates.config) + losses_table(logs)}
    write_files(folder, files)
    print(f"gates in {folder}")


def make_trainer(
    stage: Stage, steps: int, model: Any, rows: Rows, gates: Any, args: argparse.Namespace
) -> GateTrainer:
    """The trainer of a stage, which goes on from the gates of the one before."""
    config = TrainingConfig(
        output_dir=str(args.out / stage.base_loss),
        budget=args.budget,
        sinks=SINKS,
        recent=RECENT,
        base_loss=stage.base_loss,
        # over all positions: the other form charges most for the first tokens beyond the budget
        normalization="paper",
        intermediate_size=args.width,
        bias_init=BIAS_INIT,
        context=CONTEXT,
        base_model=BASE_MODEL,
        data_name=rows.described,
        seed=args.seed,
        max_steps=steps,
        learning_rate=stage.learning_rate,
        warmup_steps=min(WARMUP_STEPS, steps // 4),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 3, "min_lr_ratio": 0.02},
        logging_steps=5,
        save_steps=args.save_steps,
        save_total_limit=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    return GateTrainer(model, config, rows, gates=gates, callbacks=[Clock()])


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train the gates of SmolLM2-135M-Instruct.")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for gates and checkpoints")
    parser.add_argument("--model", default="smollm2", help="folder, or a name")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(150, 75), help="rows of the two stages"
    )
    parser.add_argument(
        "--mix", type=float, nargs=3, default=(0.57, 0.18, 0.25), help="text, maths, facts"
    )
    # Half of the smallest budget that the gates are judged with: that was the best in trials.
    parser.add_argument("--budget", type=int, default=64, help="tokens that a head may hold")
    parser.add_argument("--width", type=int, default=64, help="width of the gates")
    parser.add_argument("--save-steps", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Clock(TrainerCallback):
    """Notes the seconds of training with each log, over interruptions."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on from where an interrupted run stopped."""
        before = max((entry.get("seconds", 0) for entry in state.log_history), default=0)
        self._begin = time.monotonic() - before

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the seconds to the latest entry, and prints it."""
        entry = state.log_history[-1]
        entry["seconds"] = round(time.monotonic() - self._begin)
        shown = {name: value for name, value in entry.items() if "/" not in name}
        print(json.dumps(shown), flush=True)


def losses_table(logs: list[dict[str, Any]]) -> str:
    """How the losses went, as a table of a card: means of the steps between its rows."""
    names = ("error", "capacity_loss", "occupancy")
    lines = ["\n| loss | step | seconds | its value | capacity loss | expected tokens |"]
    lines.append("|---|---|---|---|---|---|")
    for stage in dict.fromkeys(entry["stage"] for entry in logs):
        own = [entry for entry in logs if entry["stage"] == stage]
        size = max(1, len(own) // 8)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            means = [sum(entry[name] for entry in part) / len(part) for name in names]
            lines.append(
                f"| {stage} | {part[-1]['step']} | {part[-1]['seconds']} | {means[0]:.4f} | "
                f"{means[1]:.4f} | {means[2]:.0f} |"
            )
    return "\n".join(lines) + "\n"


class Rows:
    """Training rows by number, each made when it is asked for.

    Args:
        tokenizer: The model's.
        args: ``data``, the folder of texts, and ``mix`` and ``budget``.
        count: How many rows.
        seed: Of all choices.

    Raises:
        ValueError: the folder has no texts, or no questions.
    """

    def __init__(self, tokenizer: Any, args: argparse.Namespace, count: int, seed: str) -> None:
        folder = args.data
        files = sorted(p for p in folder.glob("*") if "test" not in p.name)
        texts = {p: clean(p.read_text("utf-8")) for p in files if p.suffix == ".txt" and is_text(p)}
        questions = [p for p in files if p.suffix == ".jsonl"]
        if not texts or not questions:
            raise ValueError(
                f"data must be a folder with *.txt and *.jsonl files that have no 'test' in their "
                f"names, got {folder}"
            )
        self.described = ", ".join(p.name for p in (*texts, *questions)) + ", made facts"
        self._tokenizer, self._count, self._seed = tokenizer, count, seed
        self._mix, self._budget = args.mix, args.budget
        self._texts = list(texts.values())
        self._weights = [PLAYS_WEIGHT if is_verse(text) else 1.0 for text in self._texts]
        self._questions = [
            json.loads(line) for path in questions for line in path.read_text("utf-8").splitlines()
        ]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        rng = random.Random(f"{self._seed}/{index}")
        makers = (self._text_row, self._maths_row, self._facts_row)
        make_row: Callable[[random.Random], Row] = rng.choices(makers, self._mix)[0]
        return make_row(rng)

    def _text_row(self, rng: random.Random) -> Row:
        return self._row(self._encode(self._excerpt(rng, CONTEXT)), rng)

    def _maths_row(self, rng: random.Random) -> Row:
        """Questions with answers, as a conversation or as plain text."""
        chosen = rng.sample(self._questions, 12)
        answers = [re.sub(r"<<.*?>>", "", one["answer"]) for one in chosen]
        if rng.random() < 0.5:
            answers = [one["answer"] for one in chosen] if rng.random() < 0.5 else answers
            pairs = zip(chosen, answers, strict=True)
            text = "\n\n".join(f"Question: {one['question']}\nAnswer: {a}" for one, a in pairs)
            return self._row(self._encode(text), rng)
        messages = []
        for one, answer in zip(chosen, answers, strict=True):
            messages.append({"role": "user", "content": one["question"]})
            messages.append({"role": "assistant", "content": answer})
        return self._row(self._encode(self._chat(messages)), rng)

    def _facts_row(self, rng: random.Random) -> Row:
        """A text with facts in it, and questions about some of them, answered."""
        facts = make_facts(rng, rng.choice((1, 1, 2, 4)))
        asked = rng.sample(facts, min(2, len(facts)))
        sentences = re.split(r"(?<=[.!?]) +", self._excerpt(rng, CONTEXT - 120 - 45 * len(facts)))
        for statement, _, _ in facts:
            sentences.insert(rng.randrange(len(sentences) + 1), statement)
        first = f"Read this text and remember what it says.\n\n{' '.join(sentences)}\n\n"
        messages = []
        for number, (_, question, answer) in enumerate(asked):
            content = question if number else first + question
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer})
        tokens = self._encode(self._chat(messages))
        labels = tokens["labels"]
        counted = torch.zeros(len(labels), dtype=torch.bool)
        ids, offsets = tokens["input_ids"], tokens["offsets"]
        text, start = tokens["text"], 0
        for _, question, answer in asked:
            start = text.find(answer, text.find(question, start) + len(question))
            stop = start + len(answer)
            counted |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
            start = stop
        return self._row({"input_ids": ids}, rng, counted)

    def _row(self, tokens: dict[str, Any], rng: random.Random, counted: Any = None) -> Row:
        """Cut to the context; a loss at some positions after the first eviction could be."""
        ids = tokens["input_ids"][:CONTEXT]
        places = range(self._budget, len(ids))
        labels = torch.full_like(ids, IGNORED)
        chosen = torch.tensor(rng.sample(places, min(COUNTED, len(places))))
        labels[chosen] = ids[chosen]
        if counted is not None:
            labels[counted[:CONTEXT]] = ids[counted[:CONTEXT]]
        return {"input_ids": ids, "labels": labels}

    def _excerpt(self, rng: random.Random, tokens: int) -> str:
        """Whole paragraphs of one text, of about so many tokens."""
        text = rng.choices(self._texts, self._weights)[0]
        start = text.find("\n", rng.randrange(len(text) - 8 * tokens)) + 1
        piece = text[start : start + 8 * tokens]
        ids = self._tokenizer(piece, add_special_tokens=False)["input_ids"][:tokens]
        return str(self._tokenizer.decode(ids))

    def _chat(self, messages: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))

    def _encode(self, text: str) -> dict[str, Any]:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(found["input_ids"])
        return {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORED),
            "offsets": torch.tensor(found["offset_mapping"]),
            "text": text,
        }


def is_text(path: Path) -> bool:
    """Whether a file is long enough to take rows from."""
    return path.stat().st_size > 16 * CONTEXT


def is_verse(text: str) -> bool:
    """Whether lines are short, as in plays and poems."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(map(len, lines)) < 60 * len(lines)


def clean(text: str) -> str:
    """Undo WikiText's tokenisation; other texts have none of its marks.

    A word that it calls unknown becomes another long word of the text, the same each time.
    """
    if " @-@ " not in text:
        return text
    rng, words = random.Random(0), sorted(set(re.findall(r"\b[a-z]{6,}\b", text)))
    text = re.sub("<unk>", lambda _: rng.choice(words), text)
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, plain)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r" ([.,;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r" ('s|'t|'re|'ve|'ll|'d|n't|')\b", r"\1", text)
    text = re.sub(r"\n +", "\n", text)
    return re.sub(r"\n(= )+(.*?)( =)+ ?\n", r"\n\2\n", text)


NAMES = (
    "Alder", "Beacon", "Cobalt", "Dahlia", "Ember", "Falcon", "Garnet", "Harbor", "Indigo",
    "Juniper", "Kestrel", "Lantern", "Maple", "Nectar", "Opal", "Pebble", "Quartz", "Raven",
    "Saffron", "Thistle", "Umber", "Velvet", "Willow", "Yarrow", "Zephyr",
)  # fmt: skip
CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Nairobi", "Quebec", "Tallinn",
    "Perth", "Bogota", "Riga",
)  # fmt: skip
THINGS = (
    "key", "map", "ticket", "letter", "lamp", "camera", "violin", "ladder", "helmet", "basket",
)  # fmt: skip


def make_facts(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Statements of things nobody could guess, each with a question and its answer."""
    return [rng.choice(_FACTS)(rng, name) for name in rng.sample(NAMES, count)]


def _number(rng: random.Random, name: str) -> tuple[str, str, str]:
    number = rng.randrange(10 ** rng.choice((3, 5, 6)), 10**7)
    statement = f"One of the special numbers for {name} is: {number}."
    return statement, f"What is the special number for {name}?", f"The number is {number}."


def _code(rng: random.Random, name: str) -> tuple[str, str, str]:
    code = f"{rng.choice('ABCDEFGHJK')}{rng.randrange(100, 10000)}"
    question = f"Which code opens the door of {name}?"
    return f"The door of {name} opens with the code {code}.", question, f"The code is {code}."


def _place(rng: random.Random, name: str) -> tuple[str, str, str]:
    city, thing = rng.choice(CITIES), rng.choice(THINGS)
    question = f"In which city did {name} leave the {thing}?"
    return f"{name} left the {thing} in {city}.", question, f"{name} left it in {city}."


_FACTS = (_number, _number, _code, _place)


if __name__ == "__main__":
    main()
