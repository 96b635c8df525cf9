"""The command ``trimkv-kernels``: retention gates, and what a policy keeps and costs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from trimkv_kernels.gates.checkpoint import LAYOUTS, convert_gates

_TRAIN_HELP = """
Every other option of TrainingConfig, and so of transformers' TrainingArguments, is taken by its
name: --max_steps 1000 --per_device_train_batch_size 4 --bf16 --activation_checkpointing
--scope global --deepspeed zero2.json. Several processes: torchrun --nproc-per-node 8 -m
trimkv_kernels.cli train ..., or accelerate launch.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Of the command line; None takes the process's own.

    Returns:
        The exit status: 0, or 1 after an error that names what to do.
    """
    parser = argparse.ArgumentParser(prog="trimkv-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="train gates", epilog=_TRAIN_HELP))
    _add_convert(commands.add_parser("convert", help="write gates in another layout"))
    _add_inspect(commands.add_parser("inspect", help="draw what a policy keeps of a text"))
    for measure, what in (
        ("perplexity", "next-token loss of a text on a bounded cache"),
        ("kl", "divergence of a bounded cache from the full one on a text"),
    ):
        _add_measure(commands.add_parser(measure, help=what, description=what))
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "train":
            _train(options, rest)
        elif options.command == "inspect":
            _inspect(options)
        elif options.command in ("perplexity", "kl"):
            _measure(options)
        else:
            convert_gates(
                options.source, options.destination, layout=options.to, revision=options.revision
            )
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"trimkv-kernels {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--revision", help="revision of the base model on the hub")
    parser.add_argument("--dtype", default="auto", help="of the base model, such as bfloat16")
    parser.add_argument("--data", required=True, help="jsonl file of texts or of token ids")
    parser.add_argument("--budget", required=True, help="tokens that a head may hold")
    parser.add_argument("--out", required=True, help="folder for gates and checkpoints")
    parser.add_argument("--gates", help="folder or hub id of gates to go on from")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder or hub id of gates, of either layout")
    parser.add_argument("destination", help="folder to write")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write")
    parser.add_argument("--revision", help="revision of the source on the hub")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder for the pictures and the page")
    parser.add_argument("--model", help="folder or hub id; default: the one that ships with us")
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument("--dtype", default="auto", help="of the model, such as bfloat16")
    parser.add_argument("--device", default="cpu", help="of the model, such as cuda")
    parser.add_argument("--text-file", help="UTF-8 text; default: facts and a question")
    parser.add_argument("--policy", help="registered name; default: what patch() chooses")
    parser.add_argument("--gates", help="folder or hub id of gates, for trimkv")
    parser.add_argument("--budget", type=int, default=64, help="pairs kept per head")
    parser.add_argument("--buffer", type=int, default=1, help="new tokens between evictions")
    parser.add_argument("--prompt-length", type=int, default=1, help="tokens read at once, first")


def _inspect(options: argparse.Namespace) -> None:
    # Running a model takes transformers, and drawing matplotlib, which `convert` does without.
    from trimkv_kernels.inspection import inspect_text

    arguments = {name: value for name, value in vars(options).items() if name != "command"}
    for path in inspect_text(**arguments):
        print(path)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or hub id; default: the one that ships with us")
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument("--dtype", default="auto", help="of the model, such as bfloat16")
    parser.add_argument("--device", default="cpu", help="of the model, such as cuda")
    parser.add_argument("--text-file", help="UTF-8 text; default: one in the small model's words")
    parser.add_argument("--policy", help="registered name; default: what patch() chooses")
    parser.add_argument("--gates", help="folder or hub id of gates, for trimkv")
    parser.add_argument("--budget", type=int, help="pairs kept per head; default: as patch()")
    parser.add_argument("--buffer", type=int, help="new tokens between evictions; as patch()")
    parser.add_argument(
        "--chunk",
        type=int,
        default=1,
        help="tokens read at a time; the buffer's size is faster and, where it divides the budget, "
        "evicts when single tokens do (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _measure(options: argparse.Namespace) -> None:
    # Running a model takes transformers, which `convert` does without.
    from dataclasses import asdict

    from trimkv_kernels.evaluation import measure_text

    arguments = {name: value for name, value in vars(options).items() if name != "command"}
    as_json = arguments.pop("json")
    result = measure_text(options.command, **arguments)
    print(json.dumps(asdict(result)) if as_json else result)


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    # Training takes transformers and accelerate, which `convert` does without.
    from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

    from trimkv_kernels.gates import load_gates
    from trimkv_kernels.training import GateTrainer, TrainingConfig
    from trimkv_kernels.training.trainer import last_checkpoint

    known = ["--output_dir", options.out, "--budget", options.budget]
    (config,) = HfArgumentParser(TrainingConfig).parse_args_into_dataclasses(known + rest)
    where = {"revision": options.revision}
    trainer = GateTrainer(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, **where),
        config,
        options.data,
        tokenizer=AutoTokenizer.from_pretrained(options.model, **where),
        gates=None if options.gates is None else load_gates(options.gates),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(options.out) if options.resume else None)
    trainer.save_model()


if __name__ == "__main__":
    sys.exit(main())
