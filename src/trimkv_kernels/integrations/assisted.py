"""Assisted decoding whose text is the model's own: drafts end where an eviction could come.

``generate`` verifies a draft in one call. What a token of that call sees is what it would see alone
only while nothing would have been evicted before it. So a draft may fill the slots and no more, and
the call that reads the prompt carries none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trimkv_kernels.integrations.hf_cache import BoundedCache

Candidates = tuple[Tensor, Tensor | None]  # ids, and the draft model's logits


class LimitedDrafts:
    """A candidate generator of transformers that proposes what can be verified exactly.

    In all but its drafts it is the other one, also to ``isinstance``.

    Args:
        generator: The other one.
        cache: Of the model that verifies.
        before_first: Called before the first drafts.
    """

    def __init__(
        self, generator: Any, cache: BoundedCache, before_first: Callable[[], None]
    ) -> None:
        self._generator, self._cache = generator, cache
        self._before_first: Callable[[], None] | None = before_first

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Candidates:
        """As many of the other generator's candidates as there is room for."""
        if self._before_first is not None:
            self._before_first()
            self._before_first = None
        length, cache = input_ids.shape[1], self._cache
        room = cache.draft_room(length)
        ids, logits = self._generator.get_candidates(input_ids, *args, **kwargs)
        count = min(ids.shape[1] - length, room)
        if count > 0:
            cache.activate_past_recording()
        else:
            cache.stop_past_recording()
        if count == ids.shape[1] - length:
            return ids, logits
        return ids[:, : length + count], logits[:, :count] if logits is not None and count else None
