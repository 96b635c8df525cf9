"""Draw the picture of docs/quickstart.md: what one head holds while the quickstart's text is read.

    python scripts/quickstart_figure.py        # writes docs/images/quickstart.png

The text, the budget and the buffer are those of the page, taken from its first block of code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from trimkv_kernels.inspection import Trace, split_text, trace

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quickstart.md"
PICTURE = ROOT / "docs" / "images" / "quickstart.png"
LAYER, HEAD = 1, 0


def main() -> None:
    run: dict[str, Any] = {}
    (setup, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(setup, run)
    input_ids, words = split_text(run["tokenizer"], run["text"] + run["question"])
    fact = words.index(" amber")
    sizes = {"budget": 32, "buffer": 8}
    traces = [
        trace(run["model"], input_ids, policy, **sizes) for policy in ("trimkv", "streaming_llm")
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    draw_counts(axes[0], traces[0], **sizes)
    for axis, traced in zip(axes[1:], traces, strict=True):
        draw_kept(axis, traced, fact)
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


def draw_counts(axis: Any, traced: Trace, *, budget: int, buffer: int) -> None:
    """How many pairs the head holds after each token."""
    tokens = range(traced.num_tokens)
    held = [int(traced.kept(step)[LAYER, HEAD].sum()) for step in tokens]
    axis.plot([step + 1 for step in tokens], label="full cache", color="0.6")
    axis.plot([step + 1 for step in tokens], held, label="bounded cache", color="tab:blue")
    axis.axhline(budget, color="tab:blue", linewidth=0.8, linestyle=":")
    axis.axhline(budget + buffer, color="tab:red", linewidth=0.8, linestyle=":")
    axis.text(traced.num_tokens, budget - 3, f"budget {budget}", ha="right", va="top", fontsize=8)
    above = f"budget + buffer = {budget + buffer} slots"
    axis.text(traced.num_tokens, budget + buffer + 3, above, ha="right", fontsize=8)
    axis.set_ylim(0, 130)
    axis.set_xlabel("tokens read")
    axis.set_ylabel("pairs held by one head")
    axis.set_title("memory of one head", fontsize=10)
    axis.legend(loc="upper right", fontsize=8)


def draw_kept(axis: Any, traced: Trace, fact: int) -> None:
    """Which tokens the head holds after each token."""
    kept = [traced.kept(step)[LAYER, HEAD].tolist() for step in range(traced.num_tokens)]
    axis.imshow(kept, cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
    axis.annotate(
        "“alice keeps amber .”\nstands here",
        xy=(fact + 1, 165),
        xytext=(fact + 12, 225),
        arrowprops={"arrowstyle": "->", "color": "tab:red"},
        color="tab:red",
        fontsize=9,
    )
    axis.set_xlabel("position of a token in the text")
    axis.set_ylabel("tokens read")
    axis.set_title(f"{traced.policy}: pairs held (blue)", fontsize=10)


if __name__ == "__main__":
    main()
