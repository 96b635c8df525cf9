"""What a case is: shapes, inputs, exact results, and the least that must be moved or computed.

A case has one set of buffers per launch, together larger than any cache, so that no launch finds
its inputs warm. Inputs are random, never zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

ROTATED_BYTES = 256 * 2**20  # at least; the L2 of a Hopper holds 60 MB
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class Heads(NamedTuple):
    """The part of a model that attention sees."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


QWEN3_4B = Heads(layers=36, num_heads=32, num_kv_heads=8, head_dim=128)
TOY = Heads(layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


@dataclass(kw_only=True)
class Case(ABC):
    """One shape of one op.

    Attributes:
        device: Where it runs; on a CPU everything but the clock does.
        heads: The model's.
        dtype: Of queries, keys and values.
        batch: Sequences.
    """

    op: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]  # attributes that tell the cases of an op apart

    device: torch.device
    heads: Heads
    dtype: torch.dtype
    batch: int = 1

    @property
    def impl(self) -> str:
        """The implementation of our ops that is measured."""
        return "triton" if self.device.type == "cuda" else "torch"

    @property
    def shape(self) -> dict[str, Any]:
        """What tells this case from others of the op."""
        return {axis: getattr(self, axis) for axis in self.axes}

    @property
    def needs_grad(self) -> bool:
        """Whether contestants differentiate."""
        return False

    @property
    def tolerance(self) -> float:
        """Largest ``|output - exact| / |exact|`` of a contestant that may be timed."""
        return TOLERANCES[self.dtype]

    @property
    @abstractmethod
    def launches(self) -> int:
        """Launches per graph, each with its own buffers."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes one launch must move: every input read once, every output written once."""

    @property
    def flops(self) -> int | None:
        """Operations of the matrix products of one launch, where they are what takes the time."""
        return None

    @cached_property
    @abstractmethod
    def inputs(self) -> Any:
        """The buffers of all launches, made when first asked for."""

    @cached_property
    @abstractmethod
    def exact(self) -> tuple[Tensor, ...]:
        """What launch 0 computes, or a part of it, in float64."""

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The part of a contestant's outputs that `exact` holds."""
        return outputs

    def errors(self, outputs: Sequence[Tensor]) -> tuple[float, float]:
        """Largest error of any element, and largest relative error of any output as a whole."""
        largest = relative = 0.0
        for output, exact in zip(self.comparable(outputs), self.exact, strict=False):
            error = output.double() - exact
            largest = max(largest, error.abs().max().item())
            ratio = (error.norm() / exact.norm().clamp(min=1e-30)).item()
            relative = max(relative, ratio if ratio == ratio else torch.inf)
        return largest, relative

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers in the case's dtype."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def numbers(self, *shape: int) -> Tensor:
        """Uniform fp32 numbers between 0 and 1."""
        return torch.rand(shape, device=self.device)

    def integers(self, number: int, *shape: int) -> Tensor:
        """One int32 number everywhere."""
        return torch.full(shape, number, dtype=torch.int32, device=self.device)

    def rotated(self, layer_bytes: int) -> int:
        """Launches that fill `ROTATED_BYTES`, at least the model's layers."""
        if self.device.type != "cuda":
            return self.heads.layers
        return max(self.heads.layers, -(-ROTATED_BYTES // layer_bytes))
