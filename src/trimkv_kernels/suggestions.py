"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'h2o'?``, to end a message with; empty if no known name is close."""
    close = get_close_matches(name.lower(), list(known), n=2)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
