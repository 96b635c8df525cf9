"""The names that ``evaluate`` takes: a policy, or a policy and how its budget is shared out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimkv_kernels.policies import RetentionPolicy, make_policy
from trimkv_kernels.policies.allocation import (
    AdaptiveHeads,
    Allocation,
    GlobalTopK,
    LayerPreference,
    Uniform,
)
from trimkv_kernels.policies.gated import StaticGatePolicy
from trimkv_kernels.policies.registry import policy_class
from trimkv_kernels.policies.trimkv import TrimKV, policy_of
from trimkv_kernels.suggestions import did_you_mean

FULL = "full"
GROUPS = ("full cache", "needs nothing", "needs attention", "trained")
ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "global_top_k": GlobalTopK(),
    "adaptive_heads": AdaptiveHeads(),
    "layer_preference": LayerPreference(),
}


@dataclass(frozen=True)
class Contestant:
    """What to pass to :func:`trimkv_kernels.patch` for a name.

    Attributes:
        policy: A policy or its name.
        allocation: How the budget is shared out; None is the policy's own way.
    """

    policy: RetentionPolicy | str | None
    allocation: Allocation | None


def make_contestant(name: str, gates: str | Path | None) -> Contestant:
    """The contestant of a name, ``policy`` or ``policy+allocation``.

    Args:
        name: Such as ``"snap_kv"`` or ``"snap_kv+adaptive_heads"``.
        gates: Folder or hub id of retention gates, for TRIM-KV.

    Raises:
        ValueError: a part is unknown, or the policy needs more than its name.
    """
    policy, sign, shared = name.partition("+")
    if sign and shared not in ALLOCATIONS:
        raise ValueError(
            f"unknown allocation {shared!r} in {name!r}; known: {', '.join(ALLOCATIONS)}."
            f"{did_you_mean(shared, ALLOCATIONS)}"
        )
    allocation = ALLOCATIONS.get(shared)
    if policy == TrimKV.name:
        return Contestant(policy_of(policy, gates), allocation)
    policy_class(policy)
    try:
        make_policy(policy)
    except TypeError as error:
        raise ValueError(
            f"policy {policy!r} needs more than its name ({error}): measure it from Python, "
            "trimkv_kernels.evaluation.kl(model, ids, policy)"
        ) from error
    return Contestant(policy, allocation)


def is_trimkv(name: str) -> bool:
    """Whether the policy of a contestant's name is TRIM-KV, which depends on gates."""
    return name.partition("+")[0] == TrimKV.name


def policy_group(name: str) -> str:
    """One of :data:`GROUPS`: what a policy and its allocation need beside the keys and values."""
    if name == FULL:
        return GROUPS[0]
    policy, _, shared = name.partition("+")
    cls = policy_class(policy)
    if issubclass(cls, (TrimKV, StaticGatePolicy)):
        return GROUPS[3]
    needs = make_policy(policy).needs
    looks = needs.attention is not None or needs.query_window or needs.query_moments
    looks = looks or isinstance(ALLOCATIONS.get(shared), LayerPreference)
    return GROUPS[2] if looks else GROUPS[1]
