"""A conversation on one cache: each turn reads only new tokens. Evicted ones do not come back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, TextIO

import torch
from transformers import DynamicCache, TextStreamer

from trimkv_kernels.integrations.compat import end_tokens

_ANSWER = "<answer>"  # stands for any answer in a conversation that only shows the template


class Conversation:
    """Turns of a user and a model, on one cache.

    Args:
        model: Patched if ``cache`` is bounded.
        tokenizer: The model's. Without a chat template, turns are lines of plain text.
        cache: An empty cache of this model.

    Attributes:
        ids: Token ids of all turns so far, on the CPU.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: Any) -> None:
        self._model, self._tokenizer, self._cache = model, tokenizer, cache
        self.ids: list[int] = []

    def ask(self, text: str, *, max_new_tokens: int, streamer: Any = None) -> str:
        """The model's answer to the user's next turn, chosen greedily.

        Args:
            text: The turn.
            max_new_tokens: Tokens that the answer may have.
            streamer: Gets the answer's tokens as they come, as transformers' streamers do.
        """
        prompt = [*self.ids, *self._turn(text)]
        ids = torch.tensor([prompt], device=self._model.device)
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            disable_compile=True,  # the first answer would wait for it
            pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
        )
        answer = output[0, len(prompt) :].tolist()
        if answer and answer[-1] in end_tokens(self._model.generation_config.eos_token_id):
            answer.pop()  # no cache has read it, and the next turn begins with it
        self.ids = [*prompt, *answer]
        return str(self._tokenizer.decode(answer, skip_special_tokens=True))

    def figures(self) -> str:
        """What the cache has seen and holds, in a line."""
        if not isinstance(self._cache, DynamicCache):
            return str(self._cache.stats())
        held = held_bytes(self._cache)
        seen = self._cache.get_seq_length()
        return f"{seen} tokens seen, {seen} slots used, nothing evicted, {held:,} bytes held"

    def _turn(self, text: str) -> list[int]:
        """Tokens of a turn, with those that close the answer before it and open the next one."""
        if self._tokenizer.chat_template is None:
            turn = f"{text}\n" if not self.ids else f"\n{text}\n"
        elif not self.ids:
            turn = self._render([{"role": "user", "content": text}])
        else:
            turns = ("user", "-"), ("assistant", _ANSWER), ("user", text)
            shown = self._render([{"role": role, "content": said} for role, said in turns])
            turn = shown.partition(_ANSWER)[2]
        return list(self._tokenizer(turn, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[dict[str, str]]) -> str:
        options = {"tokenize": False, "add_generation_prompt": True}
        return str(self._tokenizer.apply_chat_template(messages, **options))


class Speaker(TextStreamer):
    """Writes an answer as it comes, and keeps a line of figures up to date.

    Args:
        tokenizer: The model's.
        out: Where the answer goes.
        line: The line.
        figures: What it says.
    """

    def __init__(
        self, tokenizer: Any, out: TextIO, line: LiveLine, figures: Callable[[], str]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out, self._line, self._figures = out, line, figures

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write some words."""
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()
        self._line.show(self._figures)


class LiveLine:
    """The last line of a terminal; the rest scrolls above it. Elsewhere there is none.

    Args:
        out: The terminal, or any other stream.
    """

    def __init__(self, out: TextIO) -> None:
        self._out, self._rows = out, 0

    def __enter__(self) -> LiveLine:
        return self

    def show(self, text: Callable[[], str]) -> None:
        """Replace what the line says; without a line, ``text`` is not called."""
        if not self._out.isatty():
            return
        columns, rows = shutil.get_terminal_size()
        if rows != self._rows:  # at the first time, or when the window has another size
            self._rows = rows
            # one row down and up, which scrolls at the end; then all rows but the last scroll
            self._out.write(f"\033D\033[A\0337\033[1;{rows - 1}r\0338")
        self._out.write(f"\0337\033[{rows};1H\033[2K\033[7m{text()[:columns]}\033[0m\0338")
        self._out.flush()

    def __exit__(self, *error: object) -> None:
        if self._rows:
            self._out.write(f"\0337\033[r\033[{self._rows};1H\033[2K\0338")
            self._out.flush()


def held_bytes(cache: Any) -> int:
    """All that a bounded cache, or transformers' full one, holds."""
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return int(cache.stats().bytes_held)
