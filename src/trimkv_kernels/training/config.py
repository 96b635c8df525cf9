"""Options of gate training, in addition to those of transformers' ``Trainer``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from trimkv_kernels.gates import GATE_KINDS
from trimkv_kernels.training.attention import ATTENTION_IMPLS
from trimkv_kernels.training.capacity import (
    NORMALIZATIONS,
    SCOPES,
    check_choice,
    check_protection,
)
from trimkv_kernels.training.losses import parse_base_loss


@dataclass
class TrainingConfig(TrainingArguments):
    """Options of a training run. All other options are those of ``TrainingArguments``.

    Defaults that differ from transformers' are those of the published training: AdamW at 2e-4, 100
    steps of warmup, then a cosine down to 1e-6.

    Args:
        budget: Tokens a head may hold (M) without capacity loss.
        sinks: First positions of a document that never fade, like protected pairs of a cache.
        recent: Positions for which a token does not fade, likewise. Both count towards the budget,
            and become the default protection of the gates.
        scope: ``"head"``: each head has its budget; ``"global"``: all of them share the sum.
        base_loss: ``"fwkl"``, ``"rvkl"``, ``"ntp"``, or several joined by ``_``; or
            ``"attention"`` alone, in a third of the time, see ``trimkv_kernels.training.local``.
        capacity_weight: Factor of the capacity loss.
        normalization: Of the capacity loss, ``"reference"`` or ``"paper"``.
        gate: Architecture; None is ``"rg"``, or, with a global scope, ``"rg10"`` with its last
            layer tied.
        intermediate_size: Width of the gate's hidden layers.
        bias_init: Initial bias of the gates; None is ``ln(context)``, with which a token lasts
            about as long as a text. If it is much larger, gradients vanish.
        context: Tokens of the longest row; None takes it from the data.
        impl: Of attention: ``"auto"``, ``"triton"``, ``"torch"`` or ``"flex"``.
        loss_chunk: Positions whose logits exist at a time.
        base_model: Name of the base model to record; None is the name that it was loaded with.
        data_name: Name of the data to record.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    budget: int = field(default=0, metadata={"help": "Tokens a head may hold."})
    sinks: int = field(default=0, metadata={"help": "First positions that never fade."})
    recent: int = field(default=0, metadata={"help": "Positions before a token fades."})
    scope: str = field(default="head", metadata={"help": "Budget per head, or global."})
    base_loss: str = field(
        default="fwkl_ntp", metadata={"help": "fwkl, rvkl, ntp, a_b, or attention."}
    )
    capacity_weight: float = field(default=1.0, metadata={"help": "Weight of the capacity loss."})
    normalization: str = field(default="reference", metadata={"help": "reference or paper."})
    gate: str | None = field(default=None, metadata={"help": "rg or rg10; by scope if not given."})
    intermediate_size: int = field(default=512, metadata={"help": "Width of the gates."})
    bias_init: float | None = field(default=None, metadata={"help": "Default: ln(context)."})
    context: int | None = field(default=None, metadata={"help": "Tokens of the longest row."})
    impl: str = field(default="auto", metadata={"help": "auto, triton, torch or flex."})
    loss_chunk: int = field(default=512, metadata={"help": "Positions per chunk of logits."})
    base_model: str | None = field(default=None, metadata={"help": "Name to record."})
    data_name: str | None = field(default=None, metadata={"help": "Name to record."})

    learning_rate: float = field(default=2e-4, metadata={"help": "Of AdamW."})
    weight_decay: float = field(default=1e-5, metadata={"help": "Of AdamW."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Learning rate schedule."}
    )
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr": 1e-6}, metadata={"help": "Options of the schedule."}
    )
    warmup_steps: float = field(default=100, metadata={"help": "Steps of linear warmup."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows per process."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are checked."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Training stops."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every gate is used in every step."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in memory."}
    )

    def __post_init__(self) -> None:
        self._check_counts()
        check_choice("scope", self.scope, SCOPES)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_choice("impl", self.impl, ATTENTION_IMPLS)
        parse_base_loss(self.base_loss)
        if self.gate is None:
            self.gate = "rg10" if self.scope == "global" else "rg"
        check_choice("gate", self.gate, GATE_KINDS)
        if self.scope == "global" and self.gate != "rg10":
            raise ValueError(
                f"scope 'global' compares heads of all layers and needs gate 'rg10', whose last "
                f"layer they share, got {self.gate!r}"
            )
        if not math.isfinite(self.capacity_weight) or self.capacity_weight < 0:
            raise ValueError(f"capacity_weight must be a number >= 0, got {self.capacity_weight}")
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub=True would push every checkpoint; push the gates when they are done: "
                "trimkv_kernels.gates.push_to_hub(policy.gates, 'owner/name')"
            )
        super().__post_init__()
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy must be 'no', got {self.eval_strategy!r}: this loss does not say "
                "how good gates are; evaluate the policy of a checkpoint on a patched model"
            )

    def _check_counts(self) -> None:
        optional = {"context": self.context}
        required = {
            "budget": self.budget,
            "intermediate_size": self.intermediate_size,
            "loss_chunk": self.loss_chunk,
        }
        for name, value in {**required, **optional}.items():
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        check_protection(self.budget, self.sinks, self.recent)
