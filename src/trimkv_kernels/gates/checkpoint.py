"""Retention-gate checkpoints: read the published layout and ours, write ours.

====================  ==========================  ================================
layout                config                      weights
====================  ==========================  ================================
ours                  ``trimkv_config.json``      ``trimkv_gates.safetensors``
published (trimkv)    ``config.json``             ``trimkv_weights.pth``
====================  ==========================  ================================

Our names never collide with those of a base model, so gates can lie in its folder; where a folder
holds both layouts, ours is read. Config keys and tensor names are the same in both:
``model.layers.{i}.self_attn.retention_gate.{tensor}``, tied tensors once per layer.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from trimkv_kernels.gates.modules import GateConfig, RetentionGates

CONFIG_NAME = "trimkv_config.json"
WEIGHTS_NAME = "trimkv_gates.safetensors"
PUBLISHED_CONFIG_NAME = "config.json"
PUBLISHED_WEIGHTS_NAME = "trimkv_weights.pth"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 4


def load_gates(folder_or_hub_id: str | Path, *, revision: str | None = None) -> RetentionGates:
    """Read retention gates, in the dtype they are stored in, onto the CPU.

    Pickled weights are read with ``weights_only=True``: nothing in them is executed.

    The hub path is the same code behind ``huggingface_hub``; it is untested.

    Args:
        folder_or_hub_id: Folder of a checkpoint, or ``"owner/name"`` on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; ``None`` is the default branch.

    Returns:
        The gates; ``gates.config`` names their base model, budget and buffer where known.

    Raises:
        ValueError: there is no checkpoint, a file is corrupt or holds more than plain tensors, or
            keys, shapes or dtypes are not those that the config asks for.
    """
    folder = checkpoint_folder(folder_or_hub_id, revision=revision)
    weights_path = _first_file(folder, "weights", (WEIGHTS_NAME, PUBLISHED_WEIGHTS_NAME))
    config_path = _first_file(folder, "config", (CONFIG_NAME, PUBLISHED_CONFIG_NAME))
    config = _read_config(config_path)
    tensors = _read_tensors(weights_path)
    with torch.device("meta"):
        gates = RetentionGates(config)
    _check_tensors(tensors, gates, weights_path)
    for layer, gate in enumerate(gates.layers):
        stored = {name: tensors[_key(layer, name)] for name in gate.state_dict()}
        gate.load_state_dict(stored, assign=True)
    gates.tie()
    return gates


def save_gates(gates: RetentionGates, folder: str | Path) -> None:
    """Write gates as ``trimkv_gates.safetensors`` and ``trimkv_config.json``.

    Both files are complete before either gets its name: a failed write leaves what was there.

    Args:
        gates: The gates; their dtype is kept.
        folder: Where to write; made when missing.

    Raises:
        TypeError: ``gates`` is not a ``RetentionGates``.
        ValueError: ``folder`` is a file, or the parameters of ``gates`` differ in dtype or no
            longer have the shapes of their config.
    """
    if not isinstance(gates, RetentionGates):
        raise TypeError(f"gates must be a RetentionGates, got {type(gates).__name__}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a directory, got the file {folder}")
    with torch.device("meta"):
        expected = RetentionGates(gates.config)
    tensors = _stored(gates)
    _check_tensors(tensors, expected, folder / WEIGHTS_NAME)
    # safetensors refuses tensors that share memory, as tied ones do.
    tensors = {key: tensor.cpu().clone().contiguous() for key, tensor in tensors.items()}

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trimkv-", dir=folder) as staging:
        # Not save_file: its files are readable by their owner only, whatever the umask.
        Path(staging, WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        text = json.dumps(gates.config.to_dict(), indent=2) + "\n"
        Path(staging, CONFIG_NAME).write_text(text, encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(staging, name), folder / name)


def checkpoint_folder(
    folder_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Find the local folder of a checkpoint, fetching the gate files from the hub if need be.

    The hub path is untested. ``HF_HUB_OFFLINE`` and the other variables of ``huggingface_hub``
    are obeyed.

    Args:
        folder_or_hub_id: An existing folder, or ``"owner/name"`` on the hub.
        revision: Branch, tag or commit on the hub.
        local_files_only: Look in the hub cache only.

    Returns:
        The folder; for a hub id, its snapshot in the hub cache.

    Raises:
        ValueError: there is neither such a folder nor such a repository, or ``revision`` is given
            with a folder.
    """
    path = Path(folder_or_hub_id)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision is for hub ids only, got {revision!r} with folder {path}")
        return path
    if path.exists():
        raise ValueError(f"folder_or_hub_id must be a folder, got the file {path}")
    files = [CONFIG_NAME, WEIGHTS_NAME, PUBLISHED_CONFIG_NAME, PUBLISHED_WEIGHTS_NAME]
    try:
        snapshot = snapshot_download(
            str(folder_or_hub_id),
            revision=revision,
            allow_patterns=files,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder_or_hub_id must be an existing folder or a hub id 'owner/name', got "
            f"{str(folder_or_hub_id)!r}: there is no such folder, and the hub says: {error}"
        ) from error
    return Path(snapshot)


def resolve_base_model(folder: str | Path, config: GateConfig) -> str:
    """Say where the base model of a checkpoint is.

    Args:
        folder: The checkpoint's folder.
        config: Its config; ``base_model`` is a hub id, or a folder that is absolute, relative to
            ``folder`` or beside it.

    Returns:
        A folder or a hub id for ``from_pretrained``; ``folder`` itself if no base is named.
    """
    if config.base_model is None:
        return str(folder)
    for start in (Path(folder), Path(folder).absolute().parent):
        if (start / config.base_model).is_dir():
            return str(start / config.base_model)
    return config.base_model


def _key(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.retention_gate.{name}"


def _stored(gates: RetentionGates) -> dict[str, Tensor]:
    return {
        _key(layer, name): tensor
        for layer, gate in enumerate(gates.layers)
        for name, tensor in gate.state_dict().items()
    }


def _first_file(folder: Path, what: str, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"no retention-gate {what} in {folder}: expected {' or '.join(names)}. "
        "Pass the folder or hub id of a TRIM-KV checkpoint"
    )


def _read_config(path: Path) -> GateConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got a {type(data).__name__}")
        return GateConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}); fetch or save it again"
            ) from error
    with path.open("rb") as file:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a corrupt pickle can raise nearly anything
            raise ValueError(
                f"{path} is corrupt or holds Python objects other than tensors, which are never "
                f"loaded; fetch it again, or ask for a safetensors file ({WEIGHTS_NAME})"
            ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise ValueError(
            f"{path} must hold a plain dict of tensors, got other objects; "
            f"fetch it again, or ask for a safetensors file ({WEIGHTS_NAME})"
        )
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor], gates: RetentionGates, path: Path) -> None:
    """Raise ``ValueError`` unless ``tensors`` are what ``gates``, on any device, would store."""
    expected = _stored(gates)
    config = gates.config
    problems = [
        *_listed("missing", (key for key in expected if key not in tensors)),
        *_listed("unexpected", (key for key in tensors if key not in expected)),
        *_listed(
            "misshaped",
            (
                f"{key} (expected {list(tensor.shape)}, got {list(tensors[key].shape)})"
                for key, tensor in expected.items()
                if key in tensors and tensors[key].shape != tensor.shape
            ),
        ),
    ]
    if problems:
        raise ValueError(
            f"{path} does not hold the tensors of its config ({config.kind!r} gates, "
            f"{config.num_layers} layers, hidden_size {config.hidden_size}, intermediate_size "
            f"{config.intermediate_size}, {config.num_kv_heads} KV heads): {'; '.join(problems)}. "
            "Check that config and weights come from one checkpoint"
        )
    _check_dtypes(tensors, path)
    if config.tied:
        _check_tied(tensors, config.num_layers, path)


def _listed(what: str, items: Iterable[str]) -> list[str]:
    found = list(items)
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what} {', '.join(found[:_SHOWN])}{more}"]


def _check_dtypes(tensors: Mapping[str, Tensor], path: Path) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes.issubset(_DTYPES):
        raise ValueError(
            f"{path} must hold tensors of one dtype among {', '.join(map(str, _DTYPES))}, "
            f"got {', '.join(sorted(map(str, dtypes)))}"
        )


def _check_tied(tensors: Mapping[str, Tensor], num_layers: int, path: Path) -> None:
    for name in ("linear3.weight", "bias"):
        for layer in range(1, num_layers):
            if not torch.equal(tensors[_key(layer, name)], tensors[_key(0, name)]):
                raise ValueError(
                    f"{path}: {_key(layer, name)} differs from layer 0's, but the config ties "
                    "them; set 'tie_retention_gate_layers' to false if they were trained apart"
                )
