"""``trimkv-kernels inspect``: pictures of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_kernels.embedded import FIRST_HELD_OUT_SEED, make_recall_text
from trimkv_kernels.files import write_files
from trimkv_kernels.inspection.html_page import page
from trimkv_kernels.inspection.pictures import (
    image_figure,
    kept_figure,
    require_matplotlib,
    retention_figure,
    text_figure,
)
from trimkv_kernels.inspection.tracing import Trace, check_layers, split_text, trace
from trimkv_kernels.loading import ModelSource, read_text
from trimkv_kernels.policies.trimkv import policy_of
from trimkv_kernels.progress import count_off

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RECALL_TOKENS = 300


def draw(
    trace: Trace, words: Sequence[str], out: str | Path, *, progress: bool = False
) -> list[Path]:
    """Write ``kept.png``, ``text.png`` and ``inspect.html``.

    For TRIM-KV also ``retention.png``, and for a text with images ``image.png``.

    Args:
        trace: Of any policy.
        words: The piece of text of each token; joined they are the text.
        out: Folder; made when missing.
        progress: Show a bar if it takes long.

    Returns:
        The files that were written. If one of them cannot be drawn, none is written.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: not one word for each token.
    """
    makers: dict[str, Callable[[], Figure]] = {
        "kept.png": lambda: kept_figure(trace),
        "text.png": lambda: text_figure(trace, words),
    }
    if trace.log_beta is not None:
        makers = {"retention.png": lambda: retention_figure(trace), **makers}
    if trace.grids:
        makers["image.png"] = lambda: image_figure(trace)
    contents: dict[str, bytes | str] = {}
    for name, make in count_off(makers.items(), "drawing", total=len(makers), shown=progress):
        buffer = BytesIO()
        make().savefig(buffer, format="png")
        contents[name] = buffer.getvalue()
    contents["inspect.html"] = page(trace, words)
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
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> list[Path]:
    """Read a text on a bounded cache and draw what was kept.

    Args:
        out: Folder for the pictures.
        model: Folder or hub id; None is the small model in this package.
        revision: Of the model on the hub.
        dtype, device: Of the model.
        text_file: UTF-8 text; None is a text with facts and a question about one of them, in words
            that the small model knows.
        policy: A registered name; None is what :func:`trimkv_kernels.patch` chooses.
        gates: Folder or hub id of retention gates, for TRIM-KV.
        budget, buffer: Of the cache.
        prompt_length: Tokens that the first call reads at once.
        layers: Numbers of the layers to draw; None is all.
        progress: Show bars if it takes long.

    Returns:
        The files that :func:`draw` wrote.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``policy`` is unknown, ``gates`` are for another policy, there is no such layer,
            or what :class:`ModelSource`, :func:`trace` and :func:`split_text` raise. What can be
            checked without the model is checked before it loads.
        OSError: a file cannot be read or written.
    """
    require_matplotlib()
    if Path(out).is_file():
        raise ValueError(f"out must be a folder, got the file {out}")
    chosen = policy_of(policy, gates)
    source = ModelSource(model, revision, dtype, device)
    text = _recall_text() if text_file is None else read_text(text_file)
    if layers is not None:
        check_layers(layers, range(source.load_config().num_hidden_layers))
    input_ids, words = split_text(source.load_tokenizer(), text)
    traced = trace(
        source.load_model(),
        input_ids,
        chosen,
        prompt_length=prompt_length,
        progress=progress,
        budget=budget,
        buffer=buffer,
    )
    return draw(traced.select(layers), words, out, progress=progress)


def _recall_text() -> str:
    text = make_recall_text(_RECALL_TOKENS, seed=FIRST_HELD_OUT_SEED)
    return text.prompt(text.questions[0])
