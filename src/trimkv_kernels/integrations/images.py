"""Images in a prompt: which tokens stand for them, and what the decoder stack gets instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from trimkv_kernels.checks import Span
from trimkv_kernels.integrations.chat import ChatRoles
from trimkv_kernels.integrations.discovery import ModelParts, argument_names
from trimkv_kernels.integrations.instance_patch import InstancePatch
from trimkv_kernels.integrations.padding import in_order, move_positions
from trimkv_kernels.integrations.prompt_pins import SpanFinder

# What a body computes from a prompt with images: with tokens at dim 1, at the last dim, and per
# image token, for each of the first layers.
_EMBEDS, _POSITIONS, _MASK, _FEATURES = (
    "inputs_embeds",
    "position_ids",
    "visual_pos_masks",
    "deepstack_visual_embeds",
)
_KINDS = "mm_token_type_ids"
_OWN_ARGUMENTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class TokenFinder:
    """Pins image tokens, or all others, for ``patch(..., protect="image")`` or ``"text"``.

    Generated tokens are not searched.

    Args:
        ids: The image tokens.
        images: Pin these; False pins all others.
    """

    ids: tuple[int, ...]
    images: bool

    def find(
        self, input_ids: Tensor, valid: Tensor | None, seen: Sequence[int]
    ) -> list[list[tuple[int, int]]]:
        """See :meth:`~trimkv_kernels.integrations.prompt_pins.SpanFinder.find`."""
        chosen = is_image(input_ids, self.ids) == self.images
        real = [None] * len(seen) if valid is None else valid.tolist()
        spans = []
        for row, mask, start in zip(chosen.tolist(), real, seen, strict=True):
            tokens = row if mask is None else [x for x, keep in zip(row, mask, strict=True) if keep]
            spans.append(runs(tokens, start))
        return spans


# What can be protected beside spans of positions.
Protect = ChatRoles | Literal["image", "text"]


def split_protection(
    protect: Protect | Sequence[Span | Protect], image_ids: tuple[int, ...]
) -> tuple[list[Span], tuple[SpanFinder, ...]]:
    """The spans of positions, and the finders of further spans in prompts.

    Args:
        protect: As for ``patch``.
        image_ids: The image tokens; empty for a text-only model.

    Raises:
        ValueError: a name is unknown, or this model has no images.
    """
    spans: list[Span] = []
    finders: list[SpanFinder] = []
    for item in (protect,) if isinstance(protect, (str, ChatRoles)) else protect:
        if isinstance(item, ChatRoles):
            finders.append(item)
        elif not isinstance(item, str):
            spans.append(item)
        elif item not in ("image", "text"):
            raise ValueError(f"protect must name 'image' or 'text', got {item!r}")
        elif not image_ids:
            raise ValueError(
                f"protect={item!r} is for vision-language models, got one that reads text: protect "
                "spans of positions, or ChatRoles"
            )
        else:
            finders.append(TokenFinder(image_ids, images=item == "image"))
    return spans, tuple(finders)


def is_image(input_ids: Tensor, image_ids: Sequence[int]) -> Tensor:
    """Where ``input_ids`` are image tokens, bool of their shape."""
    return torch.isin(input_ids, torch.tensor(image_ids, device=input_ids.device))


def check_text_length(
    input_ids: Tensor | None, attention_mask: Tensor | None, image_ids: Sequence[int]
) -> int:
    """How many text tokens each row of a prompt has, to be added to the budget.

    Raises:
        ValueError: there is no prompt, or its rows differ.
    """
    if input_ids is None:
        raise ValueError(
            "the budget grows by the text tokens of a prompt (beside_text=True): pass "
            "new_cache(input_ids=..., attention_mask=...)"
        )
    is_text = ~is_image(input_ids, image_ids)
    if attention_mask is not None:
        is_text &= attention_mask.bool()
    counts: list[int] = is_text.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            "with beside_text=True every row must have the same number of text tokens, got "
            f"{counts}: read the rows one by one, or patch with beside_text=False"
        )
    return counts[0]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text, with or without images, that the decoder stack can read piece by piece.

    Images are encoded once, by :meth:`of`. Their features and positions do not depend on where the
    text is cut.

    Attributes:
        input_ids: ``[batch, length]`` int64.
        arguments: What the decoder stack gets instead of ``input_ids``; empty without images.
    """

    input_ids: Tensor
    arguments: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        parts: ModelParts,
        input_ids: Tensor,
        images: Mapping[str, Any] | None,
        attention_mask: Tensor | None = None,
    ) -> Prompt:
        """Encode the images of a text.

        Args:
            parts: The parts of the model.
            input_ids: ``[batch, length]`` int64, the whole text.
            images: What the model's processor returned, such as ``pixel_values``; its
                ``input_ids`` and ``attention_mask`` are not read. None: no images.
            attention_mask: ``[batch, length]``, 0 for padding; None: no padding.

        Raises:
            ValueError: the text has images and ``images`` is None, the model takes no images, or
                one of them is not an argument of the model.
        """
        given = check_images(parts, input_ids, images)
        if given is None:
            return cls(input_ids, {})
        found: dict[str, Any] = {}

        def note(**arguments: Any) -> BaseModelOutputWithPast:
            found.update(arguments)
            return BaseModelOutputWithPast(last_hidden_state=arguments[_EMBEDS])

        with InstancePatch() as patch, torch.no_grad():
            patch.set(parts.base, "forward", note)
            parts.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given)
        if found.get(_POSITIONS) is None:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            found[_POSITIONS] = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        names = (_EMBEDS, _POSITIONS, _MASK, _FEATURES)
        return cls(input_ids, {n: found[n] for n in names if found.get(n) is not None})

    def part(self, start: int, stop: int) -> dict[str, Any]:
        """The decoder stack's arguments for columns ``[start, stop)``, except masks and caches."""
        if not self.arguments:
            return {"input_ids": self.input_ids[:, start:stop]}
        given = self.arguments
        part = {
            _EMBEDS: given[_EMBEDS][:, start:stop],
            _POSITIONS: given[_POSITIONS][..., start:stop],
        }
        if _FEATURES in given:
            column = given[_MASK].nonzero()[:, 1]
            inside = (column >= start) & (column < stop)
            part[_MASK] = given[_MASK][:, start:stop]
            part[_FEATURES] = [layer[inside.to(layer.device)] for layer in given[_FEATURES]]
        return part

    def in_order(self, order: Tensor) -> Prompt:
        """The text with its columns in ``order`` ``[batch, length]``.

        Images must stay in their order, because their features do not move.
        """
        moved = dict(self.arguments)
        for name in (_EMBEDS, _MASK):
            if name in moved:
                moved[name] = in_order(moved[name], order)
        if _POSITIONS in moved:
            moved[_POSITIONS] = move_positions(moved[_POSITIONS], order)
        return Prompt(in_order(self.input_ids, order), moved)

    def read(
        self,
        parts: ModelParts,
        cache: Any,
        start: int,
        stop: int,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Read columns ``[start, stop)`` on a bounded cache.

        Args:
            parts: The parts of the patched model.
            cache: One of its caches.
            start, stop: Columns.
            attention_mask: ``[batch, stop]``, 0 for padding; None: no padding.

        Returns:
            The last hidden states, ``[batch, stop - start, hidden_size]``.
        """
        cache.input_ids = self.input_ids[:, start:stop]
        output = parts.base(
            **self.part(start, stop),
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def token_grids(
    parts: ModelParts, input_ids: Tensor, images: Mapping[str, Any]
) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tokens of each image and video frame, in the order of the text.

    Args:
        parts: The parts of the model.
        input_ids: ``[length]`` int64.
        images: What the model's processor returned.

    Returns:
        Empty if the processor does not say.
    """
    vision = parts.body.config.vision_config
    merged = getattr(vision, "spatial_merge_size", 1)
    grids: dict[str, list[tuple[int, int]]] = {"image": [], "video": []}
    for kind, sizes in grids.items():
        for frames, height, width in _listed(images.get(f"{kind}_grid_thw")):
            sizes += [(height // merged, width // merged)] * frames
    pixels = images.get("pixel_values")
    if not any(grids.values()) and isinstance(pixels, Tensor) and pixels.dim() == 4:
        size = [list(pixels.shape[2:])] * len(pixels)
        for height, width in _listed(images.get("image_sizes")) or size:
            grids["image"].append((height // vision.patch_size, width // vision.patch_size))
    tokens = input_ids[is_image(input_ids, parts.image_ids)].tolist()
    is_video = [token == getattr(parts.body.config, "video_token_id", None) for token in tokens]
    found, at = [], 0
    while at < len(tokens):
        left = grids["video" if is_video[at] else "image"]
        if not left:
            return ()
        found.append(left.pop(0))
        at += found[-1][0] * found[-1][1]
    return tuple(found) if at == len(tokens) else ()


def _listed(table: Any) -> list[list[int]]:
    return [] if table is None else torch.as_tensor(table).tolist()


def check_images(
    parts: ModelParts, input_ids: Tensor, images: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The body's arguments for a text's images, None if there are none; see :meth:`Prompt.of`.

    Raises:
        ValueError: the text has images and ``images`` is None, the model takes no images, or one of
            them is not an argument of the model.
    """
    if images is None:
        if parts.image_ids and bool(is_image(input_ids, parts.image_ids).any()):
            raise ValueError(
                "input_ids hold tokens of images: pass images=, what the model's processor gave "
                "beside them"
            )
        return None
    if parts.body is None:
        raise ValueError(
            f"images must be None for a model that reads text alone, got {sorted(images)}"
        )
    given = {
        name: value.to(parts.device) if isinstance(value, Tensor) else value
        for name, value in images.items()
        if name not in _OWN_ARGUMENTS
    }
    taken = set(argument_names(parts.body))
    # the kind of each token; before 5.0 models find it themselves
    if _KINDS not in taken:
        given.pop(_KINDS, None)
    unknown = sorted(set(given) - taken)
    if unknown:
        raise ValueError(
            f"images must be arguments of {type(parts.body).__name__}, got {unknown}: pass what "
            "the model's processor gave"
        )
    if _KINDS in taken and parts.integration.position_axes > 1 and given.get(_KINDS) is None:
        raise ValueError(
            f"images must hold {_KINDS}, from which the positions of images are computed, got "
            f"{sorted(given)}: pass what the model's processor gave"
        )
    return given


def runs(chosen: Sequence[bool], start: int = 0) -> list[tuple[int, int]]:
    """``(start, stop)`` of each run of True, counted from ``start``."""
    found, position = [], start
    for value, run in groupby(chosen):
        length = sum(1 for _ in run)
        if value:
            found.append((position, position + length))
        position += length
    return found
