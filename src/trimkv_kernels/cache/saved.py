"""Checks of the numbers in a saved cache.

The names, shapes and dtypes have been checked before. What is left is what a damaged file, or one
made to do harm, can still hold: counts and page tables that lead out of the slots, positions of
tokens that never came, and numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimkv_kernels.cache.storage import Storage
from trimkv_kernels.checks import check_protected
from trimkv_kernels.kernels.pages import PAGE

_COUNT_END = 1 << 31  # of int32
_SEEN_END = _COUNT_END >> 1  # leaves the clock as many tokens as it has counted


def check_numbers(
    saved: Mapping[str, Tensor], storages: Sequence[Storage], sinks: int, recent: int
) -> None:
    """Check that saved tensors can be the state of a cache with these storages.

    Args:
        saved: What :meth:`State.saved` gave.
        storages: Of the cache.
        sinks: Of the cache.
        recent: Of the cache.

    Raises:
        ValueError: they cannot; the message names the tensor.
    """
    t, seen = saved["t"].long(), int(saved["seen"])
    _require("seen", 0 <= seen < _SEEN_END, f"a count of tokens below 2**30, got {seen}")
    in_range = bool(((t >= 0) & (t <= seen)).all())
    _require("t", in_range, f"between 0 and {seen}, the tokens seen, got {t.tolist()}")
    for number, storage in enumerate(storages):
        prefix = f"{number}."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in saved.items()
            if name.startswith(prefix)
        }
        try:
            storage.check_saved(own, t)
            _check_finite(own)
            flags = own["nan_seen"]
            _require("nan_seen", bool(((flags == 0) | (flags == 1)).all()), "0 or 1")
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None
    if "pins" in saved:
        _check_pins(saved["pins"].tolist(), [x.least for x in storages], sinks, recent)


def check_slots(own: Mapping[str, Tensor], t: Tensor) -> None:
    """Check what :class:`~trimkv_kernels.cache.dense.DenseSlots` saved.

    Args:
        own: By name.
        t: ``[batch]`` int64, tokens seen.

    Raises:
        ValueError: it can be no such state; the message names the tensor.
    """
    count, position = own["num_valid"].long(), own["position"].long()
    slot = torch.arange(position.shape[-1], device=position.device)
    most = t[:, None].clamp(max=len(slot))
    _require(
        "num_valid",
        bool(((count >= 0) & (count <= most)).all()),
        f"between 0 and the tokens of its row, at most {len(slot)} slots",
    )
    is_even = bool((count == count[:1, :, :1]).all())
    _require("num_valid", is_even, "the same for all heads of a row")
    valid = slot < count[..., None]
    t = t[:, None, None]
    _check_positions(position, valid, t, position)
    _check_scores(own, valid)


def check_pages(own: Mapping[str, Tensor], t: Tensor, storage: Storage) -> None:
    """As :func:`check_slots`, of a :class:`~trimkv_kernels.cache.paged.PagedSlots`."""
    page, bounds = own["page"].long(), own["first_page"].long()
    pages = torch.arange(page.shape[-1], device=page.device)
    is_permutation = bool((page.sort(dim=-1).values == pages).all())
    _require("page", is_permutation, f"each of {len(pages)} pages once")
    own_pages = bounds.diff(dim=-1)
    ascends = bool((own_pages >= 0).all()) and bool((bounds[..., 0] == 0).all())
    fits = ascends and bool((bounds[..., -1] <= len(pages)).all())
    _require("first_page", fits, f"ascending from 0, at most {len(pages)}")
    kept, cut = own["kept"].long(), own["cut"].long()
    _require("cut", bool(((cut >= 0) & (cut <= t)).all()), "between 0 and t of its row")
    _require("kept", bool(((kept >= 0) & (kept <= cut[..., None])).all()), "at most `cut`")
    count = kept + (t - cut)[..., None]
    heads = count.shape[-1]
    room = heads * storage.num_slots - count.sum(dim=-1, keepdim=True)
    has_room = bool((room >= 0).all())
    has_room &= bool((count + (room + heads - 1) // heads <= own_pages * PAGE).all())
    _require("kept", has_room, "pairs that the pages of their heads have room for")
    if "table" in own:
        _check_table(own["table"].long(), storage)
    # the slots in the order of the table, each with its head
    index = torch.arange(len(pages) * PAGE, device=page.device)
    ends = bounds[..., 1:] * PAGE
    head = torch.searchsorted(ends, index.expand(*ends.shape[:-1], -1).contiguous(), right=True)
    is_owned, head = head < heads, head.clamp(max=heads - 1)
    ordinal = index - bounds.gather(-1, head) * PAGE
    valid = is_owned & (ordinal < count.gather(-1, head))
    address = page.repeat_interleave(PAGE, dim=-1) * PAGE + index % PAGE
    position = own["position"].long().gather(-1, address)
    _check_positions(position, valid, t[:, None], head * _COUNT_END + position)
    _check_scores(own, torch.zeros_like(valid).scatter(-1, address, valid))


def _check_table(table: Tensor, storage: Storage) -> None:
    """Check how many slots each head gets; with fewer than ``least`` it drops protected pairs."""
    least, most = storage.least, table.shape[-1] * storage.budget
    fits = bool((table >= least).all()) and bool((table.sum(dim=-1) <= most).all())
    _require("table", fits, f"from {least} slots a head, in the mean at most {storage.budget}")
    of_layers = table.unflatten(-1, (len(storage.layers), -1))
    is_even = bool((of_layers == of_layers[..., :1]).all())
    _require("table", is_even, "the same for all heads of a layer")


def _check_positions(position: Tensor, valid: Tensor, t: Tensor, identity: Tensor) -> None:
    """Check that valid slots hold tokens that came, none of them twice in a head.

    Args:
        position: ``[..., slots]`` int64.
        valid: As ``position``, bool.
        t: Broadcasts to ``position``.
        identity: As ``position``; differs between pairs of other positions or heads.
    """
    came = bool(((position >= 0) & (position < t) | ~valid).all())
    _require("position", came, "between 0 and t of its row")
    slot = torch.arange(position.shape[-1], device=position.device)
    found = torch.where(valid, identity, -1 - slot).sort(dim=-1).values
    _require("position", bool((found.diff(dim=-1) != 0).all()), "once in each head")


def _check_scores(own: Mapping[str, Tensor], valid: Tensor) -> None:
    """Check that nothing a policy keeps about a valid slot is NaN; infinite is allowed."""
    for name, tensor in own.items():
        is_score = name in ("slope", "offset") or name.startswith("fields.")
        if is_score and tensor.is_floating_point():
            has_nan = tensor.isnan().reshape(*valid.shape, -1).any(dim=-1)
            _require(name, not bool((has_nan & valid).any()), "no NaN")


def _check_finite(own: Mapping[str, Tensor]) -> None:
    """Check what attention reads. In empty slots too: a weight of 0 times NaN is NaN."""
    for name in ("key", "value", "queries", "query_mean", "query_scatter"):
        if name in own:
            _require(name, bool(own[name].isfinite().all()), "finite")


def _check_pins(rows: list[list[list[int]]], least: Sequence[int], sinks: int, recent: int) -> None:
    for row in rows:
        spans = [(start, stop) for start, stop in row if start != stop]
        # the length comes first: check_protected() counts every position
        in_range = all(0 <= start < stop <= start + min(least) for start, stop in spans)
        _require("pins", in_range, f"spans of at most the budget, got {spans[:4]}")
        check_protected(least, sinks, recent, spans)


def _require(name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}: the file is damaged, so save the cache again")
