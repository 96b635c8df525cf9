"""Assisted decoding that gives the model's own text: drafts end before a possible eviction.

``generate`` verifies a draft in one call. A token of that call sees the same pairs as on its own
only if nothing would have been evicted before it. So a draft may at most fill the slots, and the
call that reads the prompt has no draft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trimkv_kernels.integrations.hf_cache import BoundedCache

Candidates = tuple[Tensor, Tensor | None]  # ids, and the draft model's logits


class LimitedDrafts:
    """A candidate generator of transformers that proposes what can be verified exactly.

    In everything else it acts as the wrapped generator, also for ``isinstance``.

    Args:
        generator: The wrapped generator.
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
        """The wrapped generator's candidates, as many as there is room for."""
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
