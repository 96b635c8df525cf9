"""TRIM-KV: keep what a learned gate expects to last (Bui et al., arXiv 2512.03324).

A retention gate gives each token a decay ``beta = exp(log_beta) <= 1`` per KV head. A slot of age
``t - position`` (1 for the newest) then scores::

    lookahead = 1:  log_beta * (t - position + age_offset)
    lookahead = n:  log sum_{k=1..n} beta ** (t - position + age_offset + k)

Both are affine in ``t``, so eviction needs only two numbers per slot, fixed at insertion.
The published checkpoints were run with ``age_offset=1``; ``-1`` is the paper's exponent.
With a lookahead the sum starts one step later, so ``n = 1`` in the second line differs from the
first line. ``key_norm`` adds ``log ||key||`` to either score, so that large keys last longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from trimkv_kernels.gates import GateConfig, RetentionGates, check_base, load_gates, save_gates
from trimkv_kernels.gates.modules import RetentionGate
from trimkv_kernels.kernels.prologue import LOWEST_SLOPE, Decay
from trimkv_kernels.policies.allocation import Allocation, GlobalTopK, Uniform
from trimkv_kernels.policies.base import ModelShape, Needs, RetentionPolicy, TokenView
from trimkv_kernels.policies.gated import drawn, placed
from trimkv_kernels.policies.registry import policy_class, register_policy

_MIN_KEY_NORM = 1e-12


@register_policy("trimkv")
@dataclass(frozen=True, eq=False)
class TrimKV(RetentionPolicy):
    """Learned retention (Bui et al., arXiv 2512.03324); the gate runs once per token.

    The default protection is that of the gates' training (``sinks`` and ``recent`` of their
    config), often none. The gates decide about all other pairs.
    Attention itself is plain.

    Args:
        gates: One retention gate per layer; the policy owns them, no model does.
        age_offset: Steps added to a slot's age; 1 is what published gates were run with. Gates that
            were trained with recent positions protected count ages from the end of that protection.
        lookahead: Future steps that the score sums over; None is the gates' own number, else 1.
        key_norm: Add ``log ||key||_2``, of the key after RoPE, to the score.

    Raises:
        TypeError: ``gates`` are not :class:`RetentionGates`, or a number is not an integer.
        ValueError: ``lookahead`` is below 1.
    """

    gates: RetentionGates
    age_offset: int = 1
    lookahead: int | None = None
    key_norm: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.gates, RetentionGates):
            raise TypeError(f"gates must be RetentionGates, got {type(self.gates).__name__}")
        own = self.gates.config.lookahead or 1
        lookahead = own if self.lookahead is None else self.lookahead
        _check_steps(self.age_offset, lookahead)
        object.__setattr__(self, "lookahead", lookahead)

    @property
    def sinks(self) -> int:  # type: ignore[override]
        return self.gates.config.sinks or 0

    @property
    def recent(self) -> int:  # type: ignore[override]
        return self.gates.config.recent or 0

    @property
    def allocation(self) -> Allocation:  # type: ignore[override]
        """One budget for all heads if the gates' config says so (DBTrimKV)."""
        return GlobalTopK() if self.gates.config.shared_budget else Uniform()

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(insert=("hidden_states", "key") if self.key_norm else ("hidden_states",))

    @classmethod
    def example(cls, shape: ModelShape) -> TrimKV:
        config = GateConfig(
            kind="rg",
            hidden_size=shape.hidden_size or 16,
            intermediate_size=8,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
        )
        return cls(drawn(lambda: RetentionGates(config)))

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        age_offset: int = 1,
        lookahead: int | None = None,
        key_norm: bool = False,
    ) -> TrimKV:
        """Load gates in the published layout or ours, see :func:`trimkv_kernels.gates.load_gates`.

        Raises:
            ValueError: there is no such checkpoint, or its files are not valid.
        """
        gates = load_gates(folder_or_hub_id, revision=revision)
        return cls(gates, age_offset=age_offset, lookahead=lookahead, key_norm=key_norm)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the gates as safetensors with their config, all or nothing."""
        save_gates(self.gates, folder)

    def bind(self, shape: ModelShape) -> TrimKV:
        config = self.gates.config
        check_base(
            config,
            num_layers=shape.num_layers,
            num_kv_heads=shape.total_kv_heads or shape.num_kv_heads,
            hidden_size=config.hidden_size if shape.hidden_size is None else shape.hidden_size,
        )
        first, gates = shape.kv_head_offset, self.gates
        if shape.is_sharded:
            gates = gates.for_heads(first, first + shape.num_kv_heads)
        gates = placed(gates, shape)
        return self if gates is self.gates else replace(self, gates=gates)

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            log_beta = self.gates(tokens.layer, tokens.hidden_states)
        slope, offset = retention_affine(
            log_beta, age_offset=self.age_offset - self.recent, lookahead=self.lookahead or 1
        )
        if self.key_norm:
            offset = offset + tokens.key.float().norm(dim=-1).clamp(min=_MIN_KEY_NORM).log()
        return slope, offset

    def decay(self, tokens: TokenView) -> Decay | None:
        if self.lookahead != 1 or self.key_norm:
            return None
        gate = cast(RetentionGate, self.gates.layers[tokens.layer])
        with torch.no_grad():
            logit = gate.logits(tokens.hidden_states)[:, 0]
        return Decay(logit, gate.bias.detach(), self.age_offset - self.recent)


def policy_of(
    policy: RetentionPolicy | str | None, gates: str | Path | None
) -> RetentionPolicy | str | None:
    """What to pass to :func:`trimkv_kernels.patch` for a policy, if one is named, and gates.

    Args:
        policy: A policy, a registered name or None.
        gates: Folder or hub id of retention gates, or None.

    Raises:
        ValueError: ``policy`` is no registered name, ``gates`` are for a policy other than TRIM-KV,
            or they cannot be read.
    """
    if isinstance(policy, str):
        policy_class(policy)
    if gates is None:
        return policy
    if policy not in (None, TrimKV.name):
        raise ValueError(f"gates are for policy {TrimKV.name!r}, got policy {policy!r}")
    return TrimKV.from_pretrained(gates)


def retention_affine(
    log_beta: Tensor, *, age_offset: int = 1, lookahead: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn decay rates into slopes and offsets: score = ``slope * (t - position) + offset``.

    Args:
        log_beta: Any shape, any float dtype, natural log, ``<= 0``.
        age_offset: Steps added to a slot's age ``t - position``.
        lookahead: Future steps summed over; 1 scores the current one only.

    Returns:
        ``slope`` and ``offset``, float32, shaped like ``log_beta``; finite unless it is NaN.

    Raises:
        TypeError: ``age_offset`` or ``lookahead`` is not an integer.
        ValueError: ``lookahead`` is below 1.
    """
    _check_steps(age_offset, lookahead)
    slope = log_beta.float().clamp(min=LOWEST_SLOPE)
    if lookahead == 1:
        return slope, slope * age_offset
    return slope, slope * (age_offset + 1) + _log_geometric_sum(slope, lookahead)


def _check_steps(age_offset: int, lookahead: int) -> None:
    for name, value in (("age_offset", age_offset), ("lookahead", lookahead)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if lookahead < 1:
        raise ValueError(f"lookahead must be >= 1 (future steps summed over), got {lookahead}")


def _log_geometric_sum(log_beta: Tensor, terms: int) -> Tensor:
    """Return ``log(1 + beta + ... + beta ** (terms - 1))``, which is ``log(terms)`` at beta = 1.

    The quotient of the two ``expm1`` is well conditioned for every ``log_beta <= 0``; a difference
    of two ``log1mexp`` would cancel as ``log_beta`` nears 0, and be ``-inf + inf`` there.
    """
    beta_minus_one = torch.expm1(log_beta)
    quotient = torch.expm1(log_beta * terms) / beta_minus_one
    return torch.log(torch.where(beta_minus_one < 0, quotient, float(terms)))
