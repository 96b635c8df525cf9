"""What a cache did, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.cache.state import State


@dataclass(frozen=True)
class CacheStats:
    """What a cache did, read from the device.

    Attributes:
        tokens_seen: Real tokens of each batch row.
        slots_used: ``[layers, batch, num_kv_heads]`` int32, slots filled now.
        evictions: ``[layers, batch, num_kv_heads]`` int32, pairs dropped so far. Drafts that are
            not confirmed yet count neither as used nor as evicted.
        bytes_held: Bytes of all state, metadata included.
        bytes_full: Bytes of the keys and values a full cache would hold for the same tokens.
        nan_layers: Layers in which a score was NaN.
        budget_reached: Whether any head had to evict.
    """

    tokens_seen: list[int]
    slots_used: Tensor
    evictions: Tensor
    bytes_held: int
    bytes_full: int
    nan_layers: list[int]

    @property
    def budget_reached(self) -> bool:
        return bool((self.evictions > 0).any())

    def checked(self, policy: str, num_slots: int) -> CacheStats:
        """Return these figures unless a budget was never reached or a score was NaN.

        Raises:
            RuntimeError: one of these; the message says which.
        """
        if self.nan_layers:
            raise RuntimeError(f"policy {policy!r} gave NaN scores in layers {self.nan_layers}")
        if not self.budget_reached:
            raise RuntimeError(
                f"policy {policy!r} never had to evict: {max(self.tokens_seen)} tokens seen, "
                f"eviction starts at budget + buffer = {num_slots}; lower the budget"
            )
        return self

    def __str__(self) -> str:
        used = self.slots_used
        differ = bool((used.amax(dim=(0, 2)) > used.amin(dim=(0, 2))).any())
        shares = f"heads hold {int(used.min())} to {int(used.max())} pairs, " if differ else ""
        return (
            f"{max(self.tokens_seen, default=0)} tokens seen, "
            f"at most {int(used.max())} slots used, {shares}"
            f"{int(self.evictions.sum())} pairs evicted, "
            f"{self.bytes_held:,} bytes held (full cache: {self.bytes_full:,})"
        )


def read_stats(state: State, num_layers: int, waiting: Tensor, pair_bytes: int) -> CacheStats:
    """Read what a cache did from the device.

    Args:
        state: The state of the cache.
        num_layers: Layers of the cache.
        waiting: ``[batch]`` int32, tokens that wait to be confirmed.
        pair_bytes: Bytes of one key and value in all layers and heads.
    """
    device = state.clock.t.device
    storages = [state.storage(layer) for layer in range(num_layers)]
    used = [
        x.num_valid(layer, state.t(layer) - waiting.to(x.device)).to(device)
        for layer, x in enumerate(storages)
    ]
    nan_seen = [x.nan_seen(layer).to(device) for layer, x in enumerate(storages)]
    slots_used, seen = torch.stack(used).cpu(), state.clock.t.cpu()
    return CacheStats(
        tokens_seen=seen.tolist(),
        slots_used=slots_used,
        evictions=(seen - waiting.cpu())[None, :, None] - slots_used,
        bytes_held=state.nbytes,
        bytes_full=int(seen.sum()) * pair_bytes,
        nan_layers=torch.stack(nan_seen).nonzero().flatten().tolist(),
    )
