"""A bounded cache whose rows come and go one by one, as requests do in a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.checks import check_positive
from trimkv_kernels.integrations.hf_cache import BoundedCache, MakeSlots
from trimkv_kernels.integrations.hf_layers import own_words


class RowsCache(BoundedCache):
    """A bounded cache of so many rows, which sequences enter and leave one by one.

    Made by ``PatchHandle.new_cache(rows=...)``. All rows are free at first. A sequence enters a row
    with :meth:`put`, or with a call in which only that row has real tokens, and leaves it with
    :meth:`reset`. In every call, ``attention_mask`` is 0 for the rows that are free; a mask with a
    column for each token of the call is enough. Position ids come from each row's own clock if the
    caller gives none.

    What a row computes does not depend on the other rows: attention gives the same bits whatever
    they hold, and no row evicts because another one does.

    Args:
        make_slots: Called with number of rows, dtype and device.
        rows: How many there are.
        dtype, device: Of the slots.
        options: As for :class:`BoundedCache`.
    """

    has_free_rows = True

    def __init__(
        self,
        make_slots: MakeSlots,
        *,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(make_slots, device=device, **options)
        self._contents.slots = make_slots(rows, dtype, device)

    def put(self, row: int, source: BoundedCache) -> None:
        """A row becomes what the only row of another cache is, which stays as it is.

        Pairs, clock, pins and all that the policy keeps are copied in place. What the row held is
        forgotten.

        Args:
            row: In ``[0, rows)``.
            source: A cache of this model's handle that has read one sequence.

        Raises:
            TypeError: ``source`` is not a cache of this model's handle.
            ValueError: there is no such row, ``source`` does not have exactly one row, a call broke
                off, or tokens wait to be confirmed; nothing is changed.
            RuntimeError: ``source`` was never used.
        """
        if not isinstance(source, BoundedCache) or source.owner is not self.owner:
            raise TypeError("source must be a cache from this model's PatchHandle.new_cache()")
        for cache in (self, source):
            cache.check_finished()
        with own_words():
            self._used("put").put(row, source._used("put"))
        self.padding.reset()  # masks of earlier calls say nothing about this row

    def place(self, inputs: dict[str, Any], q_len: int) -> None:
        """Give a call of ``q_len`` tokens the position ids of each row's clock, if it has none."""
        if inputs.get("position_ids") is None:
            before = self._used("place").t[:, None].long()
            inputs["position_ids"] = before + self._columns(q_len, before.device)

    def _columns(self, q_len: int, device: torch.device) -> Tensor:
        """``[rows or 1, q_len]`` int64: real tokens of the call before each of its columns."""
        if self._valid is None:
            return torch.arange(q_len, device=device)[None]
        return (self._valid.to(device).cumsum(dim=1) - 1).clamp(min=0)


def check_rows_fit(rows: int, windows: Sequence[int | None], *, reads_images: bool) -> None:
    """Raise unless a model can have a cache of single rows.

    Args:
        rows: How many are wanted.
        windows: The sliding window of each layer; None where it is bounded.
        reads_images: It is a vision-language model.

    Raises:
        ValueError: says what to use.
    """
    check_positive("rows", rows)
    reason = None
    if any(window is not None for window in windows):
        reason = "with sliding-window layers, whose caches have one length for all rows"
    elif reads_images:
        reason = "that reads images, whose positions are counted by the model"
    if reason is not None:
        raise ValueError(
            f"rows must be None for a model {reason}: use generate() or decode_loop() with a "
            "left-padded batch"
        )
