"""Checks of a cache's arguments and of its calls: shapes, dtypes, devices, never contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Inputs
from trimkv_kernels.checks import check_positive
from trimkv_kernels.kernels.prologue import Rope
from trimkv_kernels.policies.base import ModelShape, Needs, RetentionPolicy

NOPE = ("query_nope", "key_nope")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CallChecks:
    """Checks that every call of one cache must pass.

    Args:
        policy: Its name, for messages.
        needs: The inputs that the policy declares.
        num_kv_heads, head_dim: Shape of a layer's keys.
        num_heads: Query heads; None allows any multiple of ``num_kv_heads``.
        dtype: Of queries, keys and values.
    """

    policy: str
    needs: Needs
    num_kv_heads: int
    head_dim: int
    num_heads: int | None
    dtype: torch.dtype

    def check(
        self,
        inputs: Inputs,
        valid: Tensor | None,
        rope: Rope | None,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """Check a layer's inputs.

        Raises:
            ValueError: an input does not fit; names the argument, what was expected and what came.
        """
        q_len = self._check_states(inputs, batch_size, device)
        hidden_states = inputs["hidden_states"]
        if hidden_states is not None and hidden_states.shape[:2] != (batch_size, q_len):
            raise ValueError(
                f"hidden_states must have shape [{batch_size}, {q_len}, hidden_size], "
                f"got {list(hidden_states.shape)}"
            )
        needs = self.needs
        if rope is not None:
            self._check_rope(rope, inputs, (batch_size, q_len), device)
        for name in (*needs.insert, *(("query_nope",) if needs.query_moments else ())):
            if inputs[name] is None and (rope is None or name not in NOPE):
                raise ValueError(
                    f"policy {self.policy!r} needs {name}: "
                    f"pass {name}= to attend(), or choose another policy"
                )
        if valid is not None:
            _check_shape("valid", valid, (batch_size, q_len))
            if valid.dtype != torch.bool:
                raise ValueError(f"valid must have dtype torch.bool, got {valid.dtype}")

    def _check_rope(
        self, rope: Rope, inputs: Inputs, tokens: tuple[int, int], device: torch.device
    ) -> None:
        """Check what is to be done to queries and keys."""
        for name in NOPE:
            if inputs[name] is not None:
                raise ValueError(f"{name} must be None with rope=, which gives it")
        for name, tensor, shape in (
            ("cos", rope.cos, (*tokens, self.head_dim)),
            ("sin", rope.sin, (*tokens, self.head_dim)),
            ("query_weight", rope.query_weight, (self.head_dim,)),
            ("key_weight", rope.key_weight, (self.head_dim,)),
        ):
            if tensor is not None:
                self._check_state(name, tensor, shape, device)
        rope.check()

    def _check_states(self, inputs: Inputs, batch_size: int, device: torch.device) -> int:
        """Check queries, keys and values; returns ``q_len``."""
        query = inputs["query"]
        if query is None or query.dim() != 4 or query.shape[2] < 1:
            got = None if query is None else list(query.shape)
            raise ValueError(
                f"query must have shape [batch, num_heads, q_len >= 1, head_dim], got {got}"
            )
        num_heads, q_len = query.shape[1], query.shape[2]
        if num_heads % self.num_kv_heads or self.num_heads not in (None, num_heads):
            wanted = self.num_heads or f"a multiple of {self.num_kv_heads}"
            raise ValueError(f"query must have {wanted} heads, got {num_heads}")
        queries = (batch_size, num_heads, q_len, self.head_dim)
        keys = (batch_size, self.num_kv_heads, q_len, self.head_dim)
        for name, shape in (
            ("query", queries),
            ("key", keys),
            ("value", keys),
            ("query_nope", queries),
            ("key_nope", keys),
        ):
            tensor = inputs[name]
            if tensor is not None:
                self._check_state(name, tensor, shape, device)
        return q_len

    def _check_state(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
    ) -> None:
        _check_shape(name, tensor, shape)
        if tensor.dtype != self.dtype:
            raise ValueError(f"{name} must have dtype {self.dtype}, got {tensor.dtype}")
        if tensor.device.type != device.type:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must have contiguous head vectors, got stride {tensor.stride(-1)}"
            )
        if name in ("key", "value") and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad: a bounded cache does not carry gradients; "
                "run under torch.no_grad() or torch.inference_mode(), or without a cache"
            )


def check_sizes(dtype: torch.dtype, **sizes: int) -> None:
    """Check a cache's sizes, given by name, and its dtype.

    Raises:
        ValueError: a size is not an int of at least 1, or the dtype is not supported.
    """
    for argument, size in sizes.items():
        check_positive(argument, size)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")


def check_devices(
    device: torch.device | str | Sequence[torch.device | str], num_layers: int
) -> tuple[torch.device, ...]:
    """The device of each layer.

    Raises:
        ValueError: neither one device nor one for each layer.
    """
    if isinstance(device, (torch.device, str)):
        return (torch.device(device),) * num_layers
    devices = tuple(torch.device(each) for each in device)
    if len(devices) != num_layers:
        raise ValueError(
            f"device must be one device, or one for each of {num_layers} layers, got {len(devices)}"
        )
    return devices


def bind_policy(
    policy: RetentionPolicy,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    num_heads: int | None,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
) -> RetentionPolicy:
    """The policy, bound to what a cache knows about the model.

    Raises:
        ValueError: it does not fit.
    """
    return policy.bind(
        ModelShape(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=devices[0],
            layer_devices=tuple(devices),
            num_heads=num_heads,
        )
    )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
