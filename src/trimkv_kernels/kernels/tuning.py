"""Launch configurations that were measured, by device and shape.

``tables/`` beside this module holds a JSON file per device, as `make gpu-tune` writes it::

    {"decode_attention 8 1024 128 2 256": {"splits": 16, "num_stages": 4}}

The name of an entry is the kernel and the numbers from which its configuration is chosen, each
rounded up to a power of two. The entry holds the differences from the default choice. Nothing is
measured when a kernel runs.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

TABLES = Path(__file__).parent / "tables"
_LARGEST = 1 << 16  # of tiles, splits, warps and stages

Config = TypeVar("Config")


def tuned(kernel: str, device: torch.device, choose: Callable[..., Config], *shape: int) -> Config:
    """Return ``choose(*shape)``, with the changes that the table of ``device`` has for it.

    Args:
        kernel: Its name in the table.
        device: Where it will run.
        choose: Returns a dataclass; a pure function of shapes.
        shape: The numbers to choose from.

    Raises:
        ValueError: the table is not one, or names a setting that the kernel does not have.
    """
    config, name = choose(*shape), entry_name(kernel, *shape)
    entry = table(device).get(name)
    if entry is None:
        return config
    try:
        return replace(config, **entry)  # type: ignore[type-var]
    except TypeError as error:
        raise _refusal(device, f"{name!r}: {error}") from error


@functools.lru_cache(maxsize=4096)
def entry_name(kernel: str, *shape: int) -> str:
    """Name of the entry for a shape. Shapes that round up to the same numbers share it."""
    return " ".join((kernel, *(str(1 << max(number - 1, 0).bit_length()) for number in shape)))


@functools.cache
def table(device: torch.device) -> Mapping[str, dict[str, int]]:
    """The entries for one device; none if it was not measured.

    Raises:
        ValueError: its file is not a table.
    """
    if device.type != "cuda":
        return {}
    path = table_path(torch.cuda.get_device_name(device))
    if not path.exists():
        return {}
    try:
        if not path.is_file():  # to read a pipe would wait for ever
            raise ValueError("it must be a file")
        entries = json.loads(path.read_text("utf-8"))
        return {name: _checked(name, entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(device, error) from error


def _checked(name: str, entry: Any) -> dict[str, int]:
    """An entry of a table.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(entry, dict) or not all(_is_setting(x) for x in entry.values()):
        raise ValueError(
            f"{name!r} must have whole numbers from 1 to {_LARGEST} by name, got {entry!r:.80}"
        )
    return entry


def _is_setting(number: Any) -> bool:
    return type(number) is int and 1 <= number <= _LARGEST


def _refusal(device: torch.device, reason: object) -> ValueError:
    path = table_path(torch.cuda.get_device_name(device))
    return ValueError(
        f"{path} must hold launch settings by name ({reason}): delete it, or measure again"
    )


def table_path(device_name: str) -> Path:
    """The path of a device's table: ``NVIDIA H200`` has ``nvidia_h200.json``."""
    return TABLES / f"{re.sub(r'[^a-z0-9]+', '_', device_name.lower())}.json"
