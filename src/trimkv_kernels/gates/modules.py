"""Retention gates: small MLPs that predict how long each key/value pair is worth keeping.

A gate reads the hidden states that enter attention (after ``input_layernorm``, before the q/k/v
projections) and gives every token one decay rate per KV head (Bui et al., "Cache What Lasts",
arXiv 2512.03324)::

    rg:    log_beta = logsigmoid(W2 act(W1 x + b1) + bias)
    rg10:  log_beta = logsigmoid(W3 act(W2 act(W1 x + b1) + b2) + bias)

``log_beta <= 0``; 0 means "never forget". ``rg10`` may tie ``W3`` and ``bias`` across layers, which
makes the rates of different layers comparable (Bui et al., "Make Each Token Count",
arXiv 2605.09649).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WEIGHT_STD = 0.02
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# Files use the keys of the published checkpoints, so that one reader can read every layout.
_FILE_KEYS = {
    "kind": "retention_gate",
    "hidden_size": "hidden_size",
    "intermediate_size": "retention_gate_intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_kv_heads": "num_key_value_heads",
    "hidden_act": "hidden_act",
    "tied": "tie_retention_gate_layers",
    "shared_budget": "global_capacity",
    "bias_init": "retention_gate_bias_init",
    "base_model": "base_model",
    "base_revision": "base_revision",
    "budget": "memory_size",
    "buffer": "buffer_size",
    "sinks": "sinks",
    "recent": "recent",
    "lookahead": "lookahead",
    "context": "training_context",
    "data": "training_data",
    "steps": "training_steps",
}
_REQUIRED = ("kind", "hidden_size", "intermediate_size", "num_layers", "num_kv_heads", "hidden_act")
_COUNTS = {
    "hidden_size": "the width of the base model",
    "intermediate_size": "the width of the gate's hidden layer",
    "num_layers": "the layers of the base model",
    "num_kv_heads": "the KV heads of one layer",
    "budget": "KV slots kept per head, not a fraction of the prompt",
    "buffer": "KV slots per head above the budget",
    "lookahead": "future steps that a score sums over",
    "context": "tokens of the longest training text",
    "steps": "optimizer steps",
}
_OPTIONAL_COUNTS = ("budget", "buffer", "lookahead", "context", "steps")
_PROTECTED = ("sinks", "recent")
_COUNT_END = 1 << 31  # positions and counts are int32
_LARGEST_BIAS = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class GateConfig:
    """Everything that defines the gates of one base model.

    Args:
        kind: Architecture, ``"rg"`` or ``"rg10"``.
        hidden_size: Width of the base model's hidden states.
        intermediate_size: Width of the gate's hidden layer(s).
        num_layers: Layers of the base model; there is one gate per layer.
        num_kv_heads: KV heads of one layer; a gate has one output per KV head.
        hidden_act: Activation of the gate, named as in transformers.
        tied: Whether all layers share ``linear3`` and ``bias``; ``"rg10"`` only.
        shared_budget: Whether all heads share the sum of all budgets by default (DBTrimKV), rather
            than have a budget each.
        bias_init: Initial value of ``bias``; large values start from "keep everything".
        base_model: Hub id or folder of the base model, as the checkpoint names it.
        base_revision: Revision of ``base_model`` on the hub.
        budget: KV slots per head that the gates were trained for, or their mean if the budget is
            shared; ``None`` if unknown.
        buffer: KV slots per head above the budget; ``None`` if unknown.
        sinks: First positions that were protected in training, and are by default with these
            gates; ``None`` is 0.
        recent: Last positions, likewise. Ages count from the end of this protection.
        lookahead: Future steps that the scores of these gates sum over by default; ``None`` is 1.
        context: Tokens of the longest text that the gates were trained on; ``None`` if unknown.
        data: Name of the training data; ``None`` if unknown.
        steps: Optimizer steps of the training; ``None`` if unknown.

    Raises:
        ValueError: a value is out of range. The message has its name here and in a config file.
    """

    kind: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_kv_heads: int
    hidden_act: str = "silu"
    tied: bool = False
    shared_budget: bool = False
    bias_init: float = 10.0
    base_model: str | None = None
    base_revision: str | None = None
    budget: int | None = None
    buffer: int | None = None
    sinks: int | None = None
    recent: int | None = None
    lookahead: int | None = None
    context: int | None = None
    data: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        self._require_choice("kind", GATE_KINDS)
        self._require_choice("hidden_act", tuple(_ACTIVATIONS))
        for name in _COUNTS:
            self._require_count(name)
        for name in _PROTECTED:
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _COUNT_END
            ):
                self._fail(name, "an integer >= 0 or None, below 2**31")
        self._require_tying()
        if not _is_number(self.bias_init) or not abs(self.bias_init) <= _LARGEST_BIAS:
            self._fail("bias_init", "a finite number")
        for name in ("base_model", "base_revision", "data"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                self._fail(name, "a non-empty string or None")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateConfig:
        """Build a config from the contents of a config file, ours or a published one.

        Args:
            data: The parsed file. Keys that do not concern the gates are ignored. Counts may be
                whole floats, as in published files (``"memory_size": 512.0``).

        Raises:
            ValueError: a required key is missing or a value is out of range.
        """
        missing = [_FILE_KEYS[name] for name in _REQUIRED if _FILE_KEYS[name] not in data]
        if missing:
            needed = ", ".join(repr(_FILE_KEYS[name]) for name in _REQUIRED)
            raise ValueError(
                f"the gate config lacks {', '.join(map(repr, missing))}; it must have {needed}"
            )
        values = {name: data[key] for name, key in _FILE_KEYS.items() if key in data}
        for name in (*_COUNTS, *_PROTECTED):
            value = values.get(name)
            if isinstance(value, float) and value.is_integer():
                values[name] = int(value)
        # Published configs carry the tying flag (default true) for every kind; only rg10 obeys it.
        values["tied"] = values.get("tied", True) if values["kind"] == "rg10" else False
        # Our older files lack this key. At that time, ties were for shared budgets only.
        values.setdefault("shared_budget", values["tied"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a config file; ``from_dict`` reads them back unchanged."""
        return {_FILE_KEYS[field.name]: getattr(self, field.name) for field in fields(self)}

    def _require_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._fail(name, f"one of {', '.join(map(repr, choices))}")

    def _require_count(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL_COUNTS:
            return
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not 1 <= value < _COUNT_END:
            self._fail(name, f"an integer >= 1 and below 2**31 ({_COUNTS[name]})")

    def _require_tying(self) -> None:
        for name in ("tied", "shared_budget"):
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "true or false")
        if self.tied and self.kind != "rg10":
            self._fail("tied", f"false for kind {self.kind!r} (only 'rg10' has tensors to tie)")

    def _fail(self, name: str, expected: str) -> None:
        key, value = _FILE_KEYS[name], getattr(self, name)
        alias = "" if key == name else f" ({key!r} in a config file)"
        raise ValueError(f"{name}{alias} must be {expected}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class RetentionGate(nn.Module):
    """The gate of one layer; a subclass is one architecture.

    Args:
        config: The shapes and the activation.
    """

    bias: nn.Parameter
    per_head: ClassVar[tuple[str, ...]]  # parameters with a row for each KV head

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[config.hidden_act]
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.bias = nn.Parameter(torch.empty(config.num_kv_heads))

    def features(self, hidden_states: Tensor) -> Tensor:
        """Return ``[batch, seq, num_kv_heads]``: the logits before ``bias``, gate's dtype."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Score tokens.

        The MLP runs in the gate's own dtype. ``bias`` is added in float32: next to a bias of 18,
        bfloat16 can tell logits apart only in steps of 1/8.

        Args:
            hidden_states: ``[batch, seq, hidden_size]``, any float dtype.

        Returns:
            ``log_beta`` ``[batch, num_kv_heads, seq]`` float32, natural log, ``<= 0``.

        Raises:
            ValueError: ``hidden_states`` has another shape.
        """
        logits = self.logits(hidden_states)
        return F.logsigmoid(logits.float() + self.bias.float()).transpose(1, 2)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """``[batch, seq, num_kv_heads]``: as :meth:`forward`, without its last steps.

        Raises:
            ValueError: ``hidden_states`` has another shape.
        """
        hidden_size = self.linear1.in_features
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != hidden_size:
            raise ValueError(
                f"hidden_states must have shape [batch, seq, {hidden_size}], "
                f"got {list(hidden_states.shape)}"
            )
        return self.features(hidden_states.to(self.linear1.weight.dtype))

    def reset_parameters(self, bias_init: float) -> None:
        """Draw the weights from N(0, 0.02), zero the linear biases, fill ``bias``."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_WEIGHT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.bias, bias_init)


class RG(RetentionGate):
    """Kind ``"rg"``: one hidden layer."""

    per_head = ("linear2.weight", "bias")

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.linear2 = nn.Linear(config.intermediate_size, config.num_kv_heads, bias=False)

    def features(self, hidden_states: Tensor) -> Tensor:
        return self.linear2(self.act(self.linear1(hidden_states)))


class RG10(RetentionGate):
    """Kind ``"rg10"``: two hidden layers; ``linear3`` and ``bias`` can be shared by all layers."""

    per_head = ("linear3.weight", "bias")

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.linear2 = nn.Linear(config.intermediate_size, config.intermediate_size)
        self.linear3 = nn.Linear(config.intermediate_size, config.num_kv_heads, bias=False)

    def features(self, hidden_states: Tensor) -> Tensor:
        return self.linear3(self.act(self.linear2(self.act(self.linear1(hidden_states)))))


_GATES: dict[str, type[RetentionGate]] = {"rg": RG, "rg10": RG10}
GATE_KINDS = tuple(_GATES)


class RetentionGates(nn.Module):
    """The gates of all layers of a base model, freshly initialised.

    Args:
        config: What to build.

    Raises:
        TypeError: ``config`` is not a ``GateConfig``.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        if not isinstance(config, GateConfig):
            raise TypeError(f"config must be a GateConfig, got {type(config).__name__}")
        self.config = config
        gates = [_GATES[config.kind](config) for _ in range(config.num_layers)]
        for gate in gates:
            gate.reset_parameters(config.bias_init)
        self.layers = nn.ModuleList(gates)
        self.tie()

    def tie(self) -> None:
        """Make all layers share layer 0's ``linear3`` and ``bias``, if the config says so."""
        if self.config.tied:
            first = self.layers[0]
            for layer in self.layers[1:]:
                layer.linear3, layer.bias = first.linear3, first.bias

    def for_heads(self, start: int, stop: int) -> RetentionGates:
        """Gates of the KV heads ``start`` to ``stop``; they share all parameters not per head.

        Raises:
            ValueError: there are no such heads.
        """
        if not 0 <= start < stop <= self.config.num_kv_heads:
            raise ValueError(
                f"start and stop must name some of {self.config.num_kv_heads} KV heads, "
                f"got [{start}, {stop})"
            )
        with torch.device("meta"):
            part = RetentionGates(replace(self.config, num_kv_heads=stop - start))
        for gate, whole in zip(part.layers, self.layers, strict=True):
            state = whole.state_dict()
            for name in _GATES[self.config.kind].per_head:
                state[name] = state[name][start:stop].clone()
            gate.load_state_dict(state, assign=True)
        part.tie()
        return part

    def forward(self, layer: int, hidden_states: Tensor) -> Tensor:
        """Score the tokens of one layer.

        Args:
            layer: Index of the layer in the base model.
            hidden_states: ``[batch, seq, hidden_size]``, the input of the layer's attention.

        Returns:
            ``log_beta`` ``[batch, num_kv_heads, seq]`` float32, natural log, ``<= 0``.

        Raises:
            ValueError: ``layer`` is out of range or ``hidden_states`` has another shape.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer must be in [0, {len(self.layers)}), got {layer}")
        return self.layers[layer](hidden_states)


def check_base(config: GateConfig, *, num_layers: int, num_kv_heads: int, hidden_size: int) -> None:
    """Check that gates fit a base model.

    Args:
        config: The config of the gates.
        num_layers: Layers of the base model.
        num_kv_heads: KV heads of each of its layers.
        hidden_size: Width of its hidden states.

    Raises:
        ValueError: something differs; the message names every difference.
    """
    base = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "hidden_size": hidden_size}
    wrong = [
        f"{name} is {getattr(config, name)} in the gates and {value} in the base model"
        for name, value in base.items()
        if getattr(config, name) != value
    ]
    if wrong:
        trained_for = config.base_model or "an unnamed base model"
        raise ValueError(
            f"the retention gates do not fit the base model: {'; '.join(wrong)}. "
            f"They were trained for {trained_for}; use gates of this base model"
        )
