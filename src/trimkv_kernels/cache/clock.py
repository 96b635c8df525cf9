"""The clock of a cache: how many tokens each row has seen, kept on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trimkv_kernels.cache.static import mark_static


class Clock:
    """Tokens seen, without and with padding. Both come from the padding mask, not position ids.

    Attributes:
        t: ``[batch]`` int32, real tokens of each row; on the device of layer 0.
        seen: int64 scalar, all tokens of a row, padding included.
        t_of: ``t`` on the device of each layer: the tensor itself, or a copy.
    """

    def __init__(self, t: Tensor, seen: Tensor, devices: Sequence[torch.device]) -> None:
        self.t, self.seen, self._devices = t, seen, tuple(devices)
        copies = {device: t.to(device, copy=True) for device in devices if device != t.device}
        self._copies = list(copies.values())
        self.t_of = [copies.get(device, t) for device in devices]
        mark_static(self.tensors())

    @classmethod
    def zero(cls, batch_size: int, devices: Sequence[torch.device]) -> Clock:
        """A clock of rows that have seen nothing."""
        t = torch.zeros(batch_size, dtype=torch.int32, device=devices[0])
        return cls(t, torch.zeros((), dtype=torch.int64, device=devices[0]), devices)

    def advance(self, new: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Count a call's tokens.

        Args:
            new: Tokens of each row, padding included.
            valid: ``[batch, new]`` bool, False for padding; None when all are real.

        Returns:
            ``[batch, new]`` int32, the position of each token, and ``[batch, new]`` bool, whether
            it is real.
        """
        before = self.t[:, None]
        if valid is None:
            position = before + torch.arange(new, dtype=torch.int32, device=self.t.device)
            real = torch.ones_like(position, dtype=torch.bool)
            self.t += new
        else:
            count = valid.cumsum(dim=1, dtype=torch.int32)
            position, real = before + count - 1, valid
            self.t += count[:, -1]
        self.seen += new
        self._update_copies()
        return position, real

    def take_back(self, real: Tensor | int, columns: int) -> None:
        """Uncount the last tokens of every row.

        Args:
            real: How many of them were real, ``[batch]`` int32 or one number for all rows.
            columns: How many there were, padding included.
        """
        self.t -= real
        self.seen -= columns
        self._update_copies()

    def reset(self, rows: Tensor | None = None) -> None:
        """Start again, for all rows or for those at the indices ``rows``."""
        if rows is None:
            self.t.zero_()
            self.seen.zero_()
        else:
            self.t[rows] = 0
        self._update_copies()

    def reorder(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was."""
        self.t.copy_(self.t.index_select(0, index))
        self._update_copies()

    def select(self, index: Tensor) -> Clock:
        """A new clock whose row ``i`` is row ``index[i]`` of this one."""
        return Clock(self.t.index_select(0, index), self.seen.clone(), self._devices)

    def put(self, row: int, source: Clock) -> None:
        """A row becomes what the only row of another clock is. ``seen`` covers both."""
        self.t[row] = source.t[0]
        self.seen.copy_(torch.maximum(self.seen, source.seen))
        self._update_copies()

    def load(self, t: Tensor, seen: Tensor) -> None:
        """Take another clock's numbers."""
        self.t.copy_(t)
        self.seen.copy_(seen)
        self._update_copies()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """What a file needs."""
        yield "t", self.t
        yield "seen", self.seen

    def tensors(self) -> list[Tensor]:
        """All tensors, copies included."""
        return [self.t, self.seen, *self._copies]

    def _update_copies(self) -> None:
        """Copy ``t`` to the other devices, after every change of it."""
        for copy in self._copies:
            copy.copy_(self.t)
