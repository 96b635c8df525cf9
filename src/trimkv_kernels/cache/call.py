"""One call: its tokens, and what each layer passes to its storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimkv_kernels.kernels.prologue import Decay, Rope

Inputs = dict[str, Tensor | None]  # of one layer: query, key, value, hidden_states, ...
Pool = dict[str, Tensor]  # by name: the slots, then a call's new tokens


@dataclass(frozen=True)
class Call:
    """One forward pass over new tokens, the same for every layer.

    Attributes:
        valid: ``[batch, new]`` bool, False for padding; None when every token is real.
        real: The same, always a tensor.
        position: ``[batch, new]`` int32.
        added: Real tokens of each row; None if the host does not know.
        is_first: No row held a pair before.
        scale: Softmax scale of the layer's attention; None is ``head_dim ** -0.5``.
    """

    valid: Tensor | None
    real: Tensor
    position: Tensor
    added: list[int] | None
    is_first: bool
    scale: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of each row, padding included."""
        return self.position.shape[1]

    @property
    def num_real(self) -> Tensor:
        """``[batch]`` int32, real tokens of each row."""
        return self.real.sum(dim=1, dtype=torch.int32)

    @property
    def undoable(self) -> int:
        """Tokens of the call that can be taken back from the slots: 0 if some are padding."""
        return self.num_tokens if self.valid is None else 0

    def to(self, device: torch.device) -> Call:
        """The call on the device of a layer."""
        if self.position.device == device:
            return self
        real = self.real.to(device)
        valid = None if self.valid is None else real
        return replace(self, valid=valid, real=real, position=self.position.to(device))

    def joined(self, more: Call) -> Call:
        """This call and the next one as a single call."""
        added = None
        if self.added is not None and more.added is not None:
            added = [a + b for a, b in zip(self.added, more.added, strict=True)]
        real = torch.cat((self.real, more.real), dim=1)
        valid = None if self.valid is None and more.valid is None else real
        position = torch.cat((self.position, more.position), dim=1)
        return Call(valid, real, position, added, self.is_first, self.scale)

    def first_tokens(self, count: int) -> Call:
        """The call's first ``count`` columns."""
        real, position = self.real[:, :count], self.position[:, :count]
        if self.valid is None:
            added = None if self.added is None else [count] * len(self.added)
            return replace(self, real=real, position=position, added=added)
        return replace(self, valid=real, real=real, position=position, added=real_counts(real))

    def token(self, column: int) -> Call:
        """One of the call's columns."""
        real, position = (x[:, column : column + 1] for x in (self.real, self.position))
        valid = None if self.valid is None else real
        return replace(self, valid=valid, real=real, position=position, added=None)

    def without(self, rows: Rows) -> Call:
        """The call in which the tokens of ``rows`` are padding."""
        real = self.real.index_fill(0, rows.index.to(self.real.device), False)
        added = self.added
        if added is not None:
            known = rows.known
            added = (
                None
                if known is None
                else [0 if row in known else more for row, more in enumerate(added)]
            )
        return replace(self, valid=real, real=real, added=added)


class Progress:
    """Which layer a call has reached. All layers must be called, in order.

    A call that failed in some layer stays unfinished, because only some layers hold its tokens.

    Args:
        num_layers: Layers of the cache.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self.end()

    def end(self) -> None:
        """No call is under way."""
        self._call: Call | None = None
        self._next_layer = 0

    @property
    def is_under_way(self) -> bool:
        """Whether some layers have not been called yet."""
        return self._call is not None

    def begin(self, call: Call) -> None:
        """A call starts, with layer 0."""
        self._call = call

    def at(self, device: torch.device, scale: float | None) -> Call:
        """The call, on a layer's device and with a layer's scale.

        Raises:
            ValueError: none is under way.
        """
        if self._call is None:
            raise ValueError("layer must start at 0 for each call")
        self._call = call = self._call.to(device)
        return call if call.scale == scale else replace(call, scale=scale)

    def advance(self) -> None:
        """A layer is done; after the last one the call has ended."""
        self._next_layer += 1
        if self._next_layer == self._num_layers:
            self.end()

    def check_order(self, layer: int) -> None:
        """Check that ``layer`` is the next one.

        Raises:
            ValueError: there is no such layer, another is next, or the call before did not finish.
        """
        if not 0 <= layer < self._num_layers:
            raise ValueError(f"layer must be in [0, {self._num_layers}), got {layer}")
        if layer == 0 and self._call is not None:
            raise ValueError(
                f"the call before did not finish: layer {self._next_layer} was next. Its tokens "
                "are in some layers only: reset() the cache"
            )
        if layer != self._next_layer:
            raise ValueError(
                f"layers must be called in order: expected layer {self._next_layer}, got {layer}"
            )

    def check_between_calls(self, method: str) -> None:
        """Raise while a call is under way.

        Raises:
            ValueError: a call is under way; ``method`` cannot be called now.
        """
        if self._call is not None:
            raise ValueError(
                f"{method}() must come between calls: some layers have not been called"
            )


@dataclass(frozen=True)
class NewTokens:
    """One layer's new tokens as its storage takes them.

    Attributes:
        key, value: ``[batch, num_kv_heads, new, head_dim]``.
        slope, offset: ``[batch, num_kv_heads, new]`` fp32 of an affine policy, else None.
        fields: The policy's, each ``[batch, num_kv_heads, new, ...]``.
        decay: In place of slope and offset; only for storages that fuse it.
        rope: What is to be done to the query and to ``key`` first; likewise.
    """

    key: Tensor
    value: Tensor
    slope: Tensor | None
    offset: Tensor | None
    fields: Pool
    decay: Decay | None = None
    rope: Rope | None = None


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: their indices on the device and, if known, on the host."""

    index: Tensor
    known: list[int] | None

    @classmethod
    def of(
        cls, argument: str, rows: Tensor | Sequence[int], batch_size: int, device: torch.device
    ) -> Rows:
        """Check indices.

        Indices on an accelerator are not checked: that would wait for the device.

        Raises:
            ValueError: an index is not an int, or out of range.
        """
        index = torch.as_tensor(rows)
        if index.dim() != 1 or (
            len(index) and (index.is_floating_point() or index.dtype == torch.bool)
        ):
            raise ValueError(
                f"{argument} must be a list of row indices, got {index.dtype} {list(index.shape)}"
            )
        index = index.to(torch.int64)
        known: list[int] | None = None
        if index.device.type == "cpu":
            known = index.tolist()
            if known and not 0 <= min(known) <= max(known) < batch_size:
                raise ValueError(
                    f"{argument} must lie in [0, {batch_size}), got {min(known)} to {max(known)}"
                )
        return cls(index.to(device), known)

    def __len__(self) -> int:
        return len(self.index)


def real_counts(valid: Tensor) -> list[int] | None:
    """Real tokens per row. Not read back in a decode step on an accelerator."""
    if valid.shape[1] == 1 and valid.device.type != "cpu":
        return None
    counts: list[int] = valid.sum(dim=1).tolist()
    return counts


def states(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if query is None or key is None or value is None:
        raise ValueError("query, key and value must be given")
    return query, key, value


def is_recorded(device: torch.device) -> bool:
    """Whether a call is being compiled or captured. Then the host may decide nothing."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
