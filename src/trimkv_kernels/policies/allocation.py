"""How many slots each layer and head gets. A policy scores, an allocation shares the budget out.

An allocation of fixed budgets (:class:`Uniform`, :class:`PerLayer`, :class:`Pyramid`) is what
:class:`~trimkv_kernels.cache.BoundedKVCache` takes: its slots are allocated once. Budgets that
follow the scores (shared by the heads of a layer or by all layers) need slots in pages, and will
be another kind of :class:`Allocation`.
"""

from __future__ import annotations

from dataclasses import dataclass


class Allocation:
    """Shares a budget out over the layers."""

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Slots that each head of each layer keeps.

        Args:
            budget: Mean number of slots per layer and KV head.
            num_layers: Layers of the model.

        Raises:
            ValueError: the budget cannot be shared out like this.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define budgets()")


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every layer and head."""

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        return (budget,) * num_layers


@dataclass(frozen=True)
class PerLayer(Allocation):
    """A table of budgets, one for each layer.

    Args:
        table: Slots per head of each layer, each at least 1.

    Raises:
        ValueError: a budget is below 1.
    """

    table: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", tuple(self.table))
        if not self.table or min(self.table) < 1:
            raise ValueError(f"table must hold budgets of at least 1, got {self.table}")

    def budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        if len(self.table) != num_layers:
            raise ValueError(
                f"table must have one budget for each of {num_layers} layers, "
                f"got {len(self.table)}"
            )
        return self.table
