"""Run by torchrun, see ``test_training``: gates under DeepSpeed or FSDP2, on gloo."""

import sys
from pathlib import Path
from typing import Any

import torch
import two_processes
from recall_rows import recall_rows

from trimkv_kernels import training
from trimkv_kernels.testing import embedded_model

OPTIONS: dict[str, Any] = two_processes.OPTIONS | {
    "logging_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
WAYS: dict[str, dict[str, Any]] = {
    "zero1": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 1}}},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3}}},
    "fsdp2": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "fsdp_version": 2,
            "state_dict_type": "FULL_STATE_DICT",
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
        },
    },
}


def main() -> None:
    way, out, resume = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "resume"
    torch.set_num_threads(1)
    training.train(
        embedded_model()[0], recall_rows(8), out=out, resume=resume, ddp_backend="gloo",
        **OPTIONS, **WAYS[way],
    )  # fmt: skip
    two_processes.leave()


if __name__ == "__main__":
    main()
