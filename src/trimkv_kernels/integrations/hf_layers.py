"""The layers of a bounded cache, as transformers lists them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from trimkv_kernels.cache import BoundedKVCache


@dataclass
class Contents:
    """What a bounded cache holds. Layers refer to this, not to the cache, to avoid a cycle.

    Attributes:
        slots: None before the first call.
        sliding: The caches of the layers with a sliding window.
    """

    slots: BoundedKVCache | None = None
    sliding: list[DynamicSlidingWindowLayer] = field(default_factory=list)

    def seq_length(self) -> int | Tensor:
        """Tokens seen, padding included: a device scalar; an int if there are sliding layers."""
        if self.sliding:
            return self.sliding[0].get_seq_length()
        # a copy, so that the next call does not change the caller's number
        return 0 if self.slots is None else self.slots.seen.clone()


class BoundedLayer(CacheLayerMixin):
    """One layer of a :class:`BoundedCache`; it holds no state of its own."""

    def __init__(self, contents: Contents, slot_layer: int) -> None:
        self._contents = contents
        self.slot_layer = slot_layer

    @property
    def is_initialized(self) -> bool:
        return self._contents.slots is not None

    @property
    def keys(self) -> Tensor | None:
        slots = self._contents.slots
        return None if slots is None else slots.keys(self.slot_layer)

    @property
    def values(self) -> Tensor | None:
        slots = self._contents.slots
        return None if slots is None else slots.values(self.slot_layer)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        refuse("lazy_initialization", "the slots are made by the model's first call")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        refuse("update", "only a model patched with trimkv_kernels.patch() can use this cache")

    def get_seq_length(self, *args: Any) -> int | Tensor:
        return self._contents.seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # masks of bounded layers are only used for a prompt on an empty cache
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        refuse("reset of one layer", "call reset() of the cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        refuse("reorder_cache of one layer", "call reorder_cache() of the cache")


def make_layers(contents: Contents, windows: Sequence[int | None]) -> list[CacheLayerMixin]:
    """A layer for each window; None makes a bounded one. Sliding ones are put in ``contents``.

    Bounded layers are numbered from 0, as in the slots.
    """
    layers: list[CacheLayerMixin] = []
    bounded = 0
    for window in windows:
        if window is None:
            layers.append(BoundedLayer(contents, bounded))
            bounded += 1
        else:
            layers.append(DynamicSlidingWindowLayer(sliding_window=window))
    contents.sliding = sliding(layers)
    return layers


def copies_of(layers: Sequence[CacheLayerMixin], contents: Contents) -> list[CacheLayerMixin]:
    """The same layers with other ``contents``, which get the sliding ones."""
    copied = [
        BoundedLayer(contents, layer.slot_layer)
        if isinstance(layer, BoundedLayer)
        else copy.copy(layer)
        for layer in layers
    ]
    contents.sliding = sliding(copied)
    return copied


def sliding(layers: Sequence[CacheLayerMixin]) -> list[DynamicSlidingWindowLayer]:
    """The layers with a sliding window."""
    return [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]


def records(layer: DynamicSlidingWindowLayer) -> bool:
    """Whether a layer keeps tokens that left its window, so that tokens can be taken back."""
    return bool(getattr(layer, "record_past", False))


def renew_sliding(layers: list[CacheLayerMixin], contents: Contents) -> None:
    """Replace sliding layers by empty ones, also in ``contents``."""
    for index, layer in enumerate(layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            layers[index] = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    contents.sliding = sliding(layers)


def check_sliding_crop(layers: Sequence[DynamicSlidingWindowLayer]) -> None:
    """Check that the last tokens of sliding layers can be taken back.

    Raises:
        ValueError: the tokens that would enter the window again were dropped.
    """
    for layer in layers:
        if not records(layer) and layer.get_seq_length() >= layer.sliding_window:
            raise ValueError(
                "tokens cannot be taken back: layers with a sliding window have dropped those "
                "before them; call activate_past_recording() before tokens that may be"
            )


def refuse(method: str, alternative: str) -> NoReturn:
    """Raise for a method that a bounded cache does not support.

    Raises:
        NotImplementedError: always; names the alternative.
    """
    raise NotImplementedError(f"a bounded cache does not support {method}: {alternative}")


@contextmanager
def own_words() -> Iterator[None]:
    """Make errors of the slots name the methods of a transformers cache."""
    try:
        yield
    except ValueError as error:
        message = str(error).replace("hold()", "activate_past_recording()")
        message = message.replace("settle()", "stop_past_recording()")
        raise ValueError(message) from None
