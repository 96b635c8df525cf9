"""One frozen model as teacher (stock attention) and as student (attention that fades).

The student differs from the teacher in one operation: every attention layer lowers the logit of a
token ``j`` by its gate's ``log_beta_j`` per step of age. So gates learn to give a high ``beta`` to
tokens that the model would miss. Only gates are trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trimkv_kernels.gates import RetentionGates, check_base
from trimkv_kernels.integrations import Integration
from trimkv_kernels.integrations.discovery import ModelParts, check_layer_types, find_parts
from trimkv_kernels.integrations.images import Prompt, is_image
from trimkv_kernels.integrations.instance_patch import InstancePatch
from trimkv_kernels.integrations.protocol import AttentionCache, LayerCall
from trimkv_kernels.training.attention import ATTENTION_IMPLS, gated_attention, op_impl
from trimkv_kernels.training.capacity import (
    NORMALIZATIONS,
    SCOPES,
    check_choice,
    check_protection,
    excess,
    expected_tokens,
)
from trimkv_kernels.training.local import LocalPass
from trimkv_kernels.training.losses import (
    ATTENTION,
    base_losses,
    needs_teacher,
    parse_base_loss,
)
from trimkv_kernels.training.packing import IGNORED, Packing


class RetentionPass(AttentionCache):
    """One student forward. Attention layers get it instead of a cache.

    Attributes:
        log_beta: By layer, ``[batch, num_kv_heads, seq]`` fp32.
    """

    def __init__(
        self, gates: RetentionGates, packing: Packing, *, sinks: int, recent: int, impl: str
    ) -> None:
        self.log_beta: dict[int, Tensor] = {}
        self._gates, self._document = gates, packing.document
        self._recent, self._impl = recent, impl
        self._stays = (packing.position < sinks)[:, None] if sinks else None

    def attend(self, layer: int, call: LayerCall) -> Tensor:
        """Attend within the tokens of this call, under the interface of a cache."""
        log_beta = self._gates(layer, call.hidden_states)
        if self._stays is not None:
            log_beta = log_beta.masked_fill(self._stays, 0)
        # Gradient checkpointing runs this again; the loss reads the first result.
        self.log_beta.setdefault(layer, log_beta)
        # Under autocast, norms and RoPE leave query and key in a wider dtype than the value.
        return gated_attention(
            call.query.to(call.value.dtype),
            call.key.to(call.value.dtype),
            call.value,
            log_beta,
            document=self._document,
            recent=self._recent,
            scale=call.scale,
            impl=self._impl,
        )


class GateModel(nn.Module):
    """A frozen model and its gates. The forward returns the training loss.

    The state dict only holds the gates. While :meth:`attached`, the model's parameters are frozen
    and its attention layers take a ``retention`` argument. Afterwards the model is as it was.

    Args:
        model: A supported transformers model, not patched.
        gates: Gates that fit it, on its device.
        budget: Tokens a head may hold without capacity loss.
        sinks: First positions of a document that never fade.
        recent: Positions for which a token does not fade.
        scope: ``"head"`` or ``"global"``, see :func:`capacity_loss`.
        base_loss: ``"fwkl"``, ``"rvkl"``, ``"ntp"``, or several joined by ``_``; or
            ``"attention"``, see ``trimkv_kernels.training.local``.
        capacity_weight: Factor of the capacity loss.
        normalization: Of the capacity loss, ``"reference"`` or ``"paper"``.
        impl: Of attention, see :func:`gated_attention`.
        loss_chunk: Positions whose logits exist at a time.

    Raises:
        TypeError: the model is not supported, or patched by someone else.
        ValueError: an option is unknown, or the gates do not fit.
    """

    # else Trainer would take the images of forward() for arguments of its loss
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        gates: RetentionGates,
        *,
        budget: int,
        sinks: int = 0,
        recent: int = 0,
        scope: str = "head",
        base_loss: str = "fwkl_ntp",
        capacity_weight: float = 1.0,
        normalization: str = "reference",
        impl: str = "auto",
        loss_chunk: int = 512,
    ) -> None:
        super().__init__()
        check_choice("scope", scope, SCOPES)
        check_choice("normalization", normalization, NORMALIZATIONS)
        check_choice("impl", impl, ATTENTION_IMPLS)
        parse_base_loss(base_loss)
        check_protection(budget, sinks, recent)
        parts = _trainable_parts(model)
        check_base(gates.config, **parts.gate_sizes())
        self._parts = parts  # no module itself, so nothing is registered twice
        self.model: Any = model
        self.gates = gates
        self.budget, self.sinks, self.recent = budget, sinks, recent
        self.scope, self.normalization = scope, normalization
        self.base_loss, self.capacity_weight = base_loss, capacity_weight
        self.impl, self.loss_chunk = impl, loss_chunk
        self.register_state_dict_post_hook(_keep_gates)
        self.register_load_state_dict_post_hook(_miss_gates_only)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the context, the model is frozen and its attention layers run the student too.

        Run the backward pass inside, because gradient checkpointing runs the layers again.
        """
        layers, integration = self._parts.layers, self._parts.integration
        with InstancePatch() as patch:
            for module in self.model.modules():
                for name in ("training", *_CHECKPOINTING):
                    patch.keep(module, name)
            for parameter in [p for p in self.model.parameters() if p.requires_grad]:
                parameter.requires_grad_(False)
                patch.on_restore(functools.partial(parameter.requires_grad_, True))
            for layer in layers:
                forward = functools.partial(_forward, layer, layer.forward, integration)
                patch.set(layer, "forward", forward)
            yield

    def train(self, mode: bool = True) -> GateModel:
        """Set the mode of the gates. The model stays in eval mode: it must not be random.

        Only the ``training`` flag of its decoder layers follows ``mode``, because gradient
        checkpointing checks it. The modules inside the layers stay in eval mode.
        """
        super().train(mode)
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Any = None, **options: Any
    ) -> None:
        """As for a transformers model, but never reentrant: that loses the gates' gradients."""
        chosen = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable(chosen, **options)
        else:
            self.model.gradient_checkpointing_enable(chosen, **options)
        # It also asks for gradients of the embeddings, which nothing here needs.
        self.model.disable_input_require_grads()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, **options: Any
    ) -> None:
        """The name of :meth:`gradient_checkpointing_enable` in newer versions of transformers."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **images: Any,
    ) -> dict[str, Tensor]:
        """Run teacher and student and compare.

        Args:
            input_ids: ``[batch, seq]`` int64.
            labels: ``[batch, seq]`` int64, the token at each position, or -100 where it does not
                count; None counts all tokens except padding and image tokens.
            position_ids: ``[batch, seq]`` int64 of packed rows: a document begins where they do
                not grow by one. None means that a row is one document.
            attention_mask: ``[batch, seq]``, 0 for padding on either side.
            images: For a vision-language model, what its processor returned beside the tokens.
                Rows must not be packed then.

        Returns:
            ``loss``, ``base_loss``, ``capacity_loss`` and each base loss by name, fp32 scalars;
            ``log_beta`` and ``held`` (retention sums), ``[batch, layers, num_kv_heads, seq]`` fp32,
            detached; ``valid`` ``[batch, seq]`` bool.

        Raises:
            ValueError: images of the text are missing, or packed rows have images.
        """
        batch, seq = input_ids.shape
        if images and position_ids is not None:
            raise ValueError("position_ids must be None with images, whose rows are not packed")
        packing = Packing.of(
            (batch, seq), input_ids.device, position_ids=position_ids, valid=attention_mask
        )
        text = self._text(input_ids, attention_mask, images, packing)
        if labels is None and self._parts.image_ids:
            labels = input_ids.masked_fill(is_image(input_ids, self._parts.image_ids), IGNORED)
        target = packing.targets(input_ids if labels is None else labels)
        if self.base_loss == ATTENTION:
            base, log_beta = self._attention_errors(text, packing, target)
        else:
            base, log_beta = self._predictions(text, packing, target)
        base_loss = torch.stack(list(base.values())).mean()
        held = expected_tokens(
            log_beta.flatten(1, 2), packing, recent=self.recent, impl=op_impl(self.impl)
        )
        capacity = excess(
            held,
            packing,
            budget=self.budget,
            scope=self.scope,
            normalization=self.normalization,
        )
        return {
            "loss": base_loss + self.capacity_weight * capacity,
            "base_loss": base_loss.detach(),
            "capacity_loss": capacity.detach(),
            **{name: value.detach() for name, value in base.items()},
            "log_beta": log_beta.detach(),
            "held": held.detach().view_as(log_beta),
            "valid": packing.valid,
        }

    def _text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: dict[str, Any],
        packing: Packing,
    ) -> dict[str, Any]:
        """The decoder stack's input: tokens, or embeddings with images, and positions."""
        prompt = Prompt.of(self._parts, input_ids, images or None, attention_mask)
        text = prompt.part(0, input_ids.shape[1])
        if "position_ids" not in text:
            position = packing.position
            if self._parts.integration.position_axes > 1:
                # the text's positions come first, because packed documents are found by them
                position = position.expand(1 + self._parts.integration.position_axes, -1, -1)
            text["position_ids"] = position
        return text

    def _predictions(
        self, text: dict[str, Any], packing: Packing, target: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of teacher and student by name, and the log betas of all layers."""
        teacher = self._teacher(text, packing) if needs_teacher(self.base_loss) else None
        student, log_beta = self._student(text, packing)
        losses = base_losses(
            student,
            teacher,
            self._parts.generator.get_output_embeddings(),
            target,
            base_loss=self.base_loss,
            chunk=self.loss_chunk,
        )
        return losses, log_beta

    def _attention_errors(
        self, text: dict[str, Any], packing: Packing, target: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The loss of attention alone, and the log betas of all layers."""
        local = LocalPass(self.gates, packing, target, sinks=self.sinks, recent=self.recent)
        self._teacher(text, packing, retention=local)
        return {ATTENTION: torch.stack(local.errors).mean()}, self._stacked(local.log_beta)

    def _teacher(self, text: dict[str, Any], packing: Packing, **options: Any) -> Tensor:
        """The stock model's last hidden states.

        Every padding token has position 0 and is a document of its own, so positions alone define
        attention. With images they do not, and a mask is used.
        """
        if "inputs_embeds" in text:
            text = {**text, "attention_mask": packing.valid}
        elif packing.document is not None and "flash" in self._parts.config._attn_implementation:
            # For FlashAttention, transformers finds packed documents only in batches of one row.
            text = {
                "input_ids": text["input_ids"].reshape(1, -1),
                "position_ids": text["position_ids"].flatten(-2).unsqueeze(-2),
            }
        with torch.no_grad():
            hidden = self._parts.base(**text, use_cache=False, **options).last_hidden_state
        return hidden.view(*packing.position.shape, -1)

    def _student(self, text: dict[str, Any], packing: Packing) -> tuple[Tensor, Tensor]:
        """Last hidden states, and ``[batch, layers, num_kv_heads, seq]`` log betas."""
        retention = RetentionPass(
            self.gates, packing, sinks=self.sinks, recent=self.recent, impl=self.impl
        )
        hidden = self._parts.base(
            **text,
            # The pass itself masks, so no mask is built.
            attention_mask=self._parts.integration.no_mask(packing.position.device),
            use_cache=False,
            retention=retention,
        ).last_hidden_state
        return hidden, self._stacked(retention.log_beta)

    def _stacked(self, log_beta: dict[int, Tensor]) -> Tensor:
        """``[batch, layers, num_kv_heads, seq]``."""
        return torch.stack([log_beta[layer] for layer in range(len(self._parts.layers))], dim=1)


def _trainable_parts(model: nn.Module) -> ModelParts:
    """The parts of a model whose gates can be trained, with all of its layers."""
    parts = find_parts(model)
    if parts.generator is None:
        raise TypeError(
            f"model must be a {parts.integration.causal_model.__name__}, on whose logits gates are "
            f"trained, got {type(model).__name__}"
        )
    check_layer_types(parts.base)
    return parts


def _forward(
    layer: nn.Module,
    stock: Callable[..., Any],
    integration: Integration,
    *args: Any,
    retention: AttentionCache | None = None,
    **kwargs: Any,
) -> Any:
    if retention is None:
        return stock(*args, **kwargs)
    # Under another name until here, because gradient checkpointing drops caches from the arguments.
    kwargs["past_key_values"] = retention
    return integration.attention_forward(layer, *args, **kwargs)


_GATES = "gates."
# Attributes that gradient checkpointing leaves on a transformers model.
_CHECKPOINTING = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
)


def _keep_gates(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for key in [k for k in state_dict if not k.startswith(prefix + _GATES)]:
        if key.startswith(prefix):
            del state_dict[key]


def _miss_gates_only(module: nn.Module, incompatible: Any) -> None:
    missing = [key for key in incompatible.missing_keys if _GATES in key]
    incompatible.missing_keys[:] = missing
