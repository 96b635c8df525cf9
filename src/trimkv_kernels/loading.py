"""Models, dtypes, devices and text files, from the names that a user gives.

Each name is checked before a model loads, so that a misspelt one is reported at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.gates.checkpoint import CONFIG_NAME, PUBLISHED_WEIGHTS_NAME
from trimkv_kernels.smollm2 import NAME as SMOLLM2_NAME
from trimkv_kernels.smollm2 import smollm2_folder
from trimkv_kernels.suggestions import did_you_mean

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class ModelSource:
    """A model to load.

    Args:
        model: Folder or hub id; ``"smollm2"`` is :mod:`trimkv_kernels.smollm2`, and None is the
            small model that ships with the package.
        revision: Of the model on the hub.
        dtype: One of :data:`DTYPES`; ``"auto"`` is the dtype of the stored weights.
        device: Of the model, such as ``"cuda"`` or ``"cuda:1"``.

    Raises:
        ValueError: ``model`` is a folder without a model, ``dtype`` is unknown, or this machine has
            no such device.
    """

    model: str | Path | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model is not None:
            check_model_name(self.model)
        check_dtype(self.dtype)
        check_device(self.device)

    @property
    def name(self) -> str | Path:
        """Folder or hub id."""
        return EMBEDDED_MODEL if self.model is None else model_folder(self.model)

    def load_config(self) -> Any:
        """The model's config; of the language model, if it has several."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.name, revision=self.revision)
        return config.get_text_config()

    def load_tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.name, revision=self.revision)

    def load_model(self) -> Any:
        """The model, in eval mode, on its device."""
        from trimkv_kernels.integrations.discovery import auto_model_class

        auto = auto_model_class(self.name, revision=self.revision)
        model = auto.from_pretrained(self.name, revision=self.revision, dtype=self.dtype)
        return model.eval().to(self.device)


def model_folder(name: str | Path) -> str | Path:
    """What transformers has to load for a name: for ``"smollm2"``, the folder of that model.

    Returns:
        For all other names, the name itself.

    Raises:
        ImportError, OSError, ValueError: as :func:`trimkv_kernels.smollm2.smollm2_folder`.
    """
    return smollm2_folder() if name == SMOLLM2_NAME else name


def check_model_name(name: str | Path) -> None:
    """Check that a name is not a folder or file without a model. Hub ids are not looked up.

    Raises:
        ValueError: it is; says what was found instead.
    """
    if name == SMOLLM2_NAME:
        return
    path = Path(name)
    if path.is_dir():
        _check_model_folder(path)
    elif path.exists():
        raise ValueError(f"model must be a folder or a hub id, got the file {path}")
    elif path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > 2:
        raise ValueError(f"model must be a folder or a hub id 'owner/name': no folder {name}")


def _check_model_folder(folder: Path) -> None:
    has_weights = any(
        path.name != PUBLISHED_WEIGHTS_NAME for kind in _WEIGHTS for path in folder.glob(kind)
    )
    if (folder / "config.json").is_file():
        if (folder / PUBLISHED_WEIGHTS_NAME).is_file() and not has_weights:
            raise ValueError(f"{folder} holds retention gates and no model: pass it as gates")
        return
    if (folder / CONFIG_NAME).is_file():
        hint = "it holds retention gates: pass it as gates"
    else:
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"did you mean {folder / inside[0]}?" if inside else "pass the folder of a model"
    raise ValueError(f"{folder} is a folder without config.json: {hint}")


def check_dtype(name: str) -> None:
    """Check that a model can be loaded in a dtype of this name.

    Raises:
        ValueError: it cannot; lists the names.
    """
    if name not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, got {name!r}.{did_you_mean(name, DTYPES)}"
        )


def check_device(name: str) -> None:
    """Check that this machine has a device.

    Raises:
        ValueError: ``name`` is not a device, or there is none of this kind or number.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one such as cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cpu":
        return
    try:
        kind = torch.get_device_module(device)
        count = kind.device_count() if kind.is_available() else 0
    except (RuntimeError, AttributeError):
        count = 0
    if (device.index or 0) >= count:
        raise ValueError(
            f"device {name!r} does not exist: this machine has {count} of the kind {device.type!r}"
        )


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text_file must be UTF-8 text, got {path}: {error}") from error


def share_weights(model: Any) -> Any:
    """A copy of a model, to be patched by itself, with the same weights in the same memory."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
