"""Tensor parallelism: which of a layer's heads this process has, and which policies allow this.

transformers' own plans shard queries, keys and values by head, so each process computes the
attention of its own heads. It also has only their slots and gates, and decides about its own KV
heads. A step needs no collective beside the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trimkv_kernels.integrations.base import Integration
from trimkv_kernels.policies.base import ModelShape, RetentionPolicy, policy_name


@dataclass(frozen=True)
class LocalHeads:
    """Heads of a layer that are in this process.

    Args:
        num_heads, num_kv_heads: How many.
        kv_head_offset: How many KV heads of the layer come before the first of them.
    """

    num_heads: int
    num_kv_heads: int
    kv_head_offset: int = 0


@torch.no_grad()
def local_heads(integration: Integration, base: Any, layer: Any) -> LocalHeads:
    """The heads in this process; without tensor parallelism, all of them.

    The projections are called with a token, because only their outputs show how a plan shards them.

    Raises:
        ValueError: KV heads are distributed unevenly.
    """
    config = base.config
    whole = LocalHeads(config.num_attention_heads, config.num_key_value_heads)
    mesh = _tensor_parallel_mesh(base, layer)
    if mesh is None:
        return whole
    token = torch.zeros(1, 1, config.hidden_size, dtype=base.dtype, device=mesh.device_type)
    query, key, _ = integration.project(layer, token)
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == whole.num_kv_heads:
        return whole
    if kv_heads * mesh.size() != whole.num_kv_heads or heads * mesh.size() != whole.num_heads:
        raise ValueError(
            f"tensor parallelism must share out {whole.num_kv_heads} KV heads evenly, got "
            f"{kv_heads} in one of {mesh.size()} processes: use a number of processes that "
            "divides the KV heads"
        )
    return LocalHeads(heads, kv_heads, mesh.get_local_rank() * kv_heads)


def check_sharded(policy: RetentionPolicy, shape: ModelShape) -> None:
    """Check that a policy can decide without the heads of other processes.

    Raises:
        ValueError: the policy is not shardable, or reads attention of all heads of a layer.
    """
    stat = policy.needs.attention
    reads_all = stat is not None and stat.group == "all_heads"
    if shape.is_sharded and (reads_all or not policy.shardable):
        raise ValueError(
            f"policy {policy_name(policy)!r} needs all {shape.total_kv_heads} KV heads of a layer, "
            f"and this process has {shape.num_kv_heads}: choose another policy, or data parallelism"
        )


def _tensor_parallel_mesh(base: nn.Module, layer: nn.Module) -> DeviceMesh | None:
    if any(isinstance(module, FSDPModule) for module in base.modules()):
        return None  # only the storage is sharded; a forward has whole weights
    meshes = (p.device_mesh for p in layer.parameters() if isinstance(p, DTensor))
    mesh = next(meshes, None)
    return mesh["tp"] if mesh is not None and mesh.ndim > 1 else mesh
