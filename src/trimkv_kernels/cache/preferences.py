"""How many slots each head has, where layers share a budget by what their queries attend to."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_kernels.policies.shares import Preference


class PreferredSlots:
    """A table of slots for every row. Calls of several tokens decide anew.

    Args:
        rule: How preferences and slots are computed.
        budget: Mean slots of a head.
        num_layers, num_kv_heads, batch_size: Shape.
        device: Of the table.

    Attributes:
        rule: As given.
        table: ``[1, batch, layers * num_kv_heads]`` int32.
    """

    def __init__(
        self,
        rule: Preference,
        budget: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.rule, self._budget, self._num_layers = rule, budget, num_layers
        heads = num_layers * num_kv_heads
        self.table = torch.full((1, batch_size, heads), budget, dtype=torch.int32, device=device)
        self._noted: list[Tensor] = []  # of the call's layers so far

    def note(self, layer: int, preference: Tensor, rows: Tensor) -> None:
        """Take a layer's preference, and share the budget out over the layers so far.

        Args:
            layer: The layer; 0 begins a new call.
            preference: ``[batch]`` fp64.
            rows: ``[batch]`` bool, the rows whose table is decided anew.
        """
        self._noted = [*self._noted[:layer], preference]
        slots = self.rule.slots(torch.stack(self._noted, dim=1), self._budget, self._num_layers)
        of_heads = slots.repeat_interleave(self.table.shape[2] // self._num_layers, dim=1)
        own = self.table[0, :, : of_heads.shape[1]]
        own.copy_(torch.where(rows[:, None], of_heads, own))

    def reset(self, rows: Tensor | slice) -> None:
        """All heads of some rows have the same again."""
        self.table[:, rows] = self._budget

    def select(self, index: Tensor) -> PreferredSlots:
        """A table in a new tensor, whose row ``i`` is row ``index[i]`` of this one."""
        twin = PreferredSlots.__new__(PreferredSlots)
        twin.__dict__.update(self.__dict__)
        twin.table, twin._noted = self.table.index_select(1, index), []
        return twin
