"""What a cache does with whole rows: free, move, copy and fill them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Progress, Rows
from trimkv_kernels.cache.drafts import Drafts
from trimkv_kernels.cache.state import State
from trimkv_kernels.checks import check_positive
from trimkv_kernels.policies.base import RetentionPolicy, policy_fingerprint

if TYPE_CHECKING:
    from trimkv_kernels.cache.bounded import BoundedKVCache


class RowOperations(ABC):
    """The operations on rows of a :class:`~trimkv_kernels.BoundedKVCache`."""

    num_layers: int
    batch_size: int
    device: torch.device
    policy: RetentionPolicy
    _state: State
    _draft: Drafts
    _progress: Progress

    @abstractmethod
    def _use(self, state: State) -> None:
        """Take another state."""

    @abstractmethod
    def _kind(self) -> dict[str, str]:
        """What two caches must have in common, by name, for one to take rows of the other."""

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Free all rows, or the given ones, in place, for the next sequences.

        Waiting tokens of these rows are dropped; those of other rows continue to wait. Without
        ``rows`` the cache also stops holding tokens, and its flags are cleared.

        Args:
            rows: Row indices, ints in ``[0, batch_size)``; None frees all.

        Raises:
            ValueError: a row is out of range, or ``rows`` is given while a call is under way;
                nothing is changed.
        """
        chosen = None
        if rows is None:
            self._progress.end()
            self._draft.end()
        else:
            self._progress.check_between_calls("reset")
            chosen = Rows.of("rows", rows, self.batch_size, self.device)
            self._draft.drop(chosen)
        self._state.reset(chosen)

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, in place (beam search).

        Args:
            index: ``[batch]`` ints in ``[0, batch_size)``.

        Raises:
            ValueError: wrong length, a row is out of range, or tokens wait to be confirmed.
        """
        rows = Rows.of("index", index, self.batch_size, self.device)
        if len(rows) != self.batch_size:
            raise ValueError(f"index must have {self.batch_size} entries, got {len(rows)}")
        self._draft.check_settled("reorder")
        self._state.reorder(rows)

    def select(self, index: Tensor | Sequence[int]) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, for any number of rows, in new tensors.

        Args:
            index: Ints in ``[0, batch_size)``, at least one.

        Raises:
            ValueError: no row, a row is out of range, or tokens wait to be confirmed.
        """
        rows = Rows.of("index", index, self.batch_size, self.device)
        if len(rows) == 0:
            raise ValueError("index must name at least one row, got none")
        self._draft.check_settled("select")
        self._use(self._state.select(rows))
        self.batch_size = len(rows)

    def fork(self, copies: int) -> Self:
        """A new cache with ``copies`` rows for each row, next to each other.

        Raises:
            ValueError: ``copies`` is below 1, or tokens wait to be confirmed.
        """
        check_positive("copies", copies)
        self._draft.check_settled("fork")
        twin = copy.copy(self)
        twin._draft = Drafts(self.num_layers)
        if self._draft.is_holding:
            twin._draft.hold()
        twin.select(torch.arange(self.batch_size).repeat_interleave(copies))
        return twin

    def put(self, row: int, source: BoundedKVCache) -> None:
        """A row becomes what the only row of another cache is, in place: pairs, clock and pins.

        ``source`` stays as it is. Tokens of the row that was there are forgotten.

        Args:
            row: In ``[0, batch_size)``.
            source: A cache of one row, with this one's policy, sizes, dtype and devices.

        Raises:
            ValueError: there is no such row, ``source`` differs in more than its rows, or a call is
                under way or tokens wait in either; nothing is changed.
        """
        Rows.of("row", [row], self.batch_size, self.device)
        if source.batch_size != 1:
            raise ValueError(f"source must be a cache of one row, got {source.batch_size} rows")
        theirs = source._kind()
        for name, ours in self._kind().items():
            if ours != theirs[name]:
                raise ValueError(
                    f"source must have the {name} of this cache, {ours}, got {theirs[name]}"
                )
        if source.policy is not self.policy:
            ours, other = policy_fingerprint(self.policy), policy_fingerprint(source.policy)
            if ours != other:
                raise ValueError(f"source must have the policy {ours}, got {other}")
        for cache in (self, source):
            cache._progress.check_between_calls("put")
            cache._draft.check_settled("put")
        self._state.put(row, source._state)
