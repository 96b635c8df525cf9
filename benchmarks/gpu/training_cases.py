"""Cases of the ops that gates are trained through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .case import TOLERANCES, Case


class RetentionInputs(NamedTuple):
    """A training step's tensors, one set per launch."""

    query: list[Tensor]  # [batch, num_heads, seq, head_dim]
    key: list[Tensor]  # [batch, num_kv_heads, seq, head_dim]
    value: list[Tensor]
    log_beta: list[Tensor]  # [batch, num_kv_heads, seq] fp32
    grad: list[Tensor]  # like query


@dataclass(kw_only=True)
class RetentionCase(Case):
    """Retention-gated attention, forward, or forward and backward in one."""

    op = "retention_attention"
    axes = ("batch", "seq", "mode", "backward")
    seq: int
    mode: str = "add"
    backward: bool = False
    against_flex: bool = False

    @property
    def needs_grad(self) -> bool:
        return self.backward

    @property
    def launches(self) -> int:
        return 4 if self.device.type == "cuda" else 1

    @property
    def tolerance(self) -> float:
        # The gradient of log_beta weighs every rounding error by an age.
        return 4 * TOLERANCES[self.dtype] if self.backward else TOLERANCES[self.dtype]

    @property
    def bytes(self) -> int:
        rows = self.batch * self.seq
        large = 2 + 4 * self.backward  # query and output; in the backward pass both, two gradients
        small = 2 + 4 * self.backward  # key and value; in the backward pass both, two gradients
        heads = large * self.heads.num_heads + small * self.heads.num_kv_heads
        rates = (1 + 2 * self.backward) * rows * self.heads.num_kv_heads * 4
        return rows * heads * self.heads.head_dim * self.dtype.itemsize + rates

    @property
    def flops(self) -> int:
        pairs = self.batch * self.heads.num_heads * self.seq * (self.seq + 1) // 2
        return pairs * self.heads.head_dim * (14 if self.backward else 4)

    @cached_property
    def inputs(self) -> RetentionInputs:
        heads, launches = self.heads, range(self.launches)
        large = (self.batch, heads.num_heads, self.seq, heads.head_dim)
        small = (self.batch, heads.num_kv_heads, self.seq, heads.head_dim)
        inputs = RetentionInputs(
            query=[self.randn(*large) for _ in launches],
            key=[self.randn(*small) for _ in launches],
            value=[self.randn(*small) for _ in launches],
            log_beta=[make_log_beta(self, *small[:3]) for _ in launches],
            grad=[self.randn(*large) for _ in launches],
        )
        for tensors in inputs[:4]:
            for tensor in tensors:
                tensor.requires_grad_(self.backward)
        return inputs

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """Of the first sequence's first KV head and its group of queries."""
        query, key, value, log_beta = (
            tensor.detach().double().requires_grad_(self.backward)
            for tensor in self.comparable([x[0] for x in self.inputs[:4]], first=0)
        )
        step = torch.arange(self.seq, dtype=torch.float64, device=self.device)
        age = step[:, None] - step
        logits = query @ key.transpose(2, 3) * self.heads.head_dim**-0.5
        decay = age.clamp(min=0) * log_beta[:, :, None]
        logits = logits + decay if self.mode == "add" else logits * decay.exp()
        output = logits.masked_fill_(age < 0, -torch.inf).softmax(dim=-1) @ value
        if not self.backward:
            return (output,)
        grad = self.inputs.grad[0][:1, : self.heads.group].double()
        grads = torch.autograd.grad(output, (query, key, value, log_beta), grad)
        return (output.detach(), *grads)

    def comparable(self, outputs: Sequence[Tensor], first: int = 1) -> Sequence[Tensor]:
        """Cut query-like tensors (``first`` of them lead, then one more) to one KV head."""
        group = self.heads.group
        return [
            tensor[:1, : group if index <= first else 1].detach()
            for index, tensor in enumerate(outputs)
        ]


class SumInputs(NamedTuple):
    """One set per launch."""

    log_beta: list[Tensor]  # [1, rows, seq] fp32
    grad: list[Tensor]


@dataclass(kw_only=True)
class SumCase(Case):
    """The retention sum of ``rows`` heads, forward, or forward and backward in one."""

    op = "retention_sum"
    axes = ("rows", "seq", "backward")
    rows: int
    seq: int
    backward: bool = False
    against_all_pairs: bool = False

    @property
    def needs_grad(self) -> bool:
        return self.backward

    @property
    def launches(self) -> int:
        return 1  # exponentials take the time, wherever their inputs lie

    @property
    def bytes(self) -> int:
        return (5 if self.backward else 2) * self.rows * self.seq * 4

    @cached_property
    def inputs(self) -> SumInputs:
        shape, launches = (1, self.rows, self.seq), range(self.launches)
        log_beta = [make_log_beta(self, *shape) for _ in launches]
        for tensor in log_beta:
            tensor.requires_grad_(self.backward)
        return SumInputs(log_beta, [torch.rand(shape, device=self.device) for _ in launches])

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """Of the first row."""
        log_beta = self.inputs.log_beta[0][:, :1].detach().double()
        output, log_beta_grad = sum_all_pairs(log_beta, self.inputs.grad[0][:, :1].double())
        return (output, log_beta_grad) if self.backward else (output,)

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [output[:, :1].detach() for output in outputs]


def sum_all_pairs(log_beta: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The retention sum and its gradient with one exponential per pair, a chunk at a time."""
    rows, seq = log_beta.shape[0] * log_beta.shape[1], log_beta.shape[2]
    chunk = max(1, 2**28 // (rows * seq))
    step = torch.arange(seq, dtype=log_beta.dtype, device=log_beta.device)
    output, log_beta_grad = torch.empty_like(log_beta), torch.zeros_like(log_beta)
    for start in range(0, seq, chunk):
        stop = min(start + chunk, seq)
        age = step[start:stop, None] - step[:stop]
        weight = (age.clamp(min=0) * log_beta[:, :, None, :stop]).exp_().masked_fill_(age < 0, 0)
        output[:, :, start:stop] = weight.sum(dim=-1)
        moved = weight.mul_(age).mul_(grad[:, :, start:stop, None])
        log_beta_grad[:, :, :stop] += moved.sum(dim=2)
    return output, log_beta_grad


def make_log_beta(case: Case, *shape: int) -> Tensor:
    """Half-lives of one token to a hundred thousand."""
    return -(10 ** (-5 * case.numbers(*shape)))
