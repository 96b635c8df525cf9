"""Static gates: networks that score each token once, when it is inserted, and never again.

KVzap, Fast KVzip and LocRet have one module per layer, with a score per KV head. A checkpoint is
read in our layout or in the published layout of its kind.

==============  ===========================  ========================================
layout          config                       weights
==============  ===========================  ========================================
ours            ``{kind}_config.json``       ``{kind}_gates.safetensors``
published       see the policy of that kind
==============  ===========================  ========================================

Tensors have the names of the module's parameters: ``layers.{i}.{parameter}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from trimkv_kernels.files import (
    check_dense,
    find_folder,
    listed,
    read_config,
    read_tensors,
    tensor_problems,
    to_json,
    write_files,
)
from trimkv_kernels.gates.loading import build_empty, not_finite, size_problems

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StaticGateConfig:
    """Sizes of the gates of one base model. Subclasses add the sizes of their kind.

    Args:
        num_layers: Layers of the base model; there is one gate per layer.
        num_kv_heads: KV heads of one layer; a gate has one output per KV head.
        input_size: Width of a gate's input.

    Raises:
        ValueError: a size is not an int of at least 1.
    """

    num_layers: int
    num_kv_heads: int
    input_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
                raise ValueError(
                    f"{field.name} must be an int of at least 1, below 2**31, got {value!r}"
                )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build a config from the contents of a config file of ours; other keys are ignored.

        Raises:
            ValueError: a required key is missing or a size is out of range.
        """
        required = [field.name for field in fields(cls) if field.default is MISSING]
        missing = [name for name in required if name not in data]
        if missing:
            raise ValueError(
                f"the gate config lacks {', '.join(missing)}; it must have {', '.join(required)}"
            )
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


class StaticGates(nn.Module):
    """The gates of all layers of a base model, freshly initialised. A subclass is one kind.

    Attributes:
        kind: Name of the kind. Our file names begin with it.
        published_files: Patterns of the files of the published layout.

    Args:
        config: What to build, of the subclass's ``config_type``.

    Raises:
        TypeError: ``config`` is of another kind.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[StaticGateConfig]]
    published_files: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_type):
            raise TypeError(
                f"config must be a {self.config_type.__name__}, got {type(config).__name__}"
            )
        self.config = config
        self.layers = nn.ModuleList(self.make_layer(config) for _ in range(config.num_layers))

    @classmethod
    def make_layer(cls, config: Any) -> nn.Module:
        """One gate: ``[batch, seq, input_size]``, in the dtype of its linear maps, to
        ``[batch, seq, num_kv_heads]``.
        """
        raise NotImplementedError(f"{cls.__name__} does not define make_layer()")

    @classmethod
    def read_published(cls, folder: Path) -> tuple[StaticGateConfig, dict[str, Tensor]]:
        """Config and tensors, named as in :meth:`state_dict`, of a published checkpoint.

        Raises:
            ValueError: a file is missing or not valid.
        """
        raise NotImplementedError(f"{cls.__name__} does not define read_published()")

    def forward(self, layer: int, features: Tensor) -> Tensor:
        """Score the tokens of one layer.

        Args:
            layer: Index of the layer in the base model.
            features: ``[batch, seq, input_size]``, any float dtype.

        Returns:
            ``[batch, num_kv_heads, seq]`` float32, higher is kept.

        Raises:
            ValueError: ``layer`` is out of range or ``features`` has another shape.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer must be in [0, {len(self.layers)}), got {layer}")
        if features.ndim != 3 or features.shape[-1] != self.config.input_size:
            raise ValueError(
                f"features must have shape [batch, seq, {self.config.input_size}], "
                f"got {list(features.shape)}: these gates were made for another model"
            )
        gate = self.layers[layer]
        # published gates can hold their norms in another dtype than their linear maps
        linear = next(module for module in gate.modules() if isinstance(module, nn.Linear))
        scores: Tensor = gate(features.to(linear.weight.dtype))
        return scores.float().transpose(1, 2)


Gates = TypeVar("Gates", bound=StaticGates)


def load_static_gates(
    gates_type: type[Gates], folder_or_hub_id: str | Path, *, revision: str | None = None
) -> Gates:
    """Read gates of one kind, in the dtype they are stored in, onto the CPU.

    Nothing in the files is executed: weights are safetensors, or torch files opened with
    ``weights_only=True``. Loading from the hub is untested.

    Args:
        gates_type: The kind.
        folder_or_hub_id: Folder of a checkpoint, or ``"owner/name"`` on the Hugging Face hub;
            ``"owner/name/folder"`` is a folder of such a repository.
        revision: Branch, tag or commit on the hub; None is the default branch.

    Raises:
        ValueError: there is no checkpoint, a file is corrupt or holds more than plain tensors, or
            keys, shapes or dtypes differ from the config, or a number is NaN or infinite.
    """
    config_name, weights_name = _own_files(gates_type)
    files = (config_name, weights_name, *gates_type.published_files)
    folder = find_folder(folder_or_hub_id, files=files, revision=revision)
    if (folder / weights_name).is_file():
        config = read_config(folder / config_name, gates_type.config_type.from_dict)
        tensors = read_tensors(folder / weights_name)
    else:
        config, tensors = gates_type.read_published(folder)
    check_dense(folder, tensors)
    sizes = [value for name, value in asdict(config).items() if value and name != "num_layers"]
    _raise_problems(size_problems(config.num_layers, sizes, tensors), config, folder)
    gates = build_empty(lambda: gates_type(config))
    _check_tensors(tensors, gates.state_dict(), config, folder)
    _raise_problems(not_finite(tensors), config, folder)
    gates.load_state_dict(tensors, assign=True)
    return gates


def save_static_gates(gates: StaticGates, folder: str | Path) -> None:
    """Write gates in our layout; a failed write changes nothing.

    Args:
        gates: The gates; their dtype is kept.
        folder: Where to write; made when missing.

    Raises:
        ValueError: ``folder`` is a file, or parameters no longer have the shapes of their config.
    """
    with torch.device("meta"):
        expected = type(gates)(gates.config).state_dict()
    tensors = {name: x.detach().cpu().contiguous() for name, x in gates.state_dict().items()}
    _check_tensors(tensors, expected, gates.config, folder)
    config_name, weights_name = _own_files(type(gates))
    config = {"kind": gates.kind, **asdict(gates.config)}
    write_files(
        folder,
        {
            weights_name: save(tensors, metadata={"format": "pt"}),
            config_name: to_json(config),
        },
    )


def only_file(folder: Path, pattern: str, gates_type: type[StaticGates]) -> Path:
    """The one file of ``folder`` that matches ``pattern``.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    own = " and ".join(_own_files(gates_type))
    what = f"{len(found)} files {pattern}" if found else f"no {gates_type.kind} gates"
    raise ValueError(
        f"{what} in {folder}: expected {own}, or one {pattern} as published. "
        f"Pass the folder or hub id of such a checkpoint"
    )


def _own_files(gates_type: type[StaticGates]) -> tuple[str, str]:
    return f"{gates_type.kind}_config.json", f"{gates_type.kind}_gates.safetensors"


def _check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: StaticGateConfig,
    folder: str | Path,
) -> None:
    dtypes = (f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype not in _DTYPES)
    problems = [
        *tensor_problems(tensors, expected),
        *listed("neither fp32, bf16 nor fp16", dtypes),
    ]
    _raise_problems(problems, config, folder)


def _raise_problems(problems: list[str], config: StaticGateConfig, folder: str | Path) -> None:
    if problems:
        raise ValueError(
            f"the weights in {folder} are not those of {config}: {'; '.join(problems)}. "
            "Check that config and weights come from one checkpoint of this kind"
        )
