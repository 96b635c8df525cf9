"""What an integration says about a model family, and the attention forward that all share.

The families differ in how an attention layer computes its queries, keys and values, in how it
rotates them, and in which masks the decoder stack takes. The rest is the same for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimkv_kernels.integrations import compat
from trimkv_kernels.integrations.protocol import LayerCall
from trimkv_kernels.kernels import Rope

STOCK_FORWARD = "_trimkv_stock_forward"
FULL, SLIDING = "full_attention", "sliding_attention"  # as transformers names them

States = tuple[Tensor, Tensor, Tensor]


def project_qkv(layer: Any, hidden_states: Tensor) -> States:
    """Query, key and value before RoPE, from three projections.

    Args:
        layer: An attention layer. Its projections are called and their weights never read,
            because they may be quantised or have adapters.
        hidden_states: ``[batch, q_len, hidden_size]``.

    Returns:
        ``[batch, num_heads, q_len, head_dim]``, and twice
        ``[batch, num_kv_heads, q_len, head_dim]``.
    """
    query = split_heads(layer, layer.q_proj(hidden_states))
    key = split_heads(layer, layer.k_proj(hidden_states))
    return query, key, split_heads(layer, layer.v_proj(hidden_states))


def project_normed_qkv(layer: Any, hidden_states: Tensor) -> States:
    """As :func:`project_qkv`, each head's query and key normed."""
    query, key, value = project_qkv(layer, hidden_states)
    return layer.q_norm(query), layer.k_norm(key), value


def plain_rope(
    layer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Rope | None:
    """What a layer does to queries and keys after :func:`project_qkv`.

    Returns:
        None if its norms or its RoPE are not as the family writes them.
    """
    batch, dtype = hidden_states.shape[0], hidden_states.dtype
    cos, sin = (x.expand(batch, -1, -1) for x in position_embeddings)
    if cos.shape[-1] != layer.head_dim or cos.dtype != dtype or cos.stride() != sin.stride():
        return None
    if not hasattr(layer, "q_norm"):
        return Rope(cos, sin)
    norms = (layer.q_norm, layer.k_norm)
    if not all(_runs_as_written(norm, layer) and norm.weight.dtype == dtype for norm in norms):
        return None
    query_norm, key_norm = norms
    eps = query_norm.variance_epsilon
    if eps != key_norm.variance_epsilon:
        return None
    return Rope(cos, sin, query_norm.weight.detach(), key_norm.weight.detach(), eps)


def _runs_as_written(module: Any, layer: Any) -> bool:
    """Whether a norm is of the layer's own family, and nobody sharded, replaced or hooked it."""
    if type(module).__module__ != type(layer).__module__ or "forward" in vars(module):
        return False
    if type(module.weight) is not nn.Parameter:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def split_heads(layer: Any, states: Tensor) -> Tensor:
    """``[batch, q_len, heads * head_dim]`` as ``[batch, heads, q_len, head_dim]``."""
    return states.view(*states.shape[:-1], -1, layer.head_dim).transpose(1, 2)


@dataclass(frozen=True)
class Integration:
    """One model family of transformers.

    Its attention layers must have ``o_proj``, ``scaling``, ``head_dim`` and ``layer_idx``.

    Args:
        name: As users know it.
        causal_model: The class that generates.
        base_model: The class of its decoder stack, which takes the padding mask.
        attention: The class of its attention layers.
        rotate: RoPE: ``(query, key, cos, sin) -> (query, key)``.
        eager_attention: Its attention function if the model runs no registered one.
        project: ``(layer, hidden_states) -> (query, key, value)`` before RoPE, see
            :func:`project_qkv`.
        layer_types: Names of the kinds of layers, if its decoder stack takes a mask for each kind;
            empty if it takes one mask. Layers with ``"sliding_attention"`` are not patched and use
            caches of their own.
        position_axes: Numbers that RoPE takes for each token: 3 for images with rows, columns and
            frames (m-RoPE).
        has_plain_rope: RoPE turns the two halves of a head, over all its dimensions, and
            ``q_norm`` and ``k_norm``, if there are any, are ``weight * x / rms(x)``. The launch of
            a decode step can then do both.
        note: What users of the family should know, for the table of supported models.
    """

    name: str
    causal_model: type[nn.Module]
    base_model: type[nn.Module]
    attention: type[nn.Module]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    eager_attention: Callable[..., Any]
    project: Callable[[Any, Tensor], States] = project_qkv
    layer_types: tuple[str, ...] = ()
    position_axes: int = 1
    has_plain_rope: bool = False
    note: str = ""

    def attention_forward(
        self,
        layer: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The ``forward`` of an attention layer; without a bounded cache it calls the stock one.

        It may get another cache after ``unpatch``, if a hook of accelerate still calls it.
        """
        if not hasattr(past_key_values, "attend"):
            return stock_forward(layer)(  # by name, because the order differs between families
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        rope = None
        if self.has_plain_rope and past_key_values.fuses_rope(hidden_states.shape[1]):
            rope = plain_rope(layer, hidden_states, position_embeddings)
        query_nope: Tensor | None = None
        key_nope: Tensor | None = None
        if rope is not None:
            query, key, value = project_qkv(layer, hidden_states)
        else:
            query_nope, key_nope, value = self.project(layer, hidden_states)
            if self.position_axes > 1:
                position_embeddings = compat.join_axes(layer, position_embeddings)
            query, key = self.rotate(query_nope, key_nope, *position_embeddings)

        def self_attention() -> Tensor:
            attention = ALL_ATTENTION_FUNCTIONS.get(
                layer.config._attn_implementation, self.eager_attention
            )
            output, _ = attention(
                layer, query, key, value, attention_mask, scaling=layer.scaling, **kwargs
            )
            return output.transpose(1, 2)

        call = LayerCall(
            query=query,
            key=key,
            value=value,
            hidden_states=hidden_states,
            scale=layer.scaling,
            self_attention=self_attention,
            query_nope=query_nope,
            key_nope=key_nope,
            rope=rope,
        )
        output = past_key_values.attend(layer.layer_idx, call)
        output = output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1).contiguous()
        return layer.o_proj(output), None

    def no_mask(self, device: torch.device) -> dict[str, None] | Tensor:
        """The ``attention_mask`` with which the decoder stack builds no mask."""
        if self.layer_types:
            return dict.fromkeys(self.layer_types)
        return torch.empty(0, 0, 0, 0, device=device)  # a 4-D mask is passed on as it is

    def check_attention(self, layer: nn.Module) -> None:
        """Check that a layer's ``forward`` is the one that this integration expects.

        Raises:
            TypeError: the class was subclassed or its ``forward`` replaced.
        """
        expected = f"transformers' {self.attention.__name__}.forward"
        if type(layer) is not self.attention:
            raise TypeError(
                f"attention layers must be {self.attention.__name__}, got {type(layer).__name__}"
            )
        forward = self.attention.forward
        if forward.__module__ != self.attention.__module__:
            raise TypeError(
                f"the attention forward must be {expected}, "
                f"got one from {forward.__module__}; undo that patch first"
            )
        wanted = list(inspect.signature(self.attention_forward).parameters)[1:]
        got = inspect.signature(forward).parameters
        if not set(wanted) <= set(got):  # others come by name, in **kwargs
            raise TypeError(
                f"{expected} must take {wanted}, got {list(got)}: "
                "this version of transformers is not supported"
            )


@dataclass(frozen=True)
class AnyDecoder:
    """A family that adds images to the decoder stack of any other family.

    Args:
        name: As users know it.
        causal_model: The class that generates.
        note: What users of the family should know, for the table of supported models.
    """

    name: str
    causal_model: type[nn.Module]
    note: str = ""

    def around(self, decoder: Integration) -> Integration:
        """The integration of a model of this family with the given decoder stack."""
        return replace(decoder, name=self.name, causal_model=self.causal_model, note=self.note)


def support_table(families: Sequence[Integration | AnyDecoder]) -> str:
    """The families as a table in Markdown."""
    rows = [
        f"| {family.name} | `{family.causal_model.__name__}` | {_bounded(family)} | {family.note} |"
        for family in families
    ]
    head = ["| family | class in transformers | bounded layers | note |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _bounded(family: Integration | AnyDecoder) -> str:
    if isinstance(family, AnyDecoder):
        return "those of the decoder"
    return "those with full attention" if SLIDING in family.layer_types else "all"


def stock_forward(layer: nn.Module) -> Callable[..., Any]:
    """The ``forward`` that a patched attention layer had before."""
    previous = layer.__dict__.get(STOCK_FORWARD)
    if previous is not None:
        return previous
    return type(layer).forward.__get__(layer)
