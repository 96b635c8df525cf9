"""train gates

Every other option of TrainingConfig and of transformers' TrainingArguments can be given by its
name: --max_steps 1000 --per_device_train_batch_size 4 --bf16 --activation_checkpointing
--scope global --deepspeed zero2.json. Several processes: torchrun --nproc-per-node 8 -m
trimkv_kernels train ..., or accelerate launch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimkv_kernels.commands import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    _options.add_model(parser, required=True)
    parser.add_argument("--data", required=True, help="jsonl file of texts or of token ids")
    parser.add_argument("--budget", required=True, help="tokens that a head may hold")
    parser.add_argument("--out", required=True, help="folder for gates and checkpoints")
    _options.add_gates(parser, "folder or hub id of gates to start from")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.set_defaults(passed_on=[])  # other options come here


def run(options: argparse.Namespace) -> None:
    """Train, and save the gates."""
    from transformers import HfArgumentParser

    from trimkv_kernels.gates import load_gates
    from trimkv_kernels.loading import ModelSource
    from trimkv_kernels.training import GateTrainer, TrainingConfig
    from trimkv_kernels.training.trainer import last_checkpoint

    source = ModelSource(options.model, options.revision, options.dtype)
    if not Path(options.data).is_file():
        raise ValueError(f"data must be a jsonl file: there is no file {options.data}")
    if Path(options.out).is_file():
        raise ValueError(f"out must be a folder, got the file {options.out}")
    known = ["--output_dir", options.out, "--budget", options.budget]
    (config,) = HfArgumentParser(TrainingConfig).parse_args_into_dataclasses(
        known + options.passed_on
    )
    gates = None if options.gates is None else load_gates(options.gates)
    trainer = GateTrainer(
        source.load_model(),
        config,
        options.data,
        tokenizer=source.load_tokenizer(),
        gates=gates,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(options.out) if options.resume else None)
    trainer.save_model()
