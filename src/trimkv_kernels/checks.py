"""Checks of the arguments of a bounded cache, shared by the cache and by ``patch``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimkv_kernels.policies.allocation import Allocation
from trimkv_kernels.policies.base import RetentionPolicy, default_protection, policy_name

Span = tuple[int, int]


def check_positive(argument: str, size: int) -> None:
    """Raise unless ``size`` is an int of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{argument} must be an int of at least 1, got {size!r}")


def check_policy(policy: object) -> None:
    """Check that ``policy`` is a policy whose parts fit together.

    Raises:
        TypeError: it is not a :class:`RetentionPolicy`.
        ValueError: its attention statistic goes into a field that cannot take it.
    """
    if not isinstance(policy, RetentionPolicy):
        raise TypeError(f"policy must be a RetentionPolicy, got {type(policy).__name__}")
    stat = policy.needs.attention
    if stat is None or stat.into is None:
        return
    spec = policy.fields.get(stat.into)
    if spec is None or spec.shape or spec.per != "kv_head" or spec.dtype != torch.float32:
        raise ValueError(
            f"policy {policy_name(policy)!r}: AttentionStat(into={stat.into!r}) must name a scalar "
            f"float32 field per KV head, got {spec}"
        )


def check_heads(
    policy: RetentionPolicy,
    num_heads: int | None,
    num_kv_heads: int,
    allocation: Allocation | None = None,
) -> None:
    if num_heads is not None and (num_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_heads}"
        )
    needs = policy.needs
    per_query_head = (
        needs.query_window > 0
        or needs.query_moments
        or (needs.attention is not None and needs.attention.group == "none")
        or any(spec.per == "query_head" for spec in policy.fields.values())
    )
    if per_query_head and num_heads is None:
        raise ValueError(
            f"policy {policy_name(policy)!r} keeps something for each query head: pass num_heads="
        )
    shares = None if allocation is None else allocation.shares
    if shares is not None and shares.preference is not None and num_heads is None:
        raise ValueError(f"allocation {allocation} keeps queries of each head: pass num_heads=")


def check_budget(
    policy: RetentionPolicy,
    budget: int,
    buffer: int,
    num_layers: int,
    num_kv_heads: int,
    allocation: Allocation | None,
) -> tuple[int, ...]:
    """The budget of each layer; if heads share one, the least that each head gets.

    Raises:
        ValueError: a size is out of range, or the allocation does not fit.
    """
    check_positive("budget", budget)
    check_positive("buffer", buffer)
    allocation = policy.allocation if allocation is None else allocation
    allocation.check(budget, num_layers, num_kv_heads)
    shares = allocation.shares
    if shares is None:
        return allocation.budgets(budget, num_layers)
    return shares.least(budget, num_layers)


def check_shared(
    policy: RetentionPolicy,
    allocation: Allocation | None,
    devices: Sequence[torch.device],
    *,
    is_sharded: bool = False,
) -> None:
    """Check that heads can share a budget, if the allocation lets them.

    Args:
        policy: Scores the slots.
        allocation: How the budget is shared out; None is the policy's own rule.
        devices: Of each layer.
        is_sharded: Other processes have some of the KV heads.

    Raises:
        ValueError: the policy needs attention mass, which slots in pages do not report, or the
            heads are on several devices or in several processes, which do not compare scores.
    """
    allocation = policy.allocation if allocation is None else allocation
    if allocation.is_fixed:
        return
    reason = None
    if policy.needs.attention is not None:
        reason = (
            f"policy {policy_name(policy)!r} needs the attention that each pair receives, which "
            "slots in pages do not report; choose a policy that scores without it"
        )
    elif is_sharded:
        reason = (
            "this process has only some of the KV heads, and scores are not compared between "
            "processes; use data parallelism"
        )
    elif len(set(devices)) > 1:
        reason = (
            f"the layers are on {', '.join(sorted(set(map(str, devices))))}, and scores are not "
            "compared between devices; put the model on one device"
        )
    if reason is not None:
        raise ValueError(
            f"allocation {allocation} lets heads share a budget, and {reason}, or pass "
            "allocation=Uniform()"
        )


def check_protection(
    policy: RetentionPolicy,
    budgets: Sequence[int],
    *,
    sinks: int | None,
    recent: int | None,
    protect: Sequence[Span],
) -> tuple[int, int, tuple[Span, ...]]:
    """Resolve ``(sinks, recent, protect)`` and check that every layer's budget exceeds them.

    Raises:
        ValueError: a size is out of range, or the protected slots fill a budget.
    """
    own_sinks, own_recent = default_protection(policy, min(budgets))
    sinks = own_sinks if sinks is None else sinks
    recent = own_recent if recent is None else recent
    for argument, size in (("sinks", sinks), ("recent", recent)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{argument} must be an int of at least 0, got {size!r}")
    spans = check_spans("protect", protect)
    check_protected(budgets, sinks, recent, spans)
    return sinks, recent, spans


def check_spans(argument: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    checked = tuple((int(start), int(stop)) for start, stop in spans)
    for start, stop in checked:
        if not 0 <= start < stop:
            raise ValueError(
                f"{argument} must hold (start, stop) with 0 <= start < stop, got {(start, stop)}"
            )
    return checked


def check_protected(budgets: Sequence[int], sinks: int, recent: int, spans: Sequence[Span]) -> None:
    pinned = len({p for span in spans for p in range(*span) if p >= sinks})
    if 0 < sinks + recent + pinned >= min(budgets):
        raise ValueError(
            f"budget must exceed the protected slots: budget={min(budgets)}, but sinks={sinks}, "
            f"recent={recent} and {pinned} positions of protect= are never evicted; "
            "raise the budget or lower the protection"
        )
