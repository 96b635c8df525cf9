"""Confirm waiting tokens as if they had come one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimkv_kernels.cache.call import states
from trimkv_kernels.cache.drafts import Waiting

if TYPE_CHECKING:
    from trimkv_kernels.cache.bounded import BoundedKVCache


def replay(cache: BoundedKVCache, waiting: Waiting) -> None:
    """Give each token to the cache in a call of its own. The cache must not be holding."""
    for column in range(waiting.call.num_tokens):
        token = waiting.token(column)
        for layer, inputs in enumerate(token.inputs):
            query, key, value = states(inputs)
            cache.attend(
                layer,
                query,
                key,
                value,
                hidden_states=inputs["hidden_states"],
                query_nope=inputs["query_nope"],
                key_nope=inputs["key_nope"],
                valid=token.call.valid,
                scale=token.call.scale,
            )
        cache.evict()
