"""The retention-policy protocol: how to score what a bounded cache should keep.

A policy sees tokens when they are inserted, may see the attention they receive, and scores slots
when the cache has to choose. It never sees indices or how slots move: per-slot numbers that it
declares as ``fields`` are allocated, moved, cleared, reordered and saved by the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimkv_kernels.kernels.prologue import Decay
from trimkv_kernels.policies.allocation import Allocation, Uniform

INSERT_NEEDS = ("hidden_states", "key", "key_nope", "value", "query", "query_nope")
SCORE_NEEDS = ("key", "value")


@dataclass(frozen=True)
class FieldSpec:
    """One per-slot number (or small tensor) that a policy keeps beside each key/value pair.

    Args:
        shape: Inner shape of one slot's entry; ``()`` is a scalar.
        dtype: Storage dtype.
        fill: Value of a slot whose ``on_insert`` did not return this field.
        per: ``"kv_head"``, or ``"query_head"``: one entry for each query head of the group, so that
            the field is ``[batch, num_kv_heads, num_slots, group, *shape]``.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    per: Literal["kv_head", "query_head"] = "kv_head"


@dataclass(frozen=True)
class AttentionStat:
    """What attention must report about each slot, reduced over a call's queries and query heads.

    Args:
        reduce: ``"sum"`` of the probabilities over the queries, or ``"count_below"``: how many
            queries give the slot less than ``1 / n``, where ``n`` is how many tokens the query
            sees. Heads are reduced after the sum, and before the comparison with ``1 / n``.
        group: Reduction over the query heads that share a KV head; ``"none"`` keeps them apart;
            ``"all_heads"`` is the mean over all heads of the layer, for policies that keep the same
            positions in every head.
        queries: ``"all"`` queries of a call, or how many of the last ones.
        into: A scalar fp32 field that gets the statistic, so that no ``observe`` runs. With all
            queries the field adds up over the calls, else it is overwritten. Only for sums.

    Raises:
        ValueError: a number is out of range, or ``into`` does not go with the rest.
    """

    reduce: Literal["sum", "count_below"] = "sum"
    group: Literal["mean", "max", "none", "all_heads"] = "mean"
    queries: Literal["all"] | int = "all"
    into: str | None = None

    def __post_init__(self) -> None:
        for argument, allowed in (
            ("reduce", ("sum", "count_below")),
            ("group", ("mean", "max", "none", "all_heads")),
        ):
            if getattr(self, argument) not in allowed:
                raise ValueError(
                    f"AttentionStat({argument}=) must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, argument)!r}"
                )
        if self.queries != "all" and (not isinstance(self.queries, int) or self.queries < 1):
            raise ValueError(
                f"AttentionStat(queries=) must be 'all' or an int of at least 1, "
                f"got {self.queries!r}"
            )
        if self.into is not None and (self.reduce != "sum" or self.group not in ("mean", "max")):
            raise ValueError(
                "AttentionStat(into=) takes sums, reduced over a group of heads by mean or max, "
                f"got reduce={self.reduce!r}, group={self.group!r}: use observe()"
            )


@dataclass(frozen=True)
class Needs:
    """The inputs of a policy. It gets these and nothing else.

    Args:
        insert: Inputs at insertion, some of ``hidden_states, key, key_nope, value, query,
            query_nope`` (``nope``: before RoPE).
        score: Inputs when slots are scored, some of ``key, value``.
        attention: Attention statistic per slot, for ``observe``.
        query_window: How many of the last queries, after RoPE, ``score`` gets.
        query_moments: Whether ``score`` gets the running mean and covariance of all queries before
            RoPE, except those of the cache's ``sinks``.
        chronological: Whether ``score`` gets slots in ascending position.

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
        if self.query_window < 0:
            raise ValueError(f"Needs(query_window=) must be at least 0, got {self.query_window}")

    def __or__(self, other: Needs) -> Needs:
        """Both needs together, for wrappers.

        Raises:
            ValueError: they need different attention statistics.
        """
        if self.attention and other.attention and self.attention != other.attention:
            raise ValueError(
                f"only one AttentionStat can be given, got {self.attention} and {other.attention}"
            )
        return Needs(
            insert=tuple(dict.fromkeys(self.insert + other.insert)),
            score=tuple(dict.fromkeys(self.score + other.score)),
            attention=self.attention or other.attention,
            query_window=max(self.query_window, other.query_window),
            query_moments=self.query_moments or other.query_moments,
            chronological=self.chronological or other.chronological,
        )


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What a policy may know of the model it is bound to, see :meth:`RetentionPolicy.bind`.

    Args:
        dtype, device: Of the keys and values; policies put their parameters there.
        layer_devices: Where each layer is, see :meth:`device_of`; None when all are on ``device``.
        num_heads, hidden_size: None when the cache is used without a model.
        name_or_path: Hub id or folder of the model, empty when there is none.
        inv_freq: ``[head_dim / 2]`` fp32, RoPE's angle per position of each pair of channels
            ``(i, i + head_dim / 2)``; None when unknown, or when it rotates other pairs.
        rope_scaling: Factor that RoPE's cosines and sines carry.
        position_axes: Numbers that RoPE takes for each token, 3 with m-RoPE.
        scale: Softmax scale of attention, usually ``head_dim ** -0.5``; None when unknown.
        output_weights: The output projection's weight of each layer, ``[hidden_size, num_heads *
            head_dim]``. It may be computed when it is read. None when unknown.
        kv_head_offset, total_kv_heads: With tensor parallelism, how many of the layer's KV heads
            come before this process's, and how many there are. Other sizes are of this process.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    num_heads: int | None = None
    hidden_size: int | None = None
    name_or_path: str = ""
    inv_freq: Tensor | None = None
    rope_scaling: float = 1.0
    position_axes: int = 1
    scale: float | None = None
    output_weights: Sequence[Tensor] | None = None
    layer_devices: tuple[torch.device, ...] | None = None
    kv_head_offset: int = 0
    total_kv_heads: int | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether other processes have further KV heads of each layer."""
        return self.total_kv_heads not in (None, self.num_kv_heads)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's keys and values are."""
        return self.device if self.layer_devices is None else self.layer_devices[layer]


@dataclass(frozen=True)
class _View:
    """The common part of all views. Reading what ``Needs`` does not declare raises."""

    policy: str
    layer: int
    t: Tensor
    position: Tensor
    valid: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)

    _declared_in: ClassVar[str] = ""

    def _read(self, name: str, need: str | None = None) -> Tensor:
        if name not in self.given:
            need = need or f"{name!r} to Needs({self._declared_in}=...)"
            raise AttributeError(
                f"policy {self.policy!r} reads {name!r} without declaring it: add {need}"
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
        num_kv_heads: Number of KV heads that results must have.
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
    """The candidates of one layer when the cache has to choose: its slots, and a call's tokens.

    They have no particular order. With ``Needs(chronological=True)`` positions ascend, and slots
    that are not valid come last.

    Attributes:
        layer: Layer index.
        t: ``[batch]`` int32, real tokens each row has seen.
        position: ``[batch, num_kv_heads, num_slots]`` int32.
        valid: ``[batch, num_kv_heads, num_slots]`` bool, False where a slot is empty.
        budget: Slots of each head that will stay.
        fields: Each ``[batch, num_kv_heads, num_slots, ...]``.
        key, value: ``[batch, num_kv_heads, num_slots, head_dim]``.
        queries: ``[batch, num_heads, query_window, head_dim]``, the last queries after RoPE, in no
            particular order. Query heads of KV head ``h`` are ``h * group`` to ``(h + 1) * group``.
        query_position: ``[batch, query_window]`` int32, the position of each of them; -1 if the row
            has seen fewer.
        query_mean: ``[batch, num_heads, head_dim]`` fp32, of the queries before RoPE.
        query_covariance: ``[batch, num_heads, head_dim, head_dim]`` fp32, divided by their number.
    """

    budget: int = 0

    _declared_in: ClassVar[str] = "score"

    @property
    def key(self) -> Tensor:
        return self._read("key")

    @property
    def value(self) -> Tensor:
        return self._read("value")

    @property
    def queries(self) -> Tensor:
        return self._read("queries", "Needs(query_window=...)")

    @property
    def query_position(self) -> Tensor:
        return self._read("query_position", "Needs(query_window=...)")

    @property
    def query_mean(self) -> Tensor:
        return self._read("query_mean", "Needs(query_moments=True)")

    @property
    def query_covariance(self) -> Tensor:
        return self._read("query_covariance", "Needs(query_moments=True)")


@dataclass(frozen=True)
class ObservationView(_View):
    """One layer right after a call's attention, before anything is evicted.

    The slots are those that the call attended to, its own tokens included; ``fields`` are updated
    in place.

    Attributes:
        layer: Layer index.
        t: ``[batch]`` int32, real tokens each row has seen.
        position: ``[batch, num_kv_heads, num_slots]`` int32.
        valid: ``[batch, num_kv_heads, num_slots]`` bool, False where a slot is empty.
        fields: Each ``[batch, num_kv_heads, num_slots, ...]``.
        attention: The declared :class:`AttentionStat`, fp32 ``[batch, num_kv_heads, num_slots]``,
            or ``[batch, num_kv_heads, num_slots, group]`` with ``group="none"``; 0 where not valid.
        num_queries: ``[batch]`` int32, how many real queries the statistic covers.
    """

    _declared_in: ClassVar[str] = "attention"

    @property
    def attention(self) -> Tensor:
        return self._read("attention", "Needs(attention=AttentionStat(...))")

    @property
    def num_queries(self) -> Tensor:
        return self._read("num_queries", "Needs(attention=AttentionStat(...))")


class RetentionPolicy:
    """Scores slots; a higher score is kept. Subclass, set ``needs``, write ``score`` or ``affine``.

    Attributes:
        needs: The inputs of the policy. A property if they depend on options.
        fields: Per-slot numbers that the cache keeps for the policy.
        sinks: First positions that are never evicted, unless the user says otherwise.
        recent: Last positions that are never evicted; None is ``min(32, budget // 8)``.
        allocation: How a budget is shared out, unless the user says otherwise.
        capacity_only: The policy never chooses; a cache that would have to evict raises.
        shardable: The policy can decide about some of a layer's KV heads without the others, as
            tensor parallelism requires.
        scores_content: It is affine, and scores what a token is, wherever it stands, so that equal
            tokens have equal scores. The cache then drops the last bits of ``offset``: ties are
            not to be decided by rounding.
    """

    name: ClassVar[str] = ""
    needs: Needs = Needs()
    fields: Mapping[str, FieldSpec] = {}
    sinks: int = 4
    recent: int | None = None
    allocation: Allocation = Uniform()
    capacity_only: bool = False
    shardable: bool = True
    scores_content: bool = False

    @classmethod
    def example(cls, shape: ModelShape) -> RetentionPolicy:
        """A policy for the conformance suite. Override it if the class needs arguments.

        Args:
            shape: The model that the policy must fit.
        """
        return cls()

    def bind(self, shape: ModelShape) -> RetentionPolicy:
        """Check the policy against a model and return it ready to run there (parameters moved).

        ``patch`` calls it, and then each cache. A cache may know less of the model, so keep what is
        bound already.

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

        Called once, at insertion. From then on the score is ``slope * (t - position) + offset``.
        """
        return None

    def decay(self, tokens: TokenView) -> Decay | None:
        """One token's :meth:`affine` terms as a gate's logit, of which a GPU's step makes them.

        Optional, for speed: it must say what ``affine`` says. It is not used where ``affine`` is
        overridden later than it, or where spans are pinned. None: ask ``affine``.
        """
        return None


def policy_name(policy: RetentionPolicy) -> str:
    """The registered name, or the class name of an unregistered policy."""
    return policy.name or type(policy).__name__


def policy_fingerprint(policy: RetentionPolicy) -> str:
    """The policy's name and a digest of its options and parameters. Equal ones score alike."""
    digest = hashlib.sha256()

    def add(item: object) -> None:
        if isinstance(item, Tensor):
            digest.update(f"{item.dtype}{list(item.shape)}".encode())
            data = item.detach().contiguous().cpu().flatten().view(torch.uint8)
            digest.update(data.numpy().tobytes())
        elif isinstance(item, torch.nn.Module):
            for name, tensor in item.state_dict().items():
                digest.update(name.encode())
                add(tensor)
        elif isinstance(item, RetentionPolicy):
            digest.update(policy_name(item).encode())
            for name, option in sorted(vars(item).items()):
                digest.update(name.encode())
                add(option)
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)
        else:
            digest.update(repr(item).encode())

    add(policy)
    return f"{policy_name(policy)}-{digest.hexdigest()[:16]}"


def default_protection(policy: RetentionPolicy, budget: int) -> tuple[int, int]:
    """A policy's default ``(sinks, recent)`` for a budget."""
    recent = min(32, budget // 8) if policy.recent is None else policy.recent
    return policy.sinks, recent
