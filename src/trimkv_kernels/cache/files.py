"""Saved slots: a safetensors file with a fingerprint of what its numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimkv_kernels.cache.checks import DTYPES
from trimkv_kernels.files import staged

PINS = "pins"  # the only tensor whose shape depends on what was protected


def write(path: str | Path, state: Mapping[str, Tensor], fingerprint: Mapping[str, str]) -> None:
    """Write tensors and their fingerprint, all or nothing. An existing file is replaced."""
    path = Path(path)
    dense = {name: tensor.contiguous() for name, tensor in state.items()}
    with staged(path.parent) as staging:
        save_file(dense, staging / path.name, metadata=dict(fingerprint))


def read(
    path: str | Path,
    expected: Mapping[str, Tensor],
    fingerprint: Mapping[str, str],
    device: torch.device,
) -> dict[str, Tensor]:
    """Read what :func:`write` wrote, and check that it fits a cache.

    Args:
        path: The file.
        expected: The cache's tensors by name. Those in the file must have the same shapes and
            dtypes.
        fingerprint: The fingerprint that the file must have.
        device: Where the tensors go.

    Raises:
        ValueError: the file is of another kind, has another fingerprint, or a tensor is missing,
            unknown, or of another shape or dtype. The message names the first difference.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            saved = file.metadata() or {}
            for name, here in fingerprint.items():
                if saved.get(name) != here:
                    raise ValueError(
                        f"{path}: {name} must be {here}, got {saved.get(name)}: these slots belong "
                        "to a cache of another kind"
                    )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be written by save() of a bounded cache: {error}") from None
    _check_state(path, state, expected)
    return state


def saved_shape(path: str | Path) -> tuple[int, torch.dtype]:
    """Batch size and dtype of saved slots.

    Raises:
        ValueError: the file does not contain them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            saved = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} must be written by save() of a bounded cache: {error}") from None
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    if not saved.get("batch_size", "").isdigit() or saved.get("dtype") not in dtypes:
        raise ValueError(f"{path} must be written by save() of a bounded cache, got {saved}")
    return int(saved["batch_size"]), dtypes[saved["dtype"]]


def _check_state(
    path: str | Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    names = set(state) - {PINS}
    if names != set(expected):
        missing, other = sorted(set(expected) - names), sorted(names - set(expected))
        raise ValueError(f"{path} must hold the slots' tensors: {missing} missing, {other} unknown")
    for name, tensor in expected.items():
        got = state[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise ValueError(
                f"{path}: {name} must be {tensor.dtype} {list(tensor.shape)}, "
                f"got {got.dtype} {list(got.shape)}"
            )
    pins = state.get(PINS)
    batch = expected["t"].shape[0]
    if pins is not None and (pins.dtype != torch.int32 or pins.shape[::2] != (batch, 2)):
        raise ValueError(
            f"{path}: {PINS} must be torch.int32 [{batch}, spans, 2], "
            f"got {pins.dtype} {list(pins.shape)}"
        )
