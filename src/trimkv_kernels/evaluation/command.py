"""``trimkv-kernels perplexity`` and ``kl``: from a text file to its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from trimkv_kernels.embedded import EMBEDDED_MODEL, FIRST_HELD_OUT_SEED, make_recall_text
from trimkv_kernels.evaluation.perplexity import Divergence, Perplexity, kl, perplexity
from trimkv_kernels.policies import RetentionPolicy
from trimkv_kernels.policies.trimkv import TrimKV

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
        model: Folder or hub id; None is the small model that ships with the package.
        revision: Of the model on the hub.
        dtype, device: Of the model.
        text_file: UTF-8 text; None is one in words that the small model knows.
        policy: A registered name; None is what :func:`trimkv_kernels.patch` chooses.
        gates: Folder or hub id of retention gates, for TRIM-KV.
        options: Of the measure: ``chunk``, ``budget``, ``buffer``.

    Returns:
        What :func:`perplexity` or :func:`kl` returns.

    Raises:
        ValueError: ``measure`` is unknown, ``gates`` for another policy, the tokenizer knows too
            few words of the text, or what the measure raises.
        OSError: a file cannot be read.
    """
    if measure not in _MEASURES:
        raise ValueError(f"measure must be one of {', '.join(_MEASURES)}, got {measure!r}")
    chosen = policy_of(policy, gates)
    folder = EMBEDDED_MODEL if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    if text_file is None:
        text = make_recall_text(_RECALL_TOKENS, seed=FIRST_HELD_OUT_SEED).text
    else:
        text = Path(text_file).read_text("utf-8")
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    unknown = int((input_ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token else 0
    if 2 * unknown > input_ids.numel():
        raise ValueError(
            f"the tokenizer of {folder} does not know {unknown:,} of the text's "
            f"{input_ids.numel():,} tokens: pass a model that does"
        )
    causal = AutoModelForCausalLM.from_pretrained(folder, revision=revision, dtype=dtype)
    return _MEASURES[measure](causal.eval().to(device), input_ids, chosen, **options)


def policy_of(
    policy: RetentionPolicy | str | None, gates: str | Path | None
) -> RetentionPolicy | str | None:
    """What to pass to :func:`trimkv_kernels.patch` for a policy, if one is named, and gates.

    Args:
        policy: A policy, a registered name or None.
        gates: Folder or hub id of retention gates, or None.

    Raises:
        ValueError: ``gates`` for a policy other than TRIM-KV, or they cannot be read.
    """
    if gates is None:
        return policy
    if policy not in (None, TrimKV.name):
        raise ValueError(f"gates are for policy {TrimKV.name!r}, got policy {policy!r}")
    return TrimKV.from_pretrained(gates)
