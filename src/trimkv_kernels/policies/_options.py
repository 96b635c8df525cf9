"""Checks of the options that policies are built with."""

from __future__ import annotations


def check_integer(argument: str, value: object, *, minimum: int) -> None:
    """Check that ``value`` is an integer of at least ``minimum``.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below ``minimum``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{argument} must be at least {minimum}, got {value}")


def check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that ``value`` is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}")


def check_fraction(argument: str, value: float) -> None:
    """Check that ``value`` lies between 0 and 1, both included.

    Raises:
        ValueError: it does not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{argument} must lie in [0, 1], got {value}")
