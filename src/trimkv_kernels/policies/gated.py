"""Common parts of policies that own gates. Nothing here is registered."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from trimkv_kernels.gates.static import StaticGates, load_static_gates, save_static_gates
from trimkv_kernels.policies.base import (
    ModelShape,
    Needs,
    RetentionPolicy,
    TokenView,
    policy_name,
)

Module = TypeVar("Module", bound=nn.Module)


def placed(gates: Module, shape: ModelShape) -> Module:
    """``gates`` in the dtype of a model, each layer on its device. A copy is made if needed.

    Args:
        gates: Their ``layers`` hold all parameters.
        shape: The model's. In a copy over several devices, layers share no parameters.
    """
    layers = cast(nn.ModuleList, gates.layers)
    devices = [shape.device_of(index) for index in range(len(layers))]
    if all(
        p.dtype == shape.dtype and p.device == device
        for layer, device in zip(layers, devices, strict=True)
        for p in layer.parameters()
    ):
        return gates
    if len(set(devices)) == 1:
        return copy.deepcopy(gates).to(device=devices[0], dtype=shape.dtype)
    moved = copy.copy(gates)
    moved._modules = dict(gates._modules)
    moved.layers = nn.ModuleList(
        copy.deepcopy(layer).to(device=device, dtype=shape.dtype)
        for layer, device in zip(layers, devices, strict=True)
    )
    return moved


def drawn(make: Callable[[], Module]) -> Module:
    """Call ``make`` and set the parameters to N(0, 0.3), the same each time.

    The state of torch's generators does not change.
    """
    with torch.device("meta"):
        gates = make()
    gates.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return gates


@dataclass(frozen=True, eq=False)
class StaticGatePolicy(RetentionPolicy):
    """Scores each token once, with a gate that reads inputs of the token's own layer: slope 0.

    A subclass sets ``gates_type``; its gates read ``hidden_states`` unless it overrides ``needs``
    and :meth:`features`.

    Args:
        gates: One gate per layer. They belong to the policy, not to a model.

    Raises:
        TypeError: ``gates`` are of another kind.
    """

    gates: StaticGates

    gates_type: ClassVar[type[StaticGates]]
    needs = Needs(insert=("hidden_states",))
    shardable = False  # its gates cannot be split by heads
    scores_content = True

    def __post_init__(self) -> None:
        if not isinstance(self.gates, self.gates_type):
            raise TypeError(
                f"gates must be {self.gates_type.__name__}, got {type(self.gates).__name__}"
            )

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, *, revision: str | None = None) -> Self:
        """Load gates in our layout or the published one.

        Args:
            folder_or_hub_id: Folder of a checkpoint, ``"owner/name"`` on the hub, or
                ``"owner/name/folder"``.
            revision: Branch, tag or commit on the hub.

        Raises:
            ValueError: there is no such checkpoint, or its files are not valid.
        """
        return cls(load_static_gates(cls.gates_type, folder_or_hub_id, revision=revision))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the gates as safetensors with their config, all or nothing."""
        save_static_gates(self.gates, folder)

    def sizes(self, shape: ModelShape) -> dict[str, int | None]:
        """Sizes that the gates' config must have for a model; None if the model does not say."""
        return {
            "num_layers": shape.num_layers,
            "num_kv_heads": shape.num_kv_heads,
            "input_size": shape.hidden_size,
        }

    def features(self, tokens: TokenView) -> Tensor:
        """``[batch, new, input_size]``: what the gates read."""
        return tokens.hidden_states

    def bind(self, shape: ModelShape) -> Self:
        config = self.gates.config
        wrong = [
            f"{name} is {getattr(config, name)} in the gates and {size} in the model"
            for name, size in self.sizes(shape).items()
            if size is not None and getattr(config, name) != size
        ]
        if wrong:
            raise ValueError(
                f"the gates of policy {policy_name(self)!r} do not fit the model: "
                f"{'; '.join(wrong)}; use gates that were trained for it"
            )
        gates = placed(self.gates, shape)
        return self if gates is self.gates else replace(self, gates=gates)

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores = self.gates(tokens.layer, self.features(tokens))
        return torch.zeros_like(scores), scores
