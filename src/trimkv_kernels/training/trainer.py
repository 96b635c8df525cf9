"""Training with transformers' ``Trainer``, extended for gates."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from trimkv_kernels.files import write_files
from trimkv_kernels.gates import (
    GateConfig,
    RetentionGates,
    check_base,
    load_gates,
)
from trimkv_kernels.gates.checkpoint import gate_files
from trimkv_kernels.integrations.discovery import find_parts
from trimkv_kernels.policies.trimkv import TrimKV
from trimkv_kernels.training.config import TrainingConfig
from trimkv_kernels.training.data import check_dataset, collate, read_jsonl
from trimkv_kernels.training.student import GateModel

_INCOMPLETE = ".incomplete"
_DEFAULT_CONTEXT = 4096
_QUANTILES = (0.1, 0.5, 0.9)


def train(
    model: nn.Module,
    data: Any,
    *,
    budget: int,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gates: RetentionGates | None = None,
    resume: bool = False,
    **options: Any,
) -> TrimKV:
    """Train retention gates for a model and save them.

    Args:
        model: A supported transformers model, not patched. It is restored afterwards.
        data: A jsonl file, or a dataset of rows, see :mod:`trimkv_kernels.training.data`.
        budget: Tokens a head may hold.
        out: Folder for the gates, and for checkpoints during the training.
        tokenizer: The model's, for files of texts.
        gates: Gates to start from; None draws new ones.
        resume: Continue from the last checkpoint in ``out``, if there is one.
        options: Of :class:`TrainingConfig`.

    Returns:
        The policy with the trained gates, for ``patch``.

    Raises:
        TypeError: the model is not supported.
        ValueError: the data or an option is not valid, or the gates are of another model.
        FloatingPointError: the loss is not finite; the message names step, layer and checkpoint.
    """
    config = TrainingConfig(output_dir=str(out), budget=budget, **options)
    trainer = GateTrainer(model, config, data, tokenizer=tokenizer, gates=gates)
    trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return TrimKV.from_pretrained(out)


class GateTrainer(Trainer):
    """A ``Trainer`` whose model is a :class:`GateModel`: only gates are trained and saved.

    A checkpoint is a folder that can be loaded as gates. It gets its name when it is complete.

    Args:
        model: A supported transformers model, not patched.
        args: The options.
        data: A jsonl file, or a dataset of rows.
        tokenizer: The model's, for files of texts.
        gates: Gates to start from; None draws new ones.
        trainer_options: Of ``Trainer``, such as ``callbacks``.

    Raises:
        TypeError: the model is not supported.
        ValueError: the data is not valid, or the gates are of another model.
    """

    args: TrainingConfig

    def __init__(
        self,
        model: nn.Module,
        args: TrainingConfig,
        data: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        gates: RetentionGates | None = None,
        **trainer_options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"one process drives one GPU, and this one sees {args.n_gpu}: launch with "
                "torchrun or accelerate, or set CUDA_VISIBLE_DEVICES"
            )
        deepspeed = getattr(args, "hf_deepspeed_config", None)  # set where it is used
        if deepspeed is not None and deepspeed.is_zero3():
            raise ValueError(
                "deepspeed must be ZeRO stage 1 or 2, got stage 3, which does not work here: shard "
                "the model with fsdp and fsdp_version 2"
            )
        dataset, name = _dataset(data, tokenizer, args)
        context = check_dataset(dataset, budget=args.budget, context=args.context)
        set_seed(args.seed)
        self.gate_model = GateModel(
            model,
            _gates_for(model, args, context, args.data_name or name, gates),
            budget=args.budget,
            sinks=args.sinks,
            recent=args.recent,
            scope=args.scope,
            base_loss=args.base_loss,
            capacity_weight=args.capacity_weight,
            normalization=args.normalization,
            impl=args.impl,
            loss_chunk=args.loss_chunk,
        )
        self._staging = False
        self._sums: dict[str, Tensor] = {}
        self._latest: Mapping[str, Tensor] = {}
        trainer_options.setdefault("data_collator", collate)
        super().__init__(self.gate_model, args, train_dataset=dataset, **trainer_options)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Progress)

    @property
    def policy(self) -> TrimKV:
        """A policy with the present gates. Works in one process, or in several with DDP."""
        gates = self.gate_model.gates
        gates.config = replace(gates.config, steps=self.state.global_step or gates.config.steps)
        return TrimKV(gates)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train. The model is restored when this returns or raises.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last one.
            options: Of ``Trainer.train``.

        Raises:
            ValueError: there is no such checkpoint, or it is of other gates.
            FloatingPointError: the loss or the gates are not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no checkpoint in {self.args.output_dir} to resume from")
        if resume_from_checkpoint:
            self._resume(str(resume_from_checkpoint))
        if self.args.should_save:  # a run that was killed may have left it
            shutil.rmtree(os.path.join(str(self.args.output_dir), _INCOMPLETE), ignore_errors=True)
        with self.gate_model.attached():
            return super().train(resume_from_checkpoint or None, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of the learning rate, for an optimizer of DeepSpeed too."""
        optimizer = optimizer or self.optimizer
        if not hasattr(optimizer, "defaults"):  # DeepSpeed's; a schedule reads the rate there
            optimizer.defaults = {"lr": self.args.learning_rate}
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss of a batch. Raises ``FloatingPointError`` if it is not finite."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(self._diagnosis(outputs))
        self._latest = outputs
        for name, value in outputs.items():
            if name != "loss" and value.dim() == 0:
                self._sums.setdefault(name, torch.zeros(2, device=value.device))
                self._sums[name] += torch.stack([value.float(), torch.ones_like(value.float())])
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. With the loss, log its parts, the gates' betas and the expected occupancy."""
        if "loss" in logs and self._sums:
            logs.update(self._metrics())
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any) -> None:
        """Write a checkpoint to another folder, and rename it when all processes are done."""
        folder = self._get_output_dir(trial)
        staging = os.path.join(folder, _INCOMPLETE)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial, *args)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _discard(os.path.join(folder, name), staging)
            os.replace(os.path.join(staging, name), os.path.join(folder, name))
            self._rotate(folder, staging)
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _INCOMPLETE) if self._staging else folder

    def _rotate(self, folder: str, staging: str) -> None:
        """Delete the oldest checkpoints."""
        limit = self.args.save_total_limit
        if not limit:
            return
        steps = [p.name.removeprefix("checkpoint-") for p in Path(folder).glob("checkpoint-*")]
        for step in sorted(int(step) for step in steps if step.isdigit())[:-limit]:
            _discard(os.path.join(folder, f"checkpoint-{step}"), staging)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Write the gates, their config, and how they were trained."""
        if not self.args.should_save:
            return
        text = json.dumps(self.args.to_dict(), indent=2, sort_keys=True, default=str) + "\n"
        files = gate_files(self._finite_gates(state_dict))
        write_files(output_dir or self.args.output_dir, {**files, "training.json": text})

    def _finite_gates(self, state_dict: dict[str, Any] | None) -> RetentionGates:
        """The gates on the CPU, from a state dict gathered from all processes, or from our own."""
        config = self.policy.gates.config
        state = self.gate_model.state_dict() if state_dict is None else state_dict
        gates = RetentionGates(config)
        gates.load_state_dict(
            {
                key.removeprefix("gates."): value
                for key, value in state.items()
                if key.startswith("gates.")
            }
        )
        for layer, gate in enumerate(gates.layers):
            if not all(bool(torch.isfinite(p).all()) for p in gate.parameters()):
                raise FloatingPointError(
                    f"the gates of layer {layer} are not finite at step {self.state.global_step}, "
                    f"so they are not saved. {self._last_good()}"
                )
        return gates

    def _resume(self, checkpoint: str) -> None:
        """Load a checkpoint's gates, before any process wraps or shards them."""
        found = load_gates(checkpoint)
        mine = self.gate_model.gates.config
        for name in ("kind", "tied", "intermediate_size", "budget", "base_model"):
            if getattr(found.config, name) != getattr(mine, name):
                raise ValueError(
                    f"{checkpoint} cannot be resumed: its gates have {name} "
                    f"{getattr(found.config, name)!r}, and this run has {getattr(mine, name)!r}"
                )
        self.gate_model.gates.load_state_dict(found.state_dict())
        self.gate_model.gates.config = replace(mine, bias_init=found.config.bias_init)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: :meth:`_resume` has loaded the gates, and the model is never saved."""

    def _diagnosis(self, outputs: Mapping[str, Tensor]) -> str:
        layers = torch.isfinite(outputs["log_beta"]).all(3).all(2).all(0)
        bad = (~layers).nonzero().flatten().tolist()
        where = (
            f"the first layer with a log beta that is not finite is {bad[0]}"
            if bad
            else "all log betas are finite, so it arises after the last layer's gate"
        )
        parts = ", ".join(f"{name} {outputs[name]:.4g}" for name in ("base_loss", "capacity_loss"))
        return (
            f"the loss is not finite at step {self.state.global_step + 1} ({parts}): {where}. "
            f"{self._last_good()}"
        )

    def _last_good(self) -> str:
        last = last_checkpoint(str(self.args.output_dir))
        if last is None:
            return "No checkpoint was saved before; lower the learning rate and start again"
        return f"The last good checkpoint is {last}; lower the learning rate and resume from it"

    def _metrics(self) -> dict[str, float]:
        """Means since the last log over all processes; betas and occupancy of the latest batch."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        total = self.accelerator.reduce(sums, reduction="sum")
        metrics = {name: (total[i, 0] / total[i, 1]).item() for i, name in enumerate(names)}
        self._sums = {}
        return metrics | describe_gates(
            self._latest["log_beta"], self._latest["held"], self._latest["valid"]
        )


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step in a folder; None if there is none."""
    return get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None


def _discard(checkpoint: str, staging: str) -> None:
    """Delete a checkpoint, if it exists. A partly deleted one never has its name."""
    if os.path.isdir(checkpoint):
        old = os.path.join(staging, "old")
        os.replace(checkpoint, old)
        shutil.rmtree(old)


def describe_gates(log_beta: Tensor, held: Tensor, valid: Tensor) -> dict[str, float]:
    """Quantiles of beta and expected occupancy.

    Args:
        log_beta: ``[batch, layers, num_kv_heads, seq]`` fp32.
        held: Retention sums, likewise.
        valid: ``[batch, seq]`` bool, False for padding.

    Returns:
        ``occupancy``: tokens a head is expected to hold, averaged over heads, layers and tokens;
        for each layer ``layer_00/occupancy`` and quantiles ``layer_00/beta_p50``.
    """
    log_beta, held = (t.permute(1, 2, 0, 3)[..., valid].flatten(1) for t in (log_beta, held))
    occupancy = held.mean(1)
    metrics = {"occupancy": occupancy.mean().item()}
    beta, _ = log_beta.exp().sort(1)
    for layer, mean in enumerate(occupancy.tolist()):
        metrics[f"layer_{layer:02d}/occupancy"] = mean
        for quantile in _QUANTILES:
            # Nearest rank; torch.quantile takes 2^24 numbers at most.
            rank = round(quantile * (beta.shape[1] - 1))
            metrics[f"layer_{layer:02d}/beta_p{round(100 * quantile)}"] = beta[layer, rank].item()
    return metrics


class _Progress(ProgressCallback):
    """The progress bar, without the figures of single layers."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: value for name, value in (logs or {}).items() if "/" not in name}
        super().on_log(args, state, control, logs=shown, **kwargs)


def _dataset(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, args: TrainingConfig
) -> tuple[Any, str | None]:
    """The rows, and the name of the data."""
    if not isinstance(data, (str, Path)):
        return data, None
    context = args.context or _DEFAULT_CONTEXT

    tokenize = None if tokenizer is None else functools.partial(_tokenize, tokenizer)
    rows = read_jsonl(data, tokenize=tokenize, context=context)
    return rows, Path(data).name


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens, with an end-of-text token."""
    tokens = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _gates_for(
    model: nn.Module,
    args: TrainingConfig,
    context: int,
    data: str | None,
    gates: RetentionGates | None,
) -> RetentionGates:
    """New gates, or the gates to start from, on the model's device in float32."""
    parts = find_parts(model)
    name = args.base_model or parts.name_or_path or None
    config = GateConfig(
        kind=str(args.gate),
        intermediate_size=args.intermediate_size,
        hidden_act=parts.config.hidden_act,
        tied=args.gate == "rg10",
        shared_budget=args.scope == "global",
        bias_init=math.log(context) if args.bias_init is None else args.bias_init,
        base_model=name,
        base_revision=parts.revision,
        budget=args.budget,
        sinks=args.sinks,
        recent=args.recent,
        context=context,
        data=data,
        **parts.gate_sizes(),
    )
    if gates is not None:
        check_base(gates.config, **parts.gate_sizes())
        _check_same_base(gates.config.base_model, name)
        config = replace(
            gates.config,
            shared_budget=args.scope == "global",
            base_model=name,
            budget=args.budget,
            sinks=args.sinks,
            recent=args.recent,
            context=context,
            data=data,
        )
    made = RetentionGates(config)
    if gates is not None:
        made.load_state_dict(gates.state_dict())
    return made.to(parts.device)


def _check_same_base(named: str | None, model: str | None) -> None:
    """Compare the last parts of two names: one may be a hub id, the other a folder."""
    if named is None or model is None or Path(named).name == Path(model).name:
        return
    raise ValueError(
        f"the gates name the base model {named!r}, and the model is {model!r}: load that base, or "
        "pass base_model= if it is the same one under another name"
    )
