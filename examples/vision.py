"""A vision-language model on few slots: what is kept of an image.

    python examples/vision.py
    python examples/vision.py --policy snap_kv --budget 48 --out kept.png

A small Qwen3-VL with random weights reads words, a picture of a disc and a bar, and a question.
All words stay (protect="text"), and the pieces of the image compete for the rest of the budget. The
last line names a picture of what stayed. Weights are random, so that what is kept means little; the
code is the same for a trained model, whose processor makes `inputs`. It takes the extra `inspect`.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import trimkv_kernels as tk
from trimkv_kernels.inspection import image_figure, trace

SIZE, PATCH, MERGE, FRAMES = 192, 8, 2, 2  # pixels; pixels; patches of a token's side; of a patch
IMAGE, VIDEO, START, END = 300, 301, 302, 303  # tokens


def main() -> None:
    arguments = parse_arguments()
    model, picture = make_model(), make_picture()
    inputs = make_inputs(picture)
    input_ids = inputs["input_ids"]
    print(f"{input_ids.shape[1]} tokens, {int((input_ids == IMAGE).sum())} of them of the image")

    options = {"budget": arguments.budget, "buffer": 8, "protect": "text"}
    with tk.patch(model, arguments.policy, **options) as handle:
        cache = handle.new_cache()
        model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
        print(cache.stats())

    traced = trace(
        model,
        input_ids,
        arguments.policy,
        images=inputs,
        prompt_length=input_ids.shape[1],
        **options,
    )
    kept = traced.kept(traced.num_tokens - 1)[..., traced.is_image]
    print(f"kept of the image: {kept.float().mean():.1%}, mean of all heads")
    image_figure(traced, pictures=[picture.numpy()]).savefig(arguments.out)
    print(arguments.out)


def make_model() -> Qwen3VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": rope,
            "rope_scaling": rope,  # its name before transformers 5
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "num_position_embeddings": (SIZE // PATCH) ** 2,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_norm" in name:
                parameter.uniform_(0.2, 2.0)  # or all keys would be as large
            elif parameter.dim() > 1 and "visual" in name:
                parameter.mul_(4.0)
    return model


def make_picture() -> Tensor:
    """A disc and a bar, ``[height, width, 3]`` in [0, 1]."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    picture = torch.full((SIZE, SIZE, 3), 0.95)
    picture[(row - 70) ** 2 + (column - 70) ** 2 < 45**2] = torch.tensor([0.85, 0.3, 0.2])
    picture[(row > 130) & (row < 165) & (column > 60)] = torch.tensor([0.2, 0.4, 0.8])
    return picture


def make_inputs(picture: Tensor) -> dict[str, Tensor]:
    """What a processor makes of words, the picture and a question."""
    grid = SIZE // PATCH
    blocks = (2 * picture - 1).permute(2, 0, 1).expand(FRAMES, -1, -1, -1)
    side = grid // MERGE
    blocks = blocks.reshape(FRAMES, 3, side, MERGE, PATCH, side, MERGE, PATCH)
    # the patches of a token come one after the other
    pixels = blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(grid * grid, -1)
    words = torch.randperm(290, generator=torch.Generator().manual_seed(0))[:20].tolist()
    ids = [*words[:12], START, *[IMAGE] * side**2, END, *words[12:]]
    input_ids = torch.tensor([ids])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, grid, grid]]),
    }
    if int(transformers.__version__.split(".")[0]) >= 5:
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).int()
    return inputs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="key_norm", help="registered name")
    parser.add_argument("--budget", type=int, default=64, help="pairs per head, words included")
    parser.add_argument("--out", default="kept-of-the-image.png", help="picture to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
