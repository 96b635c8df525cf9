"""A math question for a published TRIM-KV checkpoint, as in the example of its model card.

    python examples/qwen3_math.py --device cuda

One call loads the base model that the checkpoint names, loads the gates, and patches the model. The
rest is plain transformers. The answer is printed as it is generated, then what the cache did.

The default checkpoint and its base model (8 GB) come from the Hugging Face hub. That download is
not tested. Loading from a folder is tested, and uses the same code. The gates of the package's
small model, which knows no mathematics, make the example run offline::

    python examples/qwen3_math.py --budget 16 --buffer 4 \
        --checkpoint src/trimkv_kernels/embedded/embedded_model/retention_gates

``--checkpoint smollm2`` is a small chat model from the package index, with our gates for it.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer, TextStreamer

import trimkv_kernels as tk

QUESTION = (
    "Let a, b and c be the roots of x^3 - 6x^2 + 11x - 6. What is a^3 + b^3 + c^3? Reason step by "
    "step and put the final answer within \\boxed{}."
)


def main() -> None:
    """Answers one question."""
    args = parse_arguments()
    model = tk.from_pretrained(
        args.checkpoint,
        budget=args.budget,
        buffer=args.buffer,
        dtype=args.dtype,
        device_map=args.device,
    )
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, padding_side="left")
    prompt = args.question
    if tokenizer.chat_template is not None:  # the small model's has none
        messages = [{"role": "user", "content": args.question}]
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=args.new,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
            return_dict_in_generate=True,
        )
    print(f"---\n{output.past_key_values.stats()}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        default="ngocbh/TrimKV-Qwen3-4B-Math",
        help="hub id or folder of gates, which name their base model; or smollm2",
    )
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--budget", type=int, help="pairs kept per head; default: the gates' own")
    parser.add_argument("--buffer", type=int, help="new tokens between evictions")
    parser.add_argument("--new", type=int, default=32768, help="tokens to generate, at most")
    parser.add_argument("--device", help="of the model, such as cuda; takes accelerate")
    parser.add_argument("--dtype", default="auto", help="of the model, such as bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
