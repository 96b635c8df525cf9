"""Tiny random vision-language models, and texts with tiny images for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from test_models import FAMILIES, SIZES
from trimkv_kernels.integrations import compat
from trimkv_kernels.integrations.discovery import find_parts
from trimkv_kernels.integrations.images import Prompt

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
NAMES = ["Qwen3-VL", "Qwen2.5-VL", "Qwen2-VL", "LLaVA"]
IMAGE, VIDEO, START, END = 90, 91, 92, 93  # tokens
GRID = (1, 4, 4)  # patches of an image: 2 x 2 tokens
LONG = (1, 8, 4)  # 4 x 2 tokens
FRAMES = (2, 4, 4)  # a video of two frames
PATCH, MERGED = 4, 2
CLASSES: dict[str, tuple[type, type]] = {
    "Qwen3-VL": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "Qwen2.5-VL": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "Qwen2-VL": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "LLaVA": (LlavaConfig, LlavaForConditionalGeneration),
}


def make(name: str, decoder: str = "Llama", **changes: Any) -> PreTrainedModel:
    """A tiny random model whose keys are spread out; ``decoder`` is that of a LLaVA."""
    config_class, model_class = CLASSES[name]
    config = config_class(**_options(name, decoder, changes))
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "k_norm" in parameter_name or "q_norm" in parameter_name:
                parameter.uniform_(0.2, 2.0)
            elif "proj." in parameter_name and parameter.dim() == 1:
                parameter.uniform_(-1.0, 1.0)
            elif parameter.dim() == 2 and "embed" not in parameter_name:
                parameter.mul_(6.0)
        model.lm_head.weight[IMAGE : END + 1] = 0.0  # never the likeliest
    return model


def _options(name: str, decoder: str, changes: dict[str, Any]) -> dict[str, Any]:
    if name == "LLaVA":
        kind, extra = (LlamaConfig, {}) if decoder == "Llama" else FAMILIES[decoder][::2]
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=4 * PATCH // MERGED,
            patch_size=PATCH,
        )
        text: PretrainedConfig = kind(**{**SIZES, **extra, **changes})
        return {"text_config": text, "vision_config": vision, "image_token_index": IMAGE}
    section = [4, 2, 2]
    rope = {"rope_type": "default", "mrope_section": section}
    if compat._NUMBERS_COLUMNS:  # transformers 4
        positions: dict[str, Any] = {"rope_theta": 1e4, "rope_scaling": rope}
    else:
        positions = {"rope_parameters": {**rope, "rope_theta": 1e4}}
    text_options = {**SIZES, **positions, **changes}
    vision_options: dict[str, Any] = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGED,
        "temporal_patch_size": 2,
    }
    if name == "Qwen2-VL":
        vision_options |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1}
    else:
        vision_options |= {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64}
    if name == "Qwen3-VL":
        text_options["head_dim"] = 16
        vision_options |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    if name == "Qwen2.5-VL":
        vision_options |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return {
        "text_config": text_options,
        "vision_config": vision_options,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


@dataclass
class Row:
    """A text in the making: tokens, and the images they stand for."""

    name: str
    seed: int = 0
    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, int, int]] = field(default_factory=list)
    videos: list[tuple[int, int, int]] = field(default_factory=list)

    def text(self, length: int) -> "Row":
        """Distinct random words."""
        generator = torch.Generator().manual_seed(self.seed + len(self.ids))
        self.ids += (torch.randperm(86, generator=generator)[:length] + 3).tolist()
        return self

    def image(self, grid: tuple[int, int, int] = GRID) -> "Row":
        """An image of so many patches."""
        self.images.append(grid)
        return self._placed(IMAGE, [grid])

    def video(self, grid: tuple[int, int, int] = FRAMES) -> "Row":
        """A video; Qwen3-VL has a time, here a word, before each frame."""
        self.videos.append(grid)
        frames, height, width = grid
        one_each = self.name == "Qwen3-VL"
        return self._placed(VIDEO, [(1, height, width)] * frames if one_each else [grid])

    def _placed(self, token: int, runs: list[tuple[int, int, int]]) -> "Row":
        for run in runs:
            length = run[0] * run[1] * run[2] // MERGED**2
            self.ids += [START, *[token] * length, END]
            if token == VIDEO and len(runs) > 1:
                self.text(1)
        return self


def inputs(*rows: Row) -> dict[str, Tensor]:
    """What a processor gives for a left-padded batch, pixels made up."""
    total = max(len(row.ids) for row in rows)
    padding = [total - len(row.ids) for row in rows]
    ids = torch.tensor([[0] * n + row.ids for n, row in zip(padding, rows, strict=True)])
    given = {
        "input_ids": ids,
        "attention_mask": (torch.arange(total) >= torch.tensor(padding)[:, None]).long(),
    }
    generator = torch.Generator().manual_seed(5)
    images = [grid for row in rows for grid in row.images]
    videos = [grid for row in rows for grid in row.videos]
    if rows[0].name == "LLaVA":
        size = 4 * PATCH // MERGED
        if images:
            given["pixel_values"] = torch.randn(len(images), 3, size, size, generator=generator)
        return given
    for kind, grids, values in (
        ("image", images, "pixel_values"),
        ("video", videos, "pixel_values_videos"),
    ):
        if grids:
            given[f"{kind}_grid_thw"] = torch.tensor(grids)
            patches = int(given[f"{kind}_grid_thw"].prod(1).sum())
            given[values] = torch.randn(patches, 3 * 2 * PATCH**2, generator=generator)
    if (images or videos) and not compat._NUMBERS_COLUMNS:
        given["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return given


def whole(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Prompt:
    """A text with its images, as the model itself puts them together."""
    return Prompt.of(find_parts(model), given["input_ids"], given, given["attention_mask"])


def in_calls(
    model: PreTrainedModel, given: Mapping[str, Tensor], calls: list[int]
) -> list[dict[str, Tensor]]:
    """What each call is given beside tokens: positions, and the images that begin in it."""
    position = whole(model, given).arguments["position_ids"]
    grid = given.get("image_grid_thw")
    ids = given["input_ids"]
    begins = [(ids[:, i] == IMAGE) & (ids[:, i - 1] != IMAGE) for i in range(1, ids.shape[1])]
    column = torch.stack(begins, 1).nonzero()[:, 1] + 1  # of each image, row by row
    sizes = [1] * len(column) if grid is None else grid.prod(1).tolist()
    pixels = given["pixel_values"].split(sizes)
    found = []
    for start, stop in pairwise(torch.tensor([0, *calls]).cumsum(0).tolist()):
        call = {"position_ids": position[..., start:stop]}
        chosen = ((column >= start) & (column < stop)).nonzero()[:, 0].tolist()
        if chosen:
            call["pixel_values"] = torch.cat([pixels[i] for i in chosen])
        if chosen and grid is not None:
            call["image_grid_thw"] = grid[chosen]
        found.append(call)
    return found


@torch.no_grad()
def run(
    model: PreTrainedModel,
    cache: Any,
    given: Mapping[str, Tensor],
    calls: list[int],
    more: list[dict[str, Tensor]],
) -> Tensor:
    """Logits, read call by call; ``more`` is of :func:`in_calls`."""
    edges = pairwise(torch.tensor([0, *calls]).cumsum(0).tolist())
    logits = [
        model(
            input_ids=given["input_ids"][:, start:stop],
            attention_mask=given["attention_mask"][:, :stop],
            past_key_values=cache,
            **call,
        ).logits
        for (start, stop), call in zip(edges, more, strict=True)
    ]
    return torch.cat(logits, 1) * given["attention_mask"][..., None]


def kept_of(given: Mapping[str, Tensor], tokens: tuple[int, ...], inside: bool = True) -> set[int]:
    ids = given["input_ids"][0].tolist()
    return {position for position, token in enumerate(ids) if (token in tokens) == inside}


def two_images(name: str, seed: int = 0) -> Row:
    """Words, an image, words, a larger one where there can be one, and words."""
    large = {} if name == "LLaVA" else {"grid": LONG}
    return Row(name, seed).text(6).image().text(5).image(**large).text(6)
