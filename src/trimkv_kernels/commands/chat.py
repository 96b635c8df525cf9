"""talk to a model on a bounded cache

Type a line and read the answer. A line below it says what the cache has seen and holds. All turns
are on one cache, so a conversation can be longer than the budget. /new begins another conversation.
/quit, or the end of the input, ends the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trimkv_kernels.commands import _options

if TYPE_CHECKING:
    from trimkv_kernels.patching import PatchHandle

_PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    _options.add_model(parser, required=True)
    _options.add_device(parser)
    _options.add_policy(parser)
    _options.add_sizes(parser)
    _options.add_text_file(parser, "none; it is read with the first line")
    parser.add_argument(
        "--new", type=_options.count, default=256, help="tokens an answer may have (default: 256)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="answer each line on the full cache, too"
    )


def run(options: argparse.Namespace) -> None:
    """Talk until the input ends."""
    from trimkv_kernels.loading import ModelSource, read_text, share_weights
    from trimkv_kernels.patching import patch
    from trimkv_kernels.policies.trimkv import policy_of

    policy = policy_of(options.policy, options.gates)
    source = ModelSource(options.model, options.revision, options.dtype, options.device)
    text = "" if options.text_file is None else f"{read_text(options.text_file)}\n\n"
    tokenizer, model = source.load_tokenizer(), source.load_model()
    stock = share_weights(model) if options.compare else None
    with patch(model, policy, budget=options.budget, buffer=options.buffer) as handle:
        print(handle)
        while _talk(model, stock, tokenizer, handle, text, options.new):
            print("a new conversation")


def _talk(model: Any, stock: Any, tokenizer: Any, handle: PatchHandle, text: str, new: int) -> bool:
    """One conversation. Returns whether another one is wanted."""
    from transformers import DynamicCache

    from trimkv_kernels.conversation import Conversation, LiveLine, Speaker

    sides = {"bounded": Conversation(model, tokenizer, handle.new_cache())}
    if stock is not None:
        sides["full"] = Conversation(stock, tokenizer, DynamicCache(config=stock.config))
    trained_length = model.config.get_text_config().max_position_embeddings
    with LiveLine(sys.stdout) as line:
        for said in _lines():
            if said == "/new":
                return True
            for name, side in sides.items():
                if stock is not None:
                    print(f"{name}: ", end="")
                speaker = Speaker(tokenizer, sys.stdout, line, side.figures)
                side.ask(text + said, max_new_tokens=new, streamer=speaker)
                print(f"[{side.figures()}]")
                if len(side.ids) > trained_length:
                    print(f"[longer than the {trained_length:,} tokens the model is made for]")
            text = ""
    return False


def _lines() -> Iterator[str]:
    """What the user types, up to the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() then lets the line be edited)
    while True:
        try:
            said = input(_PROMPT).strip()
        except EOFError:
            print()
            return
        if said == "/quit":
            return
        if said:
            yield said
