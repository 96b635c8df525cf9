"""Training of retention gates; needs the extra ``train`` (``pip install trimkv-kernels[train]``).

policy = training.train(model, "texts.jsonl", tokenizer=tokenizer, budget=512, out="gates")
trimkv_kernels.patch(model, policy)
"""

from trimkv_kernels.training.attention import gated_attention
from trimkv_kernels.training.capacity import capacity_loss
from trimkv_kernels.training.config import TrainingConfig
from trimkv_kernels.training.data import collate, image_row, pack, read_jsonl
from trimkv_kernels.training.losses import base_losses
from trimkv_kernels.training.student import GateModel
from trimkv_kernels.training.trainer import GateTrainer, describe_gates, train

__all__ = [
    "GateModel",
    "GateTrainer",
    "TrainingConfig",
    "base_losses",
    "capacity_loss",
    "collate",
    "describe_gates",
    "gated_attention",
    "image_row",
    "pack",
    "read_jsonl",
    "train",
]
