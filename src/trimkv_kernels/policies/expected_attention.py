"""Expected attention: the attention that a slot will get from queries like the earlier ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimkv_kernels.policies._options import check_integer
from trimkv_kernels.policies.base import ModelShape, Needs, RetentionPolicy, SlotView
from trimkv_kernels.policies.registry import register_policy


@register_policy("expected_attention")
@dataclass(frozen=True, eq=False)
class ExpectedAttention(RetentionPolicy):
    """Keep what Gaussian future queries would attend to (NVIDIA kvpress, arXiv 2510.00636).

    The policy uses the running mean and covariance of all queries before RoPE, except the sinks'.
    With ``R``, the mean RoPE rotation over the next ``n_future`` positions, they become ``mean' = R
    mean`` and ``covariance' = R covariance R^T``. Then, with ``D = head_dim``::

        logit = mean' . key / sqrt(D) + key^T covariance' key / (2 D)
        score = (mean over the group of softmax(logit) + eps) * ||value||_2

    The softmax, in fp32, runs over the slots that are not sinks. A sink gets what it would take
    beside them, at most 1.

    Args:
        n_future: Future positions to average over.
        use_covariance: Whether to use the covariance.
        use_value_norm: Whether to multiply by the value's norm.
        eps: Added to the attention.
        inv_freq: ``[head_dim / 2]``, RoPE's angle per position of the channels ``(i, i +
            head_dim / 2)``. Only needed without a model; a model's takes precedence.
        rope_scaling: Factor that RoPE's cosines and sines carry; goes with ``inv_freq``.

    Raises:
        TypeError: ``n_future`` is not an integer.
        ValueError: ``n_future`` is below 1, or ``eps`` is negative.
    """

    n_future: int = 512
    use_covariance: bool = True
    use_value_norm: bool = True
    eps: float = 0.0
    inv_freq: Tensor | None = field(default=None, repr=False)
    rope_scaling: float = 1.0

    needs = Needs(score=("key", "value"), query_moments=True)

    def __post_init__(self) -> None:
        check_integer("n_future", self.n_future, minimum=1)
        if self.eps < 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")

    @classmethod
    def example(cls, shape: ModelShape) -> ExpectedAttention:
        channel = torch.arange(0, shape.head_dim, 2)
        return cls(n_future=32, inv_freq=10000.0 ** (-channel / shape.head_dim))

    def bind(self, shape: ModelShape) -> ExpectedAttention:
        if shape.position_axes > 1:
            raise ValueError(
                "policy 'expected_attention' rotates queries by one position per token, and this "
                f"model takes {shape.position_axes} (m-RoPE): choose another policy"
            )
        known = shape.inv_freq is not None
        inv_freq = shape.inv_freq if known else self.inv_freq
        if inv_freq is None:
            raise ValueError(
                "policy 'expected_attention' needs RoPE's frequencies, and no model gives them: "
                "pass ExpectedAttention(inv_freq=...)"
            )
        if inv_freq.shape != (shape.head_dim // 2,):
            raise ValueError(
                f"inv_freq must have shape [{shape.head_dim // 2}], half of head_dim, "
                f"got {list(inv_freq.shape)}"
            )
        return replace(
            self,
            inv_freq=inv_freq.to(device=shape.device, dtype=torch.float32),
            rope_scaling=shape.rope_scaling if known else self.rope_scaling,
        )

    def score(self, slots: SlotView) -> Tensor:
        logits = self._logits(slots)
        counted = slots.valid & (slots.position >= self.sinks)
        total = logits.masked_fill(~counted[..., None], -math.inf).logsumexp(dim=2, keepdim=True)
        attention = (logits - total).clamp(max=0).exp().mean(dim=-1)
        if not self.use_value_norm:
            return attention + self.eps
        return (attention + self.eps) * slots.value.float().norm(dim=-1)

    def _logits(self, slots: SlotView) -> Tensor:
        """Of each query head of the group, ``[batch, num_kv_heads, num_slots, group]``."""
        key = slots.key.float()
        _, num_kv_heads, _, head_dim = key.shape
        cos, sin = self._mean_rotation(slots.t)
        mean = _rotate(slots.query_mean, cos, sin).unflatten(1, (num_kv_heads, -1))
        logits = key @ mean.mT / math.sqrt(head_dim)
        if not self.use_covariance:
            return logits
        cos, sin = cos[:, None], sin[:, None]
        covariance = _rotate(_rotate(slots.query_covariance, cos, sin).mT, cos, sin)
        # one query head at a time: a prompt's keys are large
        heads = covariance.unflatten(1, (num_kv_heads, -1)).unbind(dim=2)
        quadratic = torch.stack([((key @ head) * key).sum(dim=-1) for head in heads], dim=-1)
        return logits + quadratic / (2 * head_dim)

    def _mean_rotation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cosines and sines, ``[batch, 1, head_dim]``, over positions ``t, t + 1, ...``."""
        if self.inv_freq is None:
            raise ValueError("policy 'expected_attention' is not bound: call bind(shape) first")
        position = t[:, None] + torch.arange(self.n_future, device=t.device)
        angle = position[..., None].float() * self.inv_freq.to(t.device)
        cos = angle.cos().mean(dim=1, keepdim=True) * self.rope_scaling
        sin = angle.sin().mean(dim=1, keepdim=True) * self.rope_scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
