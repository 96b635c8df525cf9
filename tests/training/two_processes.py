"""Run by torchrun, see ``test_two_processes``: train under DDP, then one step under FSDP."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recall_rows import recall_rows
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trimkv_kernels import training
from trimkv_kernels.gates import GateConfig, RetentionGates
from trimkv_kernels.testing import embedded_model
from trimkv_kernels.training import GateModel

OPTIONS: dict[str, Any] = {
    "budget": 4,
    "max_steps": 3,
    "save_steps": 2,
    "logging_steps": 3,
    "intermediate_size": 16,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "use_cpu": True,
    "disable_tqdm": True,
    "bias_init": 3.0,
}


def fsdp_step(out: Path) -> None:
    """Loss and gradients of a model whose layers, gates included, lie on two processes."""
    torch.manual_seed(0)
    config = GateConfig(
        kind="rg10", tied=True, hidden_size=128, intermediate_size=16, num_layers=2, num_kv_heads=2,
        bias_init=3.0,
    )  # fmt: skip
    model = GateModel(embedded_model()[0], RetentionGates(config), budget=4, scope="global")
    mesh = init_device_mesh("cpu", (2,))
    with model.attached():
        for layer in model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.gradient_checkpointing_enable()
        model.train()
        loss = model(recall_rows(1)[0]["input_ids"][None])["loss"]
        loss.backward()
        grads = {
            name: parameter.grad.full_tensor() for name, parameter in model.gates.named_parameters()
        }
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        saved = {"loss": loss.detach(), "grads": grads, "keys": sorted(state)}
        torch.save(saved, out / "fsdp.pt")


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    policy = training.train(
        embedded_model()[0], recall_rows(8), out=out, ddp_backend="gloo", **OPTIONS
    )
    torch.save(policy.gates.state_dict(), out / f"rank{dist.get_rank()}.pt")
    fsdp_step(out)
    leave()


def leave() -> None:
    """End the process without Python's own exit, in which a thread of gloo sometimes aborts."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
