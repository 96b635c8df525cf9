"""The trace as one HTML file without further files: a slider over steps, and the text below it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.resources import files

from torch import Tensor

from trimkv_kernels.inspection.pictures import check_words
from trimkv_kernels.inspection.tracing import Trace

_DATA = "__TRACE__"


def page(trace: Trace, words: Sequence[str]) -> str:
    """The HTML of a trace.

    All text is inserted as data and shown as text, never as markup. A token takes about 5 bytes
    for each layer and KV head, and twice as much with TRIM-KV's decay.

    Args:
        trace: Of any policy.
        words: The piece of text of each token; joined they are the text.

    Raises:
        ValueError: not one word for each token.
    """
    check_words(trace, words)
    data = json.dumps(
        {
            "policy": trace.policy,
            "budget": trace.budget,
            "shape": list(trace.dropped_at.shape),
            "layers": list(trace.layers),
            "words": list(words),
            "isImage": None if trace.is_image is None else trace.is_image.int().tolist(),
            "droppedAt": _packed(trace.dropped_at, "<i4"),
            "logBeta": None if trace.log_beta is None else _packed(trace.log_beta, "<f4"),
        }
    )
    # json.dumps leaves only ASCII; without "<" no text can close the script element around it
    data = data.replace("<", "\\u003c")
    return files(__package__).joinpath("page.html").read_text("utf-8").replace(_DATA, data)


def _packed(tensor: Tensor, dtype: str) -> str:
    return base64.b64encode(tensor.numpy().astype(dtype).tobytes()).decode("ascii")
