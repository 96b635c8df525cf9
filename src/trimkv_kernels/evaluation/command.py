"""``trimkv-kernels perplexity`` and ``kl``: the measures of a text file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimkv_kernels.embedded import FIRST_HELD_OUT_SEED, make_recall_text
from trimkv_kernels.evaluation.perplexity import Divergence, Perplexity, kl, perplexity
from trimkv_kernels.loading import ModelSource, read_text
from trimkv_kernels.policies.trimkv import policy_of

_RECALL_TOKENS = 1000
_MEASURES: dict[str, Callable[..., Perplexity | Divergence]] = {
    "perplexity": perplexity,
    "kl": kl,
}


def measure_text(
    measure: str,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    text_file: str | Path | None = None,
    policy: str | None = None,
    gates: str | Path | None = None,
    **options: Any,
) -> Perplexity | Divergence:
    """Read a text on a bounded cache and measure what that costs.

    Args:
        measure: ``"perplexity"`` or ``"kl"``.
        model: Folder or hub id; None is the small model in this package.
        revision: Of the model on the hub.
        dtype, device: Of the model.
        text_file: UTF-8 text; None is a text in words that the small model knows.
        policy: A registered name; None is what :func:`trimkv_kernels.patch` chooses.
        gates: Folder or hub id of retention gates, for TRIM-KV.
        options: Of the measure: ``chunk``, ``budget``, ``buffer``, ``progress``.

    Returns:
        What :func:`perplexity` or :func:`kl` returns.

    Raises:
        ValueError: ``measure`` or ``policy`` is unknown, ``gates`` are for another policy, the
            tokenizer knows too few words of the text, or what the measure and
            :class:`~trimkv_kernels.loading.ModelSource` raise. What can be checked without the
            model is checked before it loads.
        OSError: a file cannot be read.
    """
    if measure not in _MEASURES:
        raise ValueError(f"measure must be one of {', '.join(_MEASURES)}, got {measure!r}")
    chosen = policy_of(policy, gates)
    source = ModelSource(model, revision, dtype, device)
    if text_file is None:
        text = make_recall_text(_RECALL_TOKENS, seed=FIRST_HELD_OUT_SEED).text
    else:
        text = read_text(text_file)
    tokenizer = source.load_tokenizer()
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    unknown = int((input_ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token else 0
    if 2 * unknown > input_ids.numel():
        raise ValueError(
            f"the tokenizer of {source.name} does not know {unknown:,} of the text's "
            f"{input_ids.numel():,} tokens: pass a model that does"
        )
    return _MEASURES[measure](source.load_model(), input_ids, chosen, **options)
