"""See what a policy keeps: a trace of a text, pictures of it, and a page with a slider over steps.

::

    input_ids, words = split_text(tokenizer, text)
    draw(trace(model, input_ids, policy, budget=64, buffer=1), words, "pictures")
"""

from trimkv_kernels.inspection.command import draw, inspect_text
from trimkv_kernels.inspection.html_page import page
from trimkv_kernels.inspection.pictures import (
    image_figure,
    kept_figure,
    retention_figure,
    text_figure,
)
from trimkv_kernels.inspection.tracing import Trace, split_text, trace

__all__ = [
    "Trace",
    "draw",
    "image_figure",
    "inspect_text",
    "kept_figure",
    "page",
    "retention_figure",
    "split_text",
    "text_figure",
    "trace",
]
