"""What the tests of other libraries share: two comparisons with an unpatched model.

Under eviction, logits are compared with the full cache masked to what the bounded one holds, and
what it holds with the rule of ``key_norm`` in plain Python on the full cache's keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tiny
import torch
from torch import Tensor

import trimkv_kernels as tk
from trimkv_kernels.testing import masked_reference

BUDGET, BUFFER, SINKS, RECENT = 12, 4, 1, 2
OPTIONS = {"budget": BUDGET, "buffer": BUFFER, "sinks": SINKS, "recent": RECENT}
CALLS = (20, *[1] * 9, 3, *[1] * 6)  # a prompt, steps, a later turn, steps
WHOLE = {"budget": 128, "buffer": 1}  # nothing is evicted


def distinct() -> Tensor:
    """``[1, tokens]`` for ``CALLS``. No token comes twice: its keys would have the same norm."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(94, generator=generator)[None, : sum(CALLS)] + 3


def expected(policy: str, keys: Tensor, calls: Sequence[int]) -> list[int]:
    """Positions that one head holds after some calls.

    Args:
        policy: ``key_norm``, or ``streaming_llm``, which depends on no number of the model.
        keys: ``[tokens, head_dim]``, of the full cache.
        calls: How many tokens each call reads.
    """
    norm = keys.float().norm(dim=-1).tolist()
    if policy == "streaming_llm":
        norm = [-position for position in range(len(norm))]
    held: list[int] = []
    t = 0
    for new in calls:
        held += range(t, t + new)
        t += new
        if len(held) >= BUDGET + BUFFER:
            safe = {p for p in held if p < SINKS or p >= t - RECENT}
            others = sorted((p for p in held if p not in safe), key=lambda p: norm[p])
            held = sorted(safe | set(others[: BUDGET - len(safe)]))
    return held


@contextmanager
def latest_cache(model: Any) -> Iterator[list[Any]]:
    """Collect the caches that a model returns."""
    found: list[Any] = []
    hook = model.register_forward_hook(lambda *call: found.append(call[-1].past_key_values))
    try:
        yield found
    finally:
        hook.remove()


def check_evicting(
    model: Any, stock: Any, tolerance: float = 1e-4, policy: str = "key_norm"
) -> None:
    """Logits and kept positions of a model that evicts.

    Args:
        model: A model that is patched for this comparison.
        stock: One that computes the same and is not patched.
        tolerance: Of logits, absolute and relative.
        policy: See :func:`expected`.
    """
    with tk.patch(model, policy, **OPTIONS) as handle:
        check_patched(handle, model, stock, tolerance, policy)


def check_patched(
    handle: Any, model: Any, stock: Any, tolerance: float = 1e-4, policy: str = "key_norm"
) -> None:
    """As :func:`check_evicting`, of a model that is patched with ``OPTIONS``."""
    text = distinct()
    cache = handle.new_cache()
    with latest_cache(stock) as caches:
        got, want = masked_reference(model, stock, text, calls=CALLS, cache=cache)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    assert int(cache.stats().evictions.min()) > 0
    for index, layer in enumerate(caches[-1].layers):
        for head, keys in enumerate(layer.keys[0]):
            held = sorted(p for p in cache.positions(index)[0, head].tolist() if p >= 0)
            assert held == expected(policy, keys, CALLS), (index, head)


def check_whole(model: Any, stock: Any, **call: Any) -> None:
    """With a budget that never evicts, ``generate`` gives the unpatched model's text and logits."""
    call = {
        "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True,
        **tiny.GREEDY, **call,
    }  # fmt: skip
    text = {"input_ids": tiny.ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    want = stock.generate(**text, **call)
    with tk.patch(model, "key_norm", **WHOLE):
        got = model.generate(**text, **call)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
    )
