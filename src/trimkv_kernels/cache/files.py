"""Saved slots: a safetensors file with a fingerprint of what its numbers mean."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimkv_kernels.cache.checks import DTYPES
from trimkv_kernels.cache.saved import check_numbers
from trimkv_kernels.files import staged

if TYPE_CHECKING:
    from trimkv_kernels.cache.bounded import BoundedKVCache
    from trimkv_kernels.cache.state import State

PINS = "pins"  # the only tensor whose shape depends on what was protected


def write(path: str | Path, state: Mapping[str, Tensor], fingerprint: Mapping[str, str]) -> None:
    """Write tensors and their fingerprint, all or nothing. An existing file is replaced.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    dense = {name: tensor.contiguous() for name, tensor in state.items()}
    with staged(path.parent) as staging:
        try:
            save_file(dense, staging / path.name, metadata=dict(fingerprint))
        except SafetensorError as error:
            raise _system_error(error, path) from error


def _system_error(error: SafetensorError, path: Path) -> OSError:
    """What the system said, which safetensors only repeats in words."""
    said = re.search(r"os error (\d+)", str(error))
    code = int(said[1]) if said else errno.EIO
    reason = os.strerror(code) if said else str(error)
    return OSError(code, f"{reason}: nothing was saved, and the folder is as it was", str(path))


def read(
    path: str | Path, state: State, fingerprint: Mapping[str, str], device: torch.device
) -> dict[str, Tensor]:
    """Read what :func:`write` wrote, and check that it fits a cache.

    Args:
        path: The file.
        state: The cache's. The tensors in the file must have the same names, shapes and dtypes, and
            numbers that such a state can have.
        fingerprint: The fingerprint that the file must have.
        device: Where the tensors go.

    Raises:
        ValueError: the file is of another kind, has another fingerprint, or a tensor is missing,
            unknown, of another shape or dtype, or holds a number that cannot be. The message names
            the first difference.
    """
    expected = state.named_tensors()
    with _opened(path, device) as file:
        _check_fingerprint(path, file.metadata() or {}, fingerprint)
        _check_names(path, set(file.keys()), set(expected))
        shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
        _check_shapes(path, file, shapes)  # before anything is read
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _check_dtypes(path, saved, expected)
    try:
        sinks, recent = int(fingerprint["sinks"]), int(fingerprint["recent"])
        check_numbers(saved, state.storages, sinks, recent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return saved


def empty_slots(
    path: str | Path,
    make: Callable[[int, torch.dtype, torch.device], BoundedKVCache],
    device: torch.device,
    extra: Mapping[str, str],
) -> BoundedKVCache:
    """An empty cache with the rows and the dtype of saved slots.

    Args:
        path: The file.
        make: Makes a cache of a batch size and dtype on a device.
        device: Where the cache goes.
        extra: What the file's fingerprint has beside the cache's.

    Raises:
        ValueError: the file does not tell them, or does not hold as many rows as it says. Memory is
            taken for one row until this is known.
    """
    with _opened(path, torch.device("cpu")) as file:
        saved = file.metadata() or {}
        dtypes = {str(dtype): dtype for dtype in DTYPES}
        rows = saved.get("batch_size", "")
        if not re.fullmatch("[0-9]{1,9}", rows) or saved.get("dtype") not in dtypes:
            raise ValueError(f"{path} must be written by save() of a bounded cache, got {saved}")
        dtype = dtypes[saved["dtype"]]
        row = make(1, dtype, device)
        _check_fingerprint(path, saved, {**row.fingerprint(), "batch_size": rows, **extra})
        shapes = {
            f"{number}.{name}": [tensor.shape[0], int(rows), *tensor.shape[2:]]
            for number, storage in enumerate(row.storages)
            for name, tensor in storage.named_state()
        }
        _check_names(path, set(file.keys()) & set(shapes), set(shapes))
        _check_shapes(path, file, shapes)
    return make(int(rows), dtype, device)


@contextmanager
def _opened(path: str | Path, device: torch.device) -> Iterator[Any]:
    if not Path(path).is_file():  # to read a pipe would wait for ever
        raise ValueError(f"path must be a file written by save() of a bounded cache, got {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    # a dtype that torch does not have raises AttributeError
    except (SafetensorError, OSError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} must be written by save() of a bounded cache: {error}") from None


def _check_fingerprint(
    path: str | Path, saved: Mapping[str, str], fingerprint: Mapping[str, str]
) -> None:
    for name, here in fingerprint.items():
        if saved.get(name) != here:
            raise ValueError(
                f"{path}: {name} must be {here}, got {saved.get(name)}: these slots belong "
                "to a cache of another kind"
            )


def _check_names(path: str | Path, found: set[str], expected: set[str]) -> None:
    names = found - {PINS}
    if names != expected:
        missing, other = sorted(expected - names), sorted(names - expected)
        raise ValueError(f"{path} must hold the slots' tensors: {missing} missing, {other} unknown")


def _check_shapes(path: str | Path, file: Any, expected: Mapping[str, list[int]]) -> None:
    for name, shape in expected.items():
        got = file.get_slice(name).get_shape()
        if got != shape:
            raise ValueError(f"{path}: {name} must have shape {shape}, got {got}")


def _check_dtypes(
    path: str | Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for name, tensor in expected.items():
        if saved[name].dtype != tensor.dtype:
            raise ValueError(f"{path}: {name} must be {tensor.dtype}, got {saved[name].dtype}")
    pins, batch = saved.get(PINS), expected["t"].shape[0]
    if pins is None:
        return
    if pins.dtype != torch.int32 or pins.dim() != 3 or pins.shape[::2] != (batch, 2):
        raise ValueError(
            f"{path}: {PINS} must be torch.int32 [{batch}, spans, 2], "
            f"got {pins.dtype} {list(pins.shape)}"
        )
