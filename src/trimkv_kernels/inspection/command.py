"""``trimkv-kernels inspect``: from a text to its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from trimkv_kernels.embedded import EMBEDDED_MODEL, FIRST_HELD_OUT_SEED, make_recall_text
from trimkv_kernels.files import write_files
from trimkv_kernels.inspection.html_page import page
from trimkv_kernels.inspection.pictures import (
    kept_figure,
    require_matplotlib,
    retention_figure,
    text_figure,
)
from trimkv_kernels.inspection.tracing import Trace, split_text, trace
from trimkv_kernels.policies.trimkv import TrimKV

_RECALL_TOKENS = 300


def draw(trace: Trace, words: Sequence[str], out: str | Path) -> list[Path]:
    """Write ``retention.png`` (TRIM-KV only), ``kept.png``, ``text.png`` and ``inspect.html``.

    Args:
        trace: Of any policy.
        words: The piece of text of each token; joined they are the text.
        out: Folder, made where there is none.

    Returns:
        What was written. Nothing is where one of them cannot be drawn.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: not one word for each token.
    """
    figures = {"kept.png": kept_figure(trace), "text.png": text_figure(trace, words)}
    if trace.log_beta is not None:
        figures = {"retention.png": retention_figure(trace), **figures}
    contents: dict[str, bytes | str] = {}
    for name, figure in figures.items():
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        contents[name] = buffer.getvalue()
    contents["inspect.html"] = page(trace, words).encode()
    write_files(out, contents)
    return [Path(out, name) for name in contents]


def inspect_text(
    out: str | Path,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    text_file: str | Path | None = None,
    policy: str | None = None,
    gates: str | Path | None = None,
    budget: int = 64,
    buffer: int = 1,
    prompt_length: int = 1,
) -> list[Path]:
    """Read a text on a bounded cache and draw what was kept.

    Args:
        out: Folder for the pictures.
        model: Folder or hub id; None is the small model that ships with the package.
        revision: Of the model on the hub.
        dtype, device: Of the model.
        text_file: UTF-8 text; None is one with facts and a question on one of them, in words that
            the small model knows.
        policy: A registered name; None is what :func:`trimkv_kernels.patch` chooses.
        gates: Folder or hub id of retention gates, for TRIM-KV.
        budget, buffer: Of the cache.
        prompt_length: Tokens that the first call reads at once.

    Returns:
        The files, as :func:`draw` gives them.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``gates`` for another policy, or what :func:`trace` and :func:`split_text`
            raise.
        OSError: a file cannot be read or written.
    """
    require_matplotlib()
    if gates is not None and policy not in (None, TrimKV.name):
        raise ValueError(f"gates are for policy {TrimKV.name!r}, got policy {policy!r}")
    folder = EMBEDDED_MODEL if model is None else model
    text = _recall_text() if text_file is None else Path(text_file).read_text("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    input_ids, words = split_text(tokenizer, text)
    causal = AutoModelForCausalLM.from_pretrained(folder, revision=revision, dtype=dtype)
    traced = trace(
        causal.eval().to(device),
        input_ids,
        policy if gates is None else TrimKV.from_pretrained(gates),
        prompt_length=prompt_length,
        budget=budget,
        buffer=buffer,
    )
    return draw(traced, words, out)


def _recall_text() -> str:
    text = make_recall_text(_RECALL_TOKENS, seed=FIRST_HELD_OUT_SEED)
    return text.prompt(text.questions[0])
