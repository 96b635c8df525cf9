"""Differences between versions of transformers. No other file reads the version."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

TESTED = ("4.57", "5.17", "5.23")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


_VERSION = _release(transformers.__version__)
_NUMBERS_COLUMNS = _VERSION < (5, 0)  # of a prompt that generate() reads in chunks
_CROPS_TO_LENGTH = _VERSION < (5, 18)


@functools.cache
def warn_if_untested() -> None:
    """Warn once per process if transformers is outside the tested range."""
    if not _release(TESTED[0]) <= _VERSION <= _release(TESTED[-1]):
        warnings.warn(
            f"transformers {transformers.__version__} is untested here: trimkv_kernels was tested "
            f"with {', '.join(TESTED)}",
            stacklevel=3,
        )


def prompt_embeds(mask_arguments: dict[str, Any]) -> Tensor:
    """The embeddings among the arguments of ``create_masks_for_generate``."""
    name = "inputs_embeds" if "inputs_embeds" in mask_arguments else "input_embeds"  # up to 5.0
    embeds: Tensor = mask_arguments[name]
    return embeds


def chosen_cache(generation_config: Any) -> str | None:
    """The ``cache_implementation`` that the user passed to ``generate``."""
    chosen: str | None = generation_config.cache_implementation
    # generate() itself gives this one to draft models
    return None if chosen == "dynamic_full" and generation_config.is_assistant else chosen


def generation_mode(mode: Any) -> str:
    """The name of a mode of ``generate``."""
    return str(getattr(mode, "value", mode))


def text_length(generation_config: Any, mask: Any) -> int | None:
    """Tokens of the text that ``generate`` was given; None if unknown."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1]
    length: int | None = getattr(generation_config, "_mask_length", None)
    return length


def tokens_to_remove(argument: int, seen: int) -> int:
    """Tokens that ``Cache.crop(argument)`` takes back from a cache that has seen ``seen``.

    A negative argument is their number, negated. A positive one, in older versions, is how many
    stay.

    Raises:
        ValueError: ``argument`` is positive, which this transformers does not support any more.
    """
    if argument <= 0:
        return -argument
    if _CROPS_TO_LENGTH:
        return max(seen - argument, 0)
    raise ValueError(
        f"tokens_to_remove must be 0 or negative (the tokens to take back, negated), got {argument}"
    )


def join_axes(layer: Any, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[batch, q_len, head_dim]`` for positions with three axes.

    Before 5.0, in some models, the attention layer takes each channel from its axis.
    """
    cos, sin = position_embeddings
    if cos.dim() == 3:
        return cos, sin
    sections = layer.rope_scaling["mrope_section"] * 2

    def join(x: Tensor) -> Tensor:
        parts = x.split(sections, dim=-1)
        return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)

    return join(cos), join(sin)


def rope_offset(body: Any, padding: Tensor) -> Tensor | None:
    """The next token's position less the number of tokens before it, as stored in the model.

    Args:
        body: The module that adds images to the embeddings.
        padding: ``[batch, 1]`` int64, each row's padding; before 5.0 the stored number counts it.

    Returns:
        ``[batch, 1]`` int64; None for models that store nothing.
    """
    noted = getattr(body, "rope_deltas", None)
    return noted + padding if _NUMBERS_COLUMNS and noted is not None else noted


def note_no_images(body: Any, padding: Tensor) -> None:
    """Store in a model that its text has no images, as ``generate`` does."""
    if hasattr(body, "rope_deltas"):
        body.rope_deltas = -padding if _NUMBERS_COLUMNS else torch.zeros_like(padding)


def place_chunk(inputs: dict[str, Any], mask: Tensor | None, q_len: int) -> None:
    """Give a chunk of a left-padded prompt position ids that do not count the padding.

    Before 5.0 ``generate`` counts padding in the prompts that it reads in chunks, but not in the
    steps after them.

    Args:
        inputs: Of the decoder stack; ``position_ids`` is replaced.
        mask: ``[batch, >= q_len]``, 0 for padding. A single column is a step's, which needs no
            change.
    """
    if _NUMBERS_COLUMNS and mask is not None and mask.dim() == 2 and mask.shape[1] > 1:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -q_len:]


def end_tokens(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a text, of an ``eos_token_id`` as configs have it."""
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
