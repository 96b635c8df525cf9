"""Random tokens for a cache without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.cache import BoundedKVCache
from trimkv_kernels.policies.base import ModelShape


def example_shape(device: torch.device | str = "cpu") -> ModelShape:
    """The model that the suite plays: random, small, the same on every device."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(1)
    return ModelShape(
        num_layers=2,
        num_kv_heads=2,
        head_dim=16,
        dtype=torch.float32,
        device=device,
        num_heads=4,
        hidden_size=32,
        inv_freq=(100.0 ** -(torch.arange(8) / 8)).to(device),
        output_weights=tuple(torch.randn(32, 64, generator=generator).to(device) for _ in range(2)),
    )


@dataclass(frozen=True)
class Tokens:
    """Random tokens of every layer; keys and queries are rotated by position."""

    real: Tensor  # [batch, total]
    inputs: Mapping[str, Tensor]  # by name, [layers, batch, ...]; tokens at dim -2

    @classmethod
    def random(
        cls, shape: ModelShape, total: int, padding: Sequence[int] = (0, 0, 0), seed: int = 0
    ) -> Tokens:
        """``total`` random tokens of rows with this much padding on the left, from a seed."""
        generator = torch.Generator().manual_seed(seed)
        num_heads, hidden_size = shape.num_heads or 1, shape.hidden_size or 1
        batch = len(padding)

        def draw(*rest: int) -> Tensor:
            size = (shape.num_layers, batch, *rest)
            return torch.randn(size, generator=generator).to(shape.device)

        hidden = draw(total, hidden_size)
        # keys of different lengths, so that their scores differ
        stretch = 0.3 + 2 * torch.rand(total, 1, generator=generator).to(shape.device)
        query, key, value = (
            draw(heads, total, shape.head_dim) * stretch
            for heads in (num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        states = {"query_nope": query, "key_nope": key, "value": value, "hidden_states": hidden}
        return cls._rotated(shape, padding, states)

    @classmethod
    def repeated(
        cls, shape: ModelShape, total: int, padding: Sequence[int], kinds: int = 3
    ) -> Tokens:
        """Tokens of a few ``kinds``, one after the other, as in layer 0 of a repetitive text."""
        tokens = cls.random(shape, total)
        longest = total - min(padding)
        states = {}
        for name in ("query_nope", "key_nope", "value", "hidden_states"):
            tensor = tokens.inputs[name][:, :1]
            kind = torch.arange(total) % kinds
            # counted from the end, so that padding does not matter
            states[name] = tensor[..., (kind - longest) % kinds, :].repeat_interleave(
                len(padding), dim=1
            )
        return cls._rotated(shape, padding, states)

    @classmethod
    def _rotated(
        cls, shape: ModelShape, padding: Sequence[int], states: dict[str, Tensor]
    ) -> Tokens:
        """Rows with padding on the left, queries and keys rotated by position."""
        total = states["value"].shape[-2]
        real = (torch.arange(total) >= torch.tensor(padding)[:, None]).to(shape.device)
        position = (real.long().cumsum(1) - 1).clamp(min=0)
        rotated = {
            name: _rotate(states[f"{name}_nope"], position, shape) for name in ("query", "key")
        }
        return cls(real, states | rotated)

    def with_noise(self, size: float) -> Tokens:
        """The tokens as another order of sums would round them: relative noise of ``size``."""
        generator = torch.Generator().manual_seed(11)
        inputs = {
            name: x * (1 + size * torch.randn(x.shape, generator=generator).to(x.device))
            for name, x in self.inputs.items()
        }
        return Tokens(self.real, inputs)

    def feed(self, cache: BoundedKVCache, first: int, last: int) -> Tensor:
        """One call of columns ``[first, last)``, then eviction; outputs of all layers, stacked."""
        real = self.real[:, first:last]
        part: dict[str, Any] = {name: x[..., first:last, :] for name, x in self.inputs.items()}
        layers = [
            cache.attend(
                layer,
                **{name: x[layer].clone() for name, x in part.items()},
                valid=None if bool(real.all()) else real,
            )
            for layer in range(cache.num_layers)
        ]
        cache.evict()
        return torch.stack(layers)

    def rows(self, index: Sequence[int]) -> Tokens:
        """The given rows."""
        inputs = {name: tensor[:, index] for name, tensor in self.inputs.items()}
        return Tokens(self.real[index], inputs)

    def without_padding(self, row: int) -> Tokens:
        """One row's real tokens."""
        columns = self.real[row].nonzero()[:, 0]
        inputs = {
            name: tensor[:, row : row + 1].index_select(-2, columns)
            for name, tensor in self.inputs.items()
        }
        return Tokens(self.real[row : row + 1, columns], inputs)


def _rotate(x: Tensor, position: Tensor, shape: ModelShape) -> Tensor:
    if shape.inv_freq is None:
        return x
    angle = position[:, None, :, None] * torch.cat((shape.inv_freq, shape.inv_freq))
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()
