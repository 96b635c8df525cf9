"""Who is compared: every registered policy, some in two forms, and TRIM-KV's two halves.

A contestant is a function of the budget: observation windows of 32 tokens, made for budgets of a
thousand, would be all that a budget of 16 could hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.gates.published import find_gates
from trimkv_kernels.policies import (
    Needs,
    RetentionPolicy,
    TokenView,
    available_policies,
    make_policy,
)
from trimkv_kernels.policies.h2o import H2O
from trimkv_kernels.policies.snap_kv import SnapKV
from trimkv_kernels.policies.trimkv import TrimKV

LEFT_OUT = {
    "full": "never evicts; it is the line that the others are held against",
    "loc_ret": "needs heads trained for the model; there are none for the embedded one",
    "kvzap": "needs heads trained for the model; there are none for the embedded one",
    "fast_kvzip": "needs gates trained for the model; there are none for the embedded one",
}
TRAINED = ("trimkv", "trimkv_beta_alone", "trimkv_age_alone")
_NO_GATES = "needs retention gates, and none lie beside the embedded model"


class BetaAlone(RetentionPolicy):
    """TRIM-KV without age: score = ``log_beta``, what the gate said when the token came.

    Args:
        gates: A TRIM-KV policy, whose gates are used.
    """

    name = "trimkv_beta_alone"
    needs = Needs(insert=("hidden_states",))

    def __init__(self, gates: TrimKV) -> None:
        self._gates = gates

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        slope, _ = self._gates.affine(tokens)
        return torch.zeros_like(slope), slope


class AgeAlone(RetentionPolicy):
    """TRIM-KV without the gate: one beta for all tokens, so that age decides."""

    name = "trimkv_age_alone"

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        zero = tokens.position.new_zeros(1, dtype=torch.float32)
        return zero - 1, zero


def contestants() -> dict[str, Callable[[int], RetentionPolicy]]:
    """What makes each contestant's policy for a budget, by name, in the order of the tables."""
    with_gates = shipped_gates() is not None
    makers = {
        name: _Registered(name)
        for name in available_policies()
        if name not in LEFT_OUT and (with_gates or name not in TRAINED)
    }
    makers["key_norm_large"] = _Registered("key_norm", {"keep": "large"})
    if with_gates:
        makers["trimkv_beta_alone"] = lambda budget: BetaAlone(_trimkv())
        makers["trimkv_age_alone"] = lambda budget: AgeAlone()
    return dict(sorted(makers.items(), key=lambda maker: _place(maker[0])))


def left_out() -> dict[str, str]:
    """Why some registered policies are not compared, by name."""
    if shipped_gates() is not None:
        return LEFT_OUT
    return LEFT_OUT | dict.fromkeys(TRAINED, _NO_GATES)


def shipped_gates() -> str | None:
    """The folder of the embedded model's retention gates, None where they are missing."""
    return find_gates(str(EMBEDDED_MODEL))


@dataclass(frozen=True)
class _Registered:
    """A registered policy, with the options that follow from the budget."""

    name: str
    options: dict[str, Any] | None = None

    def __call__(self, budget: int) -> RetentionPolicy:
        if self.name == TrimKV.name:
            return _trimkv()
        options = _OPTIONS[self.name](budget) if self.name in _OPTIONS else {}
        return make_policy(self.name, **options, **(self.options or {}))


def _trimkv() -> TrimKV:
    folder = shipped_gates()
    if folder is None:
        raise ValueError(f"policy 'trimkv' {_NO_GATES}: train them first")
    return TrimKV.from_pretrained(folder)


def _window(budget: int) -> int:
    return min(32, budget // 2)


_OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "critical_kv": lambda budget: {"base": SnapKV(window=_window(budget))},
    "lag_kv": lambda budget: {"partition": min(16, budget // 8)},
    "pyramid_kv": lambda budget: {"window": _window(budget)},
    "snap_kv": lambda budget: {"window": _window(budget)},
    "vatp": lambda budget: {"base": H2O()},
}


def _place(name: str) -> tuple[bool, bool, str]:
    """Trained ones first, the two baselines last, by name in between."""
    return name not in TRAINED, name in ("random", "streaming_llm"), name
