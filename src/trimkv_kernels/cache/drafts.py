"""Tokens that are not confirmed yet: attention sees them, but they are not in the slots."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Call, Inputs, Rows


class DraftState(Enum):
    """What happens to the tokens of the next call.

    OPEN: they go into the slots. HOLDING: they will wait; none waits yet. WAITING: they join the
    waiting tokens.
    """

    OPEN = "open"
    HOLDING = "holding"
    WAITING = "waiting"


@dataclass(frozen=True)
class Waiting:
    """Tokens that wait.

    Attributes:
        call: All of them as one call.
        inputs: Their states, of all layers or of one.
    """

    call: Call
    inputs: list[Inputs]

    def first_tokens(self, count: int) -> Waiting:
        """The first ``count`` columns."""
        inputs: list[Inputs] = [
            {name: None if x is None else x[..., :count, :] for name, x in layer.items()}
            for layer in self.inputs
        ]
        return Waiting(self.call.first_tokens(count), inputs)

    def token(self, column: int) -> Waiting:
        """One column."""
        inputs: list[Inputs] = [
            {name: None if x is None else x[..., column : column + 1, :] for name, x in i.items()}
            for i in self.inputs
        ]
        return Waiting(self.call.token(column), inputs)


class Drafts:
    """The tokens that wait to be confirmed, of every layer and row.

    Attributes:
        state: See :class:`DraftState`.
        call: The waiting tokens as one call.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self.call: Call | None = None
        self._inputs: list[Inputs] = []
        self.end()

    def end(self) -> None:
        """Stop holding, and forget the waiting tokens."""
        self.state = DraftState.OPEN
        self._forget()

    def hold(self) -> None:
        """Let the tokens of the next calls wait."""
        if self.state is DraftState.OPEN:
            self.state = DraftState.HOLDING

    @property
    def is_holding(self) -> bool:
        return self.state is not DraftState.OPEN

    @property
    def is_waiting(self) -> bool:
        return self.state is DraftState.WAITING

    def check_settled(self, method: str) -> None:
        """Check that no tokens wait.

        Raises:
            ValueError: tokens wait; ``method`` cannot be called now.
        """
        if self.is_waiting:
            raise ValueError(f"{method}() must not meet unconfirmed tokens: call settle() first")

    @property
    def num_columns(self) -> int:
        """Tokens of each row that wait, padding included."""
        return 0 if self.call is None else self.call.num_tokens

    def num_waiting(self, batch_size: int) -> Tensor:
        """``[batch]`` int32, real tokens of each row that wait."""
        if self.call is None:
            return torch.zeros(batch_size, dtype=torch.int32)
        return self.call.num_real

    def check_scale(self, scale: float | None) -> None:
        """Check that a layer attends to waiting tokens with the scale of all others.

        Raises:
            ValueError: it does not. The tokens are confirmed as one call, which has one scale.
        """
        if self.call is not None and scale != self.call.scale:
            raise ValueError(
                f"scale must be the same for all layers while tokens wait, {self.call.scale}, "
                f"got {scale}: call release() first"
            )

    def begin(self, call: Call) -> None:
        """Take a call's tokens; their states follow, layer by layer."""
        self.call = call if self.call is None else self.call.to(call.position.device).joined(call)
        self.state = DraftState.WAITING

    def extend(self, layer: int, inputs: Inputs, device: torch.device) -> Waiting:
        """Add a layer's new states; returns all waiting tokens, on the layer's device.

        Raises:
            ValueError: no call was begun.
        """
        if self.call is None:
            raise ValueError("layer must start at 0 for each call")
        joined = dict(inputs)
        for name, before in self._inputs[layer].items():
            new = inputs[name]
            if before is not None and new is not None:
                joined[name] = torch.cat((before, new), dim=-2)
        self._inputs[layer] = joined
        return Waiting(self.call.to(device), [joined])

    def take(self, drop: int) -> Waiting | None:
        """Return the waiting tokens and forget them. New tokens will wait.

        Args:
            drop: Last columns that the caller does not want; only checked here.

        Raises:
            ValueError: fewer wait.
        """
        waits = self.num_columns
        if not 0 <= drop <= waits:
            raise ValueError(f"drop must lie in [0, {waits}], the tokens that wait, got {drop}")
        if self.call is None:
            return None
        waiting = Waiting(self.call, self._inputs)
        self._forget()
        self.state = DraftState.HOLDING
        return waiting

    def drop(self, rows: Rows) -> None:
        """Forget the waiting tokens of some rows."""
        if self.call is not None:
            self.call = self.call.without(rows)

    def _forget(self) -> None:
        self.call = None
        self._inputs = [{} for _ in range(self._num_layers)]
