"""Tensors that belong together, as a frozen dataclass of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import Tensor

Group = TypeVar("Group", bound="Tensors")


class Tensors:
    """Base of dataclasses whose entries are tensors, None, and one tuple of tensors: ``fields``."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; the fields are ``fields[0]`` and so on."""
        found: dict[str, Tensor] = {}
        this: Any = self
        for each in fields(this):
            given = getattr(self, each.name)
            if isinstance(given, tuple):
                found |= {f"{each.name}[{index}]": one for index, one in enumerate(given)}
            elif given is not None:
                found[each.name] = given
        return found

    def map(self: Group, change: Callable[[Tensor], Tensor]) -> Group:
        """A new group with ``change(tensor)`` for every tensor."""
        this: Any = self
        changed = {name: change(x) for name, x in self.tensors().items() if "[" not in name}
        found: Group = replace(this, **changed, fields=tuple(change(x) for x in this.fields))
        return found
