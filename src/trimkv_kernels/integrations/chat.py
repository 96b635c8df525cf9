"""Messages of a chat, found in its tokens, so that they can be protected from eviction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ChatRoles:
    """Pins the messages of some roles, for ``patch(..., protect=ChatRoles(tokenizer))``.

    The chat template gives the tokens that open and close a role's message. They are searched for
    in prompts, and the message is pinned from its opening to its closing tokens. Generated tokens
    are not searched. If the prompt is read in chunks, a message must lie within one chunk.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        roles: Of ``system``, ``user`` and ``assistant``.

    Raises:
        ValueError: there is no template, it does not know a role, or a test message could not be
            found in its tokens.
    """

    tokenizer: Any
    roles: tuple[str, ...] = ("system",)
    _marks: tuple[tuple[Ids, Ids], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.roles, str) or not set(self.roles) <= {"system", "user", "assistant"}:
            raise ValueError(
                f"roles must be some of ('system', 'user', 'assistant'), got {self.roles!r}"
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("tokenizer must have a chat template: protect spans of positions")
        try:
            marks = _marks(self.tokenizer)
        except Exception as error:  # a template may raise anything for a role it does not know
            raise ValueError(
                "the chat template does not take a system message and turns of user and "
                "assistant: protect spans of positions"
            ) from error
        object.__setattr__(self, "_marks", tuple(marks[role] for role in self.roles))
        self._check()

    def find(
        self, input_ids: Tensor, valid: Tensor | None, seen: Sequence[int]
    ) -> list[list[tuple[int, int]]]:
        """The spans of positions to pin in each row of a call.

        Args:
            input_ids: ``[batch, q_len]``.
            valid: ``[batch, q_len]`` bool, False for left padding; None when all are real.
            seen: Real tokens of each row before the call.
        """
        spans = []
        real = [None] * len(seen) if valid is None else valid.tolist()
        for ids, mask, start in zip(input_ids.tolist(), real, seen, strict=True):
            tokens = ids if mask is None else [x for x, keep in zip(ids, mask, strict=True) if keep]
            spans.append([(start + a, start + b) for a, b in self._search(tokens)])
        return spans

    def _search(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        spans = []
        for opening, closing in self._marks:
            start = _index(ids, opening, 0)
            while start is not None:
                end = _index(ids, closing, start + len(opening))
                stop = len(ids) if end is None else end + len(closing)
                spans.append((start, stop))
                start = _index(ids, opening, stop)
        return sorted(spans)

    def _check(self) -> None:
        messages = [
            {"role": role, "content": f"{role} says hello"}
            for role in ("system", "user", "assistant", "user")
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = {self.tokenizer.decode(ids[start:stop]) for start, stop in self._search(ids)}
        for role in self.roles:
            if not any(f"{role} says hello" in text for text in found):
                raise ValueError(
                    f"the chat template does not show where messages of {role!r} begin and end: "
                    "protect spans of positions"
                )


def _marks(tokenizer: Any) -> dict[str, tuple[Ids, Ids]]:
    """The tokens that open and close a message, by role."""
    first, answer, second, rules = "<first>", "<answer>", "<second>", "<rules>"
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    text = _render(tokenizer, turns)
    user_close = text.split(second)[1]
    to_answer = text.split(first)[1].split(answer)[0]
    to_second = text.split(answer)[1].split(second)[0]
    alone = _render(tokenizer, turns[2:])
    # the text before a user's message in both places, without what closes the message before
    user_open = _common_end(to_second, alone.split(second)[0])
    user_open = min(user_open, to_second.removeprefix(user_close), key=len)
    ruled = _render(tokenizer, [{"role": "system", "content": rules}, turns[0]])
    to_user = ruled.split(rules)[1].split(first)[0]
    texts = {
        "system": (ruled.split(rules)[0], to_user.removesuffix(user_open)),
        "user": (user_open, user_close),
        "assistant": (to_answer.removeprefix(user_close), to_second.removesuffix(user_open)),
    }
    return {
        role: (_encode(tokenizer, opening), _encode(tokenizer, closing))
        for role, (opening, closing) in texts.items()
    }


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text.removeprefix(tokenizer.bos_token or "")


def _common_end(a: str, b: str) -> str:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b), strict=False))
    return "".join(letter for letter, _ in pairs)[::-1]


def _encode(tokenizer: Any, mark: str) -> Ids:
    # whitespace at the border may be one token with the message
    return tuple(tokenizer(mark.strip(), add_special_tokens=False)["input_ids"])


def _index(ids: Sequence[int], mark: Ids, start: int) -> int | None:
    """Where ``mark`` begins in ``ids`` from ``start`` on; None if absent or empty."""
    last = len(ids) - len(mark)
    places = (i for i in range(start, last + 1) if mark and tuple(ids[i : i + len(mark)]) == mark)
    return next(places, None)
