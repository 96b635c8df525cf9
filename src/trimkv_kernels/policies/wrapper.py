"""The base class of policies that refine another policy's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from torch import Tensor

from trimkv_kernels.policies.base import (
    FieldSpec,
    ModelShape,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    policy_name,
)

AnyWrapper = TypeVar("AnyWrapper", bound="Wrapper")

_AFFINE = ("base_slope", "base_offset")


@dataclass(frozen=True, eq=False)
class Wrapper(RetentionPolicy):
    """Holds a base policy, with its needs, fields, protection and allocation.

    Subclass it, declare further needs and fields in ``own_needs`` and ``own_fields``, and compute
    ``score`` from :meth:`base_score`.

    Args:
        base: The policy whose scores are refined.

    Raises:
        TypeError: ``base`` is not a policy.
        ValueError: base and wrapper declare the same field, or need different attention statistics.
    """

    base: RetentionPolicy

    own_needs: ClassVar[Needs] = Needs()
    own_fields: ClassVar[Mapping[str, FieldSpec]] = {}

    def __post_init__(self) -> None:
        name = policy_name(self)
        if not isinstance(self.base, RetentionPolicy):
            raise TypeError(
                f"policy {name!r}: base must be a RetentionPolicy, as make_policy('h2o') is, "
                f"got {self.base!r}"
            )
        # an affine base has no score(): its two numbers become fields
        line = {x: FieldSpec() for x in _AFFINE} if self.base.is_affine else {}
        own = {**self.own_fields, **line}
        for twice in sorted(set(own) & set(self.base.fields)):
            raise ValueError(
                f"policy {name!r}: field {twice!r} is declared twice, "
                f"by {policy_name(self.base)!r} and by {name!r}"
            )
        for attribute, value in (
            ("needs", self.base.needs | self.own_needs),
            ("fields", {**self.base.fields, **own}),
            ("sinks", self.base.sinks),
            ("recent", self.base.recent),
            ("allocation", self.base.allocation),
            ("capacity_only", self.base.capacity_only),
            ("shardable", self.base.shardable),
        ):
            object.__setattr__(self, attribute, value)

    def bind(self: AnyWrapper, shape: ModelShape) -> AnyWrapper:
        return replace(self, base=self.base.bind(shape))

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        fields = self.base.on_insert(tokens)
        line = self.base.affine(tokens) if self.base.is_affine else None
        if line is None:
            return fields
        shape = (tokens.position.shape[0], tokens.num_kv_heads, tokens.position.shape[1])
        return fields | {x: value.expand(shape) for x, value in zip(_AFFINE, line, strict=True)}

    def observe(self, seen: ObservationView) -> None:
        self.base.observe(seen)

    def base_score(self, slots: SlotView) -> Tensor:
        """The base's scores, fp32 ``[batch, num_kv_heads, num_slots]``."""
        if not self.base.is_affine:
            return self.base.score(slots)
        slope, offset = (slots.fields[x] for x in _AFFINE)
        return slope * (slots.t[:, None, None] - slots.position) + offset
