"""Pictures of a trace: decay, kept slots over time, and what was dropped of a text and its images.

Colours are safe for the colour-blind: viridis, and the blue, orange and grey of Okabe and Ito.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimkv_kernels.inspection.tracing import Trace
from trimkv_kernels.integrations.images import runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
_FUTURE = "#ececec"
_DROPPED = "#ffffff"
_KEPT = "#0072b2"
_DROPPED_TEXT = "#6b6b6b"
_IMAGE = "#e69f00"
_COLUMNS = 100  # characters of a line of text
_LINE = 0.24  # inches
_FONT_SIZE = 9
# the advance of DejaVu Sans Mono, the one monospaced font that comes with matplotlib
_CHARACTER = 0.602 * _FONT_SIZE / 72  # inches


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        ImportError: it is missing; the message says how to get it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'trimkv-kernels[inspect]'"
        ) from error


def retention_figure(trace: Trace) -> Figure:
    """``beta_i ** (t - i)`` of token ``i`` at step ``t``, one panel per layer and KV head.

    Args:
        trace: Of TRIM-KV.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the policy has no decay.
    """
    require_matplotlib()
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(bad=_FUTURE)
    title = "Retention: what is left of token i at step t,  $\\beta_i^{\\,t-i}$"
    figure, image = _panels(trace, trace.retention, title, colours)
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.03, pad=0.02, aspect=30)
    bar.set_label("$\\beta_i^{\\,t-i}$")
    return figure


def kept_figure(trace: Trace) -> Figure:
    """Which tokens the slots hold after each step, one panel per layer and KV head.

    A line below a panel marks image tokens.

    Args:
        trace: Of any policy.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ListedColormap([_DROPPED, _KEPT]).with_extremes(bad=_FUTURE)
    title = f"Kept slots over time:  {trace.policy}, budget {trace.budget}"
    held = trace.kept(trace.num_tokens - 1).sum(dim=-1)  # to show how heads share a budget
    figure, _ = _panels(trace, lambda step: trace.kept(step).float(), title, colours, held)
    key = [
        Patch(facecolor=colour, edgecolor="#888888", label=label)
        for colour, label in ((_KEPT, "kept"), (_DROPPED, "dropped"), (_FUTURE, "not read yet"))
    ]
    if _image_runs(trace):
        key.append(Patch(facecolor=_IMAGE, edgecolor="#888888", label="tokens of an image"))
    figure.legend(
        handles=key, loc="outside lower center", ncols=len(key), frameon=False, fontsize=9
    )
    return figure


def text_figure(
    trace: Trace, words: Sequence[str], *, layer: int | None = None, head: int | None = None
) -> Figure:
    """The text, each word coloured by the share of heads that hold it after the last step.

    A word that no head holds is grey and struck through. Image tokens have a line below.

    Args:
        trace: Of any policy.
        words: The piece of text of each token; joined they are the text.
        layer, head: Only this layer's of the trace, only this KV head's; None is all of them.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: not one word for each token, or there is no such layer or head.
    """
    check_words(trace, words)
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    share = _share(trace.kept(trace.num_tokens - 1), layer, head)
    runs, num_lines = _lay_out(words)
    width, height = _COLUMNS * _CHARACTER + 0.4, num_lines * _LINE + 1.3
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0.2 / width, 0.75 / height, 1 - 0.4 / width, 1 - 1.3 / height))
    axes.set(xlim=(0, _COLUMNS), ylim=(num_lines, 0))
    axes.axis("off")
    colours = colormaps["Blues"].resampled(256)
    for token, line, column, text in runs:
        is_image = trace.is_image is not None and bool(trace.is_image[token])
        _draw_run(axes, text, line, column, float(share[token]), colours, is_image)
    layers = _named(trace) if layer is None else f"layer {trace.layers[layer]}"
    heads = "all heads" if head is None else f"head {head}"
    figure.text(
        0.2 / width,
        1 - 0.32 / height,
        f"Words kept at the end:  {trace.policy}, budget {trace.budget} of {trace.num_tokens} "
        f"tokens ({layers}, {heads})",
        fontsize=11,
        weight="bold",
        parse_math=False,
    )
    bar_axes = figure.add_axes((0.2 / width, 0.5 / height, 2.6 / width, 0.12 / height))
    bar = figure.colorbar(ScalarMappable(cmap=colours), cax=bar_axes, orientation="horizontal")
    bar.set_label("share of heads that hold the word", fontsize=8, labelpad=2)
    bar.ax.tick_params(labelsize=7, length=2)
    note = "struck through: no head holds it"
    if _image_runs(trace):
        note += "; line below: token of an image"
    figure.text(3.1 / width, 0.5 / height, note, fontsize=8, color=_DROPPED_TEXT)
    return figure


def image_figure(
    trace: Trace,
    *,
    pictures: Sequence[Any] = (),
    layer: int | None = None,
    head: int | None = None,
) -> Figure:
    """The images, each token coloured by the share of heads that hold it after the last step.

    Args:
        trace: Of a text with images.
        pictures: The images, each ``[height, width, 3]`` in [0, 1], in order, to be drawn above
            what was kept of them. They may be left out.
        layer, head: Only this layer's of the trace, only this KV head's; None is all of them.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the trace does not know the images' rows and columns, there is not one picture
            for each image, or there is no such layer or head.
    """
    if trace.is_image is None or not trace.grids:
        raise ValueError(
            "the trace must know rows and columns of its images: trace(..., images=...) of a "
            "vision-language model whose processor gives them"
        )
    if pictures and len(pictures) != len(trace.grids):
        raise ValueError(
            f"pictures must have one entry for each of {len(trace.grids)} images and frames, got "
            f"{len(pictures)}"
        )
    require_matplotlib()
    from matplotlib.figure import Figure

    share = _share(trace.kept(trace.num_tokens - 1), layer, head)[trace.is_image]
    rows, columns = 2 if pictures else 1, len(trace.grids)
    size = max(2.8 * columns + 1.2, 4.6), 2.8 * rows + 0.6  # inches
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, picture in zip(grid[0], pictures, strict=False):
        axes.imshow(picture, interpolation="nearest")
    shown: Any = None
    start = 0
    for index, (axes, (height, width)) in enumerate(zip(grid[-1], trace.grids, strict=True)):
        tokens = share[start : start + height * width].reshape(height, width)
        shown = axes.imshow(tokens.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        name = "image" if columns == 1 else f"image {index}"
        axes.set_title(f"{name}: {float(tokens.mean()):.0%} held", fontsize=9)
        start += height * width
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    bar = figure.colorbar(shown, ax=grid.ravel().tolist(), fraction=0.05, pad=0.02, aspect=30)
    bar.set_label("share of heads that hold the token", fontsize=8)
    figure.suptitle(
        f"Kept of the image:  {trace.policy}, budget {trace.budget} of {trace.num_tokens} tokens",
        fontsize=9,
        weight="bold",
    )
    return figure


def check_words(trace: Trace, words: Sequence[str]) -> None:
    """Check that there is one word for each token.

    Raises:
        ValueError: the numbers differ.
    """
    if len(words) != trace.num_tokens:
        raise ValueError(
            f"words must have one entry for each of {trace.num_tokens} tokens, got {len(words)}"
        )


def _panels(
    trace: Trace,
    values: Callable[[int], Tensor],
    title: str,
    colours: Any,
    held: Tensor | None = None,
) -> tuple[Figure, Any]:
    """A grid of ``values(step)`` ``[layers, heads, tokens]``, tokens to the right, steps down.

    ``held`` ``[layers, heads]`` is named in the titles: the pairs of each head at the end.
    """
    from matplotlib.figure import Figure

    num_layers, num_heads, num_tokens = trace.dropped_at.shape
    size = 2.6 if num_layers * num_heads <= 24 else 1.2  # inches
    points = _points(num_tokens, int(size * DPI))
    maps = torch.stack([values(int(step))[..., points] for step in points], dim=2)
    maps = maps.masked_fill(points[:, None] < points, torch.nan)
    figure = Figure(
        figsize=(num_heads * size + 1.4, num_layers * size + 1.0), dpi=DPI, layout="constrained"
    )
    grid = figure.subplots(num_layers, num_heads, squeeze=False)
    image = None
    for layer in range(num_layers):
        for head in range(num_heads):
            axes = grid[layer, head]
            image = axes.imshow(
                maps[layer, head].numpy(),
                extent=(-0.5, num_tokens - 0.5, num_tokens - 0.5, -0.5),
                cmap=colours,
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            name = f"layer {trace.layers[layer]}, head {head}"
            if held is not None:
                name += f": {int(held[layer, head])} held"
            axes.set_title(name, fontsize=9 if size > 2 else 6)
            axes.tick_params(labelsize=7)
            axes.label_outer()
            for start, stop in _image_runs(trace):
                axes.plot(
                    [start - 0.5, stop - 0.5],
                    [num_tokens - 0.5] * 2,
                    color=_IMAGE,
                    linewidth=4,
                    solid_capstyle="butt",
                    clip_on=False,
                )
        grid[layer, 0].set_ylabel("step t", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("token i", fontsize=8)
    figure.suptitle(title, fontsize=11, weight="bold")
    return figure, image


def _image_runs(trace: Trace) -> list[tuple[int, int]]:
    """``(start, stop)`` of each run of image tokens."""
    return [] if trace.is_image is None else runs(trace.is_image.tolist())


def _points(num_tokens: int, at_most: int) -> Tensor:
    """Evenly spread tokens, or steps, one per pixel of a panel, with both ends."""
    return torch.linspace(0, num_tokens - 1, min(num_tokens, at_most)).round().long()


def _share(kept: Tensor, layer: int | None, head: int | None) -> Tensor:
    """Share of the chosen heads that hold each token: ``[tokens]`` fp32."""
    for name, index, size in (("layer", layer, kept.shape[0]), ("head", head, kept.shape[1])):
        if index is not None and not 0 <= index < size:
            raise ValueError(f"{name} must be in [0, {size}) or None, got {index}")
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    heads = slice(None) if head is None else slice(head, head + 1)
    return kept[layers, heads].float().mean(dim=(0, 1))


def _named(trace: Trace) -> str:
    if trace.chosen is None:
        return "all layers"
    return f"layer{'s' * (len(trace.chosen) > 1)} {', '.join(map(str, trace.chosen))}"


def _lay_out(words: Sequence[str]) -> tuple[list[tuple[int, int, int, str]], int]:
    """``(token, line, column, text)`` of each piece to draw, and the number of lines."""
    runs: list[tuple[int, int, int, str]] = []
    line = column = 0
    for token, word in enumerate(words):
        for part in word.replace("\t", "    ").splitlines(keepends=True):
            text = part.rstrip("\r\n")
            if column and column + len(text) > _COLUMNS:
                line, column, text = line + 1, 0, text.lstrip()
            while text:
                cut, text = text[:_COLUMNS], text[_COLUMNS:]
                runs.append((token, line, column, cut))
                line, column = (line + 1, 0) if text else (line, column + len(cut))
            if part[-1:] in "\r\n":
                line, column = line + 1, 0
    return runs, line + 1


def _draw_run(
    axes: Any,
    text: str,
    line: int,
    column: int,
    share: float,
    colours: Callable[[float], Any],
    is_image: bool,
) -> None:
    from matplotlib.patches import Rectangle

    shown = text.lstrip()
    start, width = column + len(text) - len(shown), len(shown)
    if not width:
        return
    if share > 0:
        box = Rectangle((start, line + 0.08), width, 0.84, color=colours(share), linewidth=0)
        axes.add_patch(box)
    else:
        axes.plot([start, start + width], [line + 0.52] * 2, color=_DROPPED_TEXT, linewidth=0.7)
    if is_image:
        axes.plot([start, start + width], [line + 0.94] * 2, color=_IMAGE, linewidth=1.5)
    ink = _DROPPED_TEXT if share == 0 else "white" if share > 0.6 else "black"
    axes.text(
        start,
        line + 0.5,
        shown,
        family="DejaVu Sans Mono",
        fontsize=_FONT_SIZE,
        color=ink,
        verticalalignment="center_baseline",
        parse_math=False,
    )
