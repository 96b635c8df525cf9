"""Retention gates, the learned part of TRIM-KV: architectures and checkpoints."""

from trimkv_kernels.gates.checkpoint import (
    checkpoint_folder,
    convert_gates,
    download_wandb,
    gate_card,
    load_gates,
    push_to_hub,
    resolve_base_model,
    save_gates,
    save_published,
)
from trimkv_kernels.gates.modules import (
    GATE_KINDS,
    GateConfig,
    RetentionGate,
    RetentionGates,
    check_base,
)

__all__ = [
    "GATE_KINDS",
    "GateConfig",
    "RetentionGate",
    "RetentionGates",
    "check_base",
    "checkpoint_folder",
    "convert_gates",
    "download_wandb",
    "gate_card",
    "load_gates",
    "push_to_hub",
    "resolve_base_model",
    "save_gates",
    "save_published",
]
