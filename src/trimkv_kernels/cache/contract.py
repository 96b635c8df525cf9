"""What a cache passes to its policy, and checks of what the policy returns."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Call, Inputs, Pool
from trimkv_kernels.cache.observation import Observation
from trimkv_kernels.cache.pins import Pins
from trimkv_kernels.cache.ties import Ties, rounded
from trimkv_kernels.kernels.prologue import Decay
from trimkv_kernels.policies.base import (
    FieldSpec,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    policy_name,
)


class Contract:
    """A policy that gets what it declared and nothing else. What it returns is checked.

    Args:
        policy: Bound to the model.
        num_kv_heads: KV heads of a layer.
        num_heads: Query heads of a layer; None if no field is kept for each of them.

    Attributes:
        name, needs, fields, is_affine: The policy's.
        has_decay: The policy may give a :class:`~trimkv_kernels.kernels.Decay`.
        observation: How the policy's attention statistic is computed; None if it asks for none.
    """

    def __init__(self, policy: RetentionPolicy, num_kv_heads: int, num_heads: int | None) -> None:
        # read once, because a policy may compute them
        self.policy, self.name = policy, policy_name(policy)
        self.needs, self.fields = policy.needs, dict(policy.fields)
        self.is_affine = policy.is_affine
        self.has_decay = self.is_affine and not policy.scores_content and _gives_decay(policy)
        stat = self.needs.attention
        self.observation = None if stat is None else Observation(stat, num_kv_heads)
        self._num_kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads if num_heads else 0

    def tokens(self, layer: int, t: Tensor, call: Call, inputs: Inputs) -> TokenView:
        """A layer's new tokens, as the policy sees them."""
        given = {
            name: tensor
            for name, tensor in inputs.items()
            if tensor is not None and name in self.needs.insert
        }
        return TokenView(
            policy=self.name,
            layer=layer,
            t=t,
            position=call.position,
            valid=call.real,
            given=given,
            num_kv_heads=self._num_kv_heads,
        )

    def new_fields(self, tokens: TokenView) -> Pool:
        """Every field of new tokens, ``[batch, num_kv_heads, new, ...]``.

        Raises:
            ValueError: the policy wrote a field it did not declare, or of another shape or dtype.
        """
        if not self.fields:
            return {}
        written = self.policy.on_insert(tokens)
        unknown = sorted(set(written) - set(self.fields))
        if unknown:
            raise ValueError(f"policy {self.name!r} wrote undeclared fields {unknown}")
        new = {}
        for name, spec in self.fields.items():
            shape = (*self._shape(tokens), *field_shape(spec, self._group))
            if name in written:
                new[name] = self._expand(written[name], shape, name, spec.dtype)
            else:
                new[name] = tokens.t.new_full(shape, spec.fill, dtype=spec.dtype)
        return new

    def affine(self, tokens: TokenView, pins: Pins) -> tuple[Tensor | None, Tensor | None]:
        """``(slope, offset)`` of new tokens, ``[batch, num_kv_heads, new]`` fp32.

        Both are None if the policy is not affine. Pinned tokens get 0 and +inf.

        Raises:
            ValueError: the policy is affine but gave nothing, or another shape or dtype.
        """
        if not self.is_affine:
            return None, None
        terms = self.policy.affine(tokens)
        if terms is None:
            raise ValueError(f"policy {self.name!r} is affine but affine() returned None")
        slope, offset = (self._expand(x, self._shape(tokens), "affine") for x in terms)
        if self.policy.scores_content:
            offset = rounded(offset)
        pinned = pins.covers(tokens.position[:, None])
        if pinned is not None:
            slope, offset = slope.masked_fill(pinned, 0.0), offset.masked_fill(pinned, torch.inf)
        return slope, offset

    @property
    def reads_states(self) -> bool:
        """Whether a decode step's queries or keys are read outside of attention."""
        named = {"query", "key", "query_nope", "key_nope"} & set(self.needs.insert)
        return bool(named or self.needs.query_window or self.needs.query_moments)

    def decay(self, tokens: TokenView, pins: Pins) -> Decay | None:
        """What stands for ``(slope, offset)`` of a decode step's tokens, if the policy gives it.

        Raises:
            ValueError: it is not of the tokens' shape.
        """
        if not self.has_decay or pins.table is not None:
            return None
        decay = self.policy.decay(tokens)
        batch, heads, _ = self._shape(tokens)
        if decay is not None:
            for what, tensor, shape in (
                ("logit", decay.logit, (batch, heads)),
                ("bias", decay.bias, (heads,)),
            ):
                if tensor.shape != shape:
                    raise ValueError(
                        f"policy {self.name!r}: the decay's {what} must have shape {list(shape)}, "
                        f"got {list(tensor.shape)}"
                    )
        return decay

    def observe(
        self,
        layer: int,
        t: Tensor,
        pool: Pool,
        valid: Tensor,
        attention: Tensor,
        num_queries: Tensor,
    ) -> None:
        """Let the policy observe attention; it updates the fields in ``pool`` in place."""
        self.policy.observe(
            ObservationView(
                policy=self.name,
                layer=layer,
                t=t,
                position=pool["position"],
                valid=valid,
                fields={name: pool[name] for name in self.fields},
                given={"attention": attention, "num_queries": num_queries},
            )
        )

    def score(
        self,
        layer: int,
        t: Tensor,
        pool: Pool,
        valid: Tensor,
        *,
        budget: int,
        queries: Pool,
        pins: Pins,
        ties: Ties,
    ) -> Tensor:
        """The policy's scores of ``pool``, fp32; pinned spans score +inf.

        Args:
            layer: The layer.
            t: ``[batch]`` int32, tokens seen.
            pool: Slots and new tokens by name, each ``[batch, num_kv_heads, candidates, ...]``.
            valid: ``[batch, num_kv_heads, candidates]`` bool.
            budget: Slots of each head that will stay.
            queries: The queries, or their moments, that the policy asked for.
            pins: Spans that are never evicted.
            ties: Which scores count as equal.

        Raises:
            ValueError: the scores have another shape or dtype.
        """
        order = None
        if self.needs.chronological:
            last = torch.iinfo(torch.int32).max
            order = pool["position"].masked_fill(~valid, last).argsort(dim=-1, stable=True)
            pool = {name: _gather_slots(tensor, order) for name, tensor in pool.items()}
            valid = valid.gather(2, order)
        scores = self.policy.score(
            SlotView(
                policy=self.name,
                layer=layer,
                t=t,
                position=pool["position"],
                valid=valid,
                budget=budget,
                fields={name: pool[name] for name in self.fields},
                given={name: pool[name] for name in self.needs.score} | queries,
            )
        )
        if scores.shape != valid.shape or scores.dtype != torch.float32:
            raise ValueError(
                f"policy {self.name!r}: score must return float32 {list(valid.shape)}, "
                f"got {scores.dtype} {list(scores.shape)}"
            )
        pinned = pins.covers(pool["position"])
        if pinned is not None:
            scores = scores.masked_fill(pinned, torch.inf)
        scores = ties.settled(scores, valid, pool["position"], t, budget)
        return scores if order is None else torch.empty_like(scores).scatter_(2, order, scores)

    def _shape(self, tokens: TokenView) -> tuple[int, int, int]:
        batch, new = tokens.position.shape
        return batch, self._num_kv_heads, new

    def _expand(
        self,
        tensor: Tensor,
        shape: tuple[int, ...],
        what: str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        if tensor.dtype != dtype:
            raise ValueError(f"policy {self.name!r}: {what} must be {dtype}, got {tensor.dtype}")
        if tensor.shape == shape:
            return tensor
        try:
            return tensor.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"policy {self.name!r}: {what} must broadcast to {list(shape)}, "
                f"got {list(tensor.shape)}"
            ) from None


def _gives_decay(policy: RetentionPolicy) -> bool:
    """Whether ``decay`` says what ``affine`` does: no subclass overrides ``affine`` alone."""
    for kind in type(policy).__mro__:
        if "decay" in vars(kind) or "affine" in vars(kind):
            return "decay" in vars(kind)
    return False


def field_shape(spec: FieldSpec, group: int) -> tuple[int, ...]:
    """Shape of one slot's entry, with ``group`` query heads to a KV head."""
    return (group, *spec.shape) if spec.per == "query_head" else spec.shape


def _gather_slots(slots: Tensor, order: Tensor) -> Tensor:
    """``slots`` ``[batch, heads, slots, ...]`` in the order of ``[batch, heads, slots]``."""
    index = order.reshape(*order.shape, *(1,) * (slots.dim() - 3)).expand_as(slots)
    return slots.gather(2, index)
