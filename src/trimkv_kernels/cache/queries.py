"""What a cache keeps of the queries, for policies whose scores need them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Call, Pool
from trimkv_kernels.kernels.checks import required
from trimkv_kernels.policies.base import Needs


class Queries:
    """The last queries of each head, and running moments of all, for the layers of one storage.

    Args:
        needs: What the policy asks for.
        num_layers, batch_size, num_heads, head_dim: Shape.
        sinks: First positions, which the moments leave out.
        dtype, device: Of the window.
        window: More queries than the policy asks for, if something else needs them.

    Attributes:
        window: ``[layers, batch, num_heads, length, head_dim]``, the query of position ``p`` at ``p
            % length``; None without a window.
        mean, scatter: ``[layers, batch, num_heads, head_dim]`` and ``[..., head_dim, head_dim]``
            fp32, mean and summed outer products of deviations; None without moments.
    """

    def __init__(
        self,
        needs: Needs,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int | None,
        head_dim: int,
        sinks: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int = 0,
    ) -> None:
        self._sinks, self._asked = sinks, needs.query_window
        shape = (num_layers, batch_size, num_heads or 0)
        self.window: Tensor | None = None
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None
        length = max(needs.query_window, window)
        if length:
            self.window = torch.zeros(*shape, length, head_dim, dtype=dtype, device=device)
        if needs.query_moments:
            self.mean = torch.zeros(*shape, head_dim, device=device)
            self.scatter = torch.zeros(*shape, head_dim, head_dim, device=device)

    def remember(
        self, index: int, call: Call, query: Tensor, query_nope: Tensor | None, t: Tensor
    ) -> None:
        """Take a call's queries, ``[batch, num_heads, new, head_dim]``, of the layer at ``index``.

        Args:
            index: The layer's index within the storage.
            call: The call, on the layer's device.
            query: After RoPE.
            query_nope: Before RoPE; needed for the moments.
            t: ``[batch]`` int32, tokens seen, the call's included.
        """
        if self.window is not None:
            _put_into_window(self.window[index], query, call.valid, t)
        if self.mean is not None and self.scatter is not None and query_nope is not None:
            counted = call.real & (call.position >= self._sinks)
            total = (t - self._sinks).clamp(min=0)
            _add_moments(self.mean[index], self.scatter[index], query_nope, counted, total)

    def given(self, index: int, t: Tensor) -> Pool:
        """The queries or moments that ``score`` gets for the layer at ``index``."""
        given = {}
        if self._asked:
            given["queries"], given["query_position"] = self.last(index, self._asked, t)
        if self.mean is not None and self.scatter is not None:
            count = (t - self._sinks).clamp(min=1)[:, None, None, None]
            given["query_mean"] = self.mean[index]
            given["query_covariance"] = self.scatter[index] / count
        return given

    def last(self, index: int, count: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """The last queries of the layer at ``index``, in no particular order.

        Args:
            index: The layer's index within the storage.
            count: How many, at most the length of the window.
            t: ``[batch]`` int32, tokens seen.

        Returns:
            ``[batch, num_heads, count, head_dim]``, and their positions ``[batch, count]`` int32,
            -1 for none.
        """
        window = required("window", self.window)[index]
        length = window.shape[2]
        if count == length:
            return window, _window_positions(t, length)
        back = torch.arange(1, count + 1, dtype=torch.int32, device=t.device)
        position = t[:, None] - back
        place = (position % length).long()[:, None, :, None]
        queries = window.gather(2, place.expand(-1, window.shape[1], -1, window.shape[3]))
        return queries, position.clamp(min=-1)

    def reset(self, rows: Tensor | slice) -> None:
        """Clear the moments of some rows. The window needs no clearing: ``t`` says what is old."""
        for moment in (self.mean, self.scatter):
            if moment is not None:
                moment[:, rows] = 0

    def select(self, index: Tensor) -> Queries:
        """Queries in new tensors, whose row ``i`` is row ``index[i]`` of these."""
        twin = Queries.__new__(Queries)
        twin._sinks, twin._asked = self._sinks, self._asked
        twin.window, twin.mean, twin.scatter = (
            None if x is None else x.index_select(1, index)
            for x in (self.window, self.mean, self.scatter)
        )
        return twin

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name; each has layers and batch as its first dimensions."""
        names = {"queries": self.window, "query_mean": self.mean, "query_scatter": self.scatter}
        for name, tensor in names.items():
            if tensor is not None:
                yield name, tensor


def _put_into_window(window: Tensor, query: Tensor, valid: Tensor | None, t: Tensor) -> None:
    """Put a call's last queries into a layer's window.

    A row's real tokens are at the right end of the call. The last one has position ``t - 1``.
    """
    new, length = query.shape[2], window.shape[2]
    if new == 1:
        index = ((t - 1) % length).long()[:, None, None, None].expand_as(query)
        if valid is not None:
            query = torch.where(valid[:, None, :, None], query, window.gather(2, index))
        window.scatter_(2, index, query)
        return
    position = _window_positions(t, length)
    column = new - (t[:, None] - position)  # the call's column for each index
    count = torch.full_like(t, new) if valid is None else valid.sum(dim=1, dtype=torch.int32)
    taken = (position >= 0) & (column >= new - count[:, None])
    index = column.clamp(min=0).long()[:, None, :, None].expand_as(window)
    window.copy_(torch.where(taken[:, None, :, None], query.gather(2, index), window))


def _window_positions(t: Tensor, window: int) -> Tensor:
    """``[batch, window]`` int32: the position of the query at each index, -1 for none."""
    index = torch.arange(window, dtype=torch.int32, device=t.device)
    last = t[:, None] - 1
    return (last - (last - index) % window).clamp(min=-1)


def _add_moments(
    mean: Tensor, scatter: Tensor, query: Tensor, counted: Tensor, total: Tensor
) -> None:
    """Add queries before RoPE to a running mean and scatter, in place (Chan et al.).

    Args:
        mean: ``[batch, num_heads, head_dim]`` fp32; updated.
        scatter: ``[batch, num_heads, head_dim, head_dim]`` fp32; updated.
        query: ``[batch, num_heads, new, head_dim]``.
        counted: ``[batch, new]`` bool, the tokens that count.
        total: ``[batch]``, tokens that count so far, the call's included.
    """
    weight = counted[:, None, :, None].float()
    added = weight.sum(dim=2)  # [batch, 1, 1]
    query = query.float()
    new_mean = (query * weight).sum(dim=2) / added.clamp(min=1)
    centred = (query - new_mean[:, :, None]) * weight
    step = new_mean - mean
    share = added / total[:, None, None].clamp(min=1)
    before = total[:, None, None] - added
    scatter += centred.mT @ centred
    scatter += (step[..., :, None] * step[..., None, :]) * (before * share)[..., None]
    mean += step * share
