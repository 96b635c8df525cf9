"""The retention-policy protocol: how to score what a bounded cache should keep.

A policy sees tokens when they are inserted, may see the attention they receive, and scores slots
when the cache has to choose. It never sees indices or how slots move: per-slot numbers that it
declares as ``fields`` are allocated, moved, cleared, reordered and saved by the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

INSERT_NEEDS = ("hidden_states", "key", "key_nope", "value", "query", "query_nope")
SCORE_NEEDS = ("key", "value")


@dataclass(frozen=True)
class FieldSpec:
    """One per-slot number (or small tensor) that a policy keeps beside each key/value pair.

    Args:
        shape: Inner shape of one slot's entry; ``()`` is a scalar.
        dtype: Storage dtype.
        fill: Value of a slot whose ``on_insert`` did not return this field.
        per: ``"kv_head"`` or ``"query_head"``.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    per: Literal["kv_head", "query_head"] = "kv_head"


@dataclass(frozen=True)
class AttentionStat:
    """What attention must report to ``observe``, reduced over queries and the query-head group.

    Args:
        reduce: ``"sum"`` of probabilities, or ``"count_below"``: queries giving less than 1/n.
        group: Reduction over the query heads that share a KV head.
        queries: ``"all"`` or the number of last queries.
    """

    reduce: Literal["sum", "count_below"] = "sum"
    group: Literal["mean", "max", "none", "all_heads"] = "mean"
    queries: Literal["all"] | int = "all"


@dataclass(frozen=True)
class Needs:
    """What a policy must be given; it is given nothing else.

    Args:
        insert: Of ``hidden_states, key, key_nope, value, query, query_nope``, at insertion.
        score: Of ``key, value``, when slots are scored.
        attention: Attention mass per slot, for ``observe``.
        query_window: Number of last queries kept for scoring.
        query_moments: Running mean and covariance of the queries before RoPE.
        chronological: Slots are passed to ``score`` in ascending position.

    Raises:
        ValueError: ``insert`` or ``score`` names something that does not exist.
    """

    insert: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    attention: AttentionStat | None = None
    query_window: int = 0
    query_moments: bool = False
    chronological: bool = False

    def __post_init__(self) -> None:
        for argument, allowed in (("insert", INSERT_NEEDS), ("score", SCORE_NEEDS)):
            unknown = sorted(set(getattr(self, argument)) - set(allowed))
            if unknown:
                raise ValueError(
                    f"Needs({argument}=) must name some of {', '.join(allowed)}, got {unknown}"
                )


@dataclass(frozen=True)
class ModelShape:
    """What a policy may know of the model it is bound to, see :meth:`RetentionPolicy.bind`.

    Args:
        dtype, device: Of the keys and values; policies put their parameters there.
        num_heads, hidden_size: None when the cache is used without a model.
        name_or_path: Hub id or folder of the model, empty when there is none.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    num_heads: int | None = None
    hidden_size: int | None = None
    name_or_path: str = ""


@dataclass(frozen=True)
class _View:
    """What every view carries. Reading what ``Needs`` does not declare raises."""

    policy: str
    layer: int
    t: Tensor
    position: Tensor
    valid: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)

    _declared_in: ClassVar[str] = ""

    def _read(self, name: str) -> Tensor:
        if name not in self.given:
            raise AttributeError(
                f"policy {self.policy!r} reads {name!r} without declaring it: "
                f"add {name!r} to Needs({self._declared_in}=...)"
            )
        return self.given[name]


@dataclass(frozen=True)
class TokenView(_View):
    """New tokens of one layer, at insertion.

    Attributes:
        layer: Layer index.
        t: ``[batch]`` int32, real tokens each row has seen, these included.
        position: ``[batch, new]`` int32, real tokens of the row before each token.
        valid: ``[batch, new]`` bool, False for padding.
        num_kv_heads: Heads that results must have.
        hidden_states: ``[batch, new, hidden_size]``, the attention layer's input.
        query, query_nope: ``[batch, num_heads, new, head_dim]``, after and before RoPE.
        key, key_nope, value: ``[batch, num_kv_heads, new, head_dim]``.
    """

    num_kv_heads: int = 1

    _declared_in: ClassVar[str] = "insert"

    @property
    def hidden_states(self) -> Tensor:
        return self._read("hidden_states")

    @property
    def query(self) -> Tensor:
        return self._read("query")

    @property
    def query_nope(self) -> Tensor:
        return self._read("query_nope")

    @property
    def key(self) -> Tensor:
        return self._read("key")

    @property
    def key_nope(self) -> Tensor:
        return self._read("key_nope")

    @property
    def value(self) -> Tensor:
        return self._read("value")


@dataclass(frozen=True)
class SlotView(_View):
    """The filled slots of one layer, when the cache has to choose. Slot order means nothing.

    Attributes:
        layer: Layer index.
        t: ``[batch]`` int32, real tokens each row has seen.
        position: ``[batch, num_kv_heads, num_slots]`` int32.
        valid: ``[batch, num_kv_heads, num_slots]`` bool, False where a slot is empty.
        fields: Each ``[batch, num_kv_heads, num_slots, ...]``.
        key, value: ``[batch, num_kv_heads, num_slots, head_dim]``.
    """

    _declared_in: ClassVar[str] = "score"

    @property
    def key(self) -> Tensor:
        return self._read("key")

    @property
    def value(self) -> Tensor:
        return self._read("value")


@dataclass(frozen=True)
class ObservationView(_View):
    """One layer right after attention; ``fields`` are updated in place.

    Attributes:
        attention: The declared :class:`AttentionStat`, ``[batch, num_kv_heads, num_slots]`` fp32.
    """

    _declared_in: ClassVar[str] = "attention"

    @property
    def attention(self) -> Tensor:
        return self._read("attention")


class RetentionPolicy:
    """Scores slots; a higher score is kept. Subclass, set ``needs``, write ``score`` or ``affine``.

    Attributes:
        needs: What the policy must be given.
        fields: Per-slot numbers that the cache keeps for it.
        sinks: First positions that are never evicted, unless the user says otherwise.
        recent: Last positions that are never evicted; None is ``min(32, budget // 8)``.
        capacity_only: The policy never chooses; a cache that would have to evict raises.
    """

    name: ClassVar[str] = ""
    needs: Needs = Needs()
    fields: Mapping[str, FieldSpec] = {}
    sinks: int = 4
    recent: int | None = None
    capacity_only: bool = False

    def bind(self, shape: ModelShape) -> RetentionPolicy:
        """Check the policy against a model and return it ready to run there (parameters moved).

        Raises:
            ValueError: the policy does not fit the model.
        """
        return self

    @property
    def is_affine(self) -> bool:
        """Whether :meth:`affine` scores every token, so that no Python runs at eviction."""
        return type(self).affine is not RetentionPolicy.affine

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step under this policy reads nothing back to the host."""
        return self.is_affine and not self.capacity_only

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        """Fields of the new tokens, each ``[batch, num_kv_heads, new, ...]``."""
        return {}

    def observe(self, seen: ObservationView) -> None:
        """Update ``seen.fields`` in place after attention."""

    def score(self, slots: SlotView) -> Tensor:
        """fp32 ``[batch, num_kv_heads, num_slots]``; pure. Values at invalid slots are ignored."""
        raise NotImplementedError(f"policy {policy_name(self)!r} defines neither score nor affine")

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor] | None:
        """``(slope, offset)``, each broadcastable to ``[batch, num_kv_heads, new]``, fp32.

        Run once, at insertion; from then on the score is ``slope * (t - position) + offset``.
        """
        return None


_REGISTRY: dict[str, type[RetentionPolicy]] = {}
Policy = TypeVar("Policy", bound=type[RetentionPolicy])


def register_policy(name: str) -> Callable[[Policy], Policy]:
    """Class decorator: make a policy available by name.

    Raises:
        ValueError: another class already has this name.
        TypeError: the class is not a :class:`RetentionPolicy`.
    """

    def register(cls: Policy) -> Policy:
        if not (inspect.isclass(cls) and issubclass(cls, RetentionPolicy)):
            raise TypeError(f"register_policy({name!r}) must decorate a RetentionPolicy, got {cls}")
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"policy name {name!r} is already taken by {known.__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def available_policies() -> tuple[str, ...]:
    """Names of all registered policies, sorted."""
    return tuple(sorted(_REGISTRY))


def make_policy(name: str, **options: Any) -> RetentionPolicy:
    """The policy registered as ``name``, built with ``options``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(available_policies())}")
    return _REGISTRY[name](**options)


def policy_name(policy: RetentionPolicy) -> str:
    """The registered name, or the class name of an unregistered policy."""
    return policy.name or type(policy).__name__


def default_protection(policy: RetentionPolicy, budget: int) -> tuple[int, int]:
    """``(sinks, recent)`` that a policy states for a budget."""
    recent = min(32, budget // 8) if policy.recent is None else policy.recent
    return policy.sinks, recent
