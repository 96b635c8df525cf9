"""What is measured: shapes, inputs, exact results, and the least that must be moved or computed.

A case has one set of buffers per launch, together larger than any cache, so that no launch finds
its inputs warm. Inputs are random, never zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

ROTATED_BYTES = 256 * 2**20  # at least; the L2 of a Hopper holds 60 MB
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class Heads(NamedTuple):
    """The part of a model that attention sees."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


QWEN3_4B = Heads(layers=36, num_heads=32, num_kv_heads=8, head_dim=128)
TOY = Heads(layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


@dataclass(kw_only=True)
class Case(ABC):
    """One shape of one op.

    Attributes:
        device: Where it runs; on a CPU everything but the clock does.
        heads: The model's.
        dtype: Of queries, keys and values.
        batch: Sequences.
    """

    op: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]  # attributes that tell the cases of an op apart

    device: torch.device
    heads: Heads
    dtype: torch.dtype
    batch: int = 1

    @property
    def impl(self) -> str:
        """The implementation of our ops that is measured."""
        return "triton" if self.device.type == "cuda" else "torch"

    @property
    def shape(self) -> dict[str, Any]:
        """What tells this case from others of the op."""
        return {axis: getattr(self, axis) for axis in self.axes}

    @property
    def needs_grad(self) -> bool:
        """Whether contestants differentiate."""
        return False

    @property
    def tolerance(self) -> float:
        """Largest ``|output - exact| / |exact|`` of a contestant that may be timed."""
        return TOLERANCES[self.dtype]

    @property
    @abstractmethod
    def launches(self) -> int:
        """Launches per graph, each with its own buffers."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes one launch must move: every input read once, every output written once."""

    @property
    def flops(self) -> int | None:
        """Operations of the matrix products of one launch, where they are what takes the time."""
        return None

    @cached_property
    @abstractmethod
    def inputs(self) -> Any:
        """The buffers of all launches, made when first asked for."""

    @cached_property
    @abstractmethod
    def exact(self) -> tuple[Tensor, ...]:
        """What launch 0 computes, or a part of it, in float64."""

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The part of a contestant's outputs that `exact` holds."""
        return outputs

    def errors(self, outputs: Sequence[Tensor]) -> tuple[float, float]:
        """Largest error of any element, and largest relative error of any output as a whole."""
        largest = relative = 0.0
        for output, exact in zip(self.comparable(outputs), self.exact, strict=False):
            error = output.double() - exact
            largest = max(largest, error.abs().max().item())
            ratio = (error.norm() / exact.norm().clamp(min=1e-30)).item()
            relative = max(relative, ratio if ratio == ratio else torch.inf)
        return largest, relative

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers in the case's dtype."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def numbers(self, *shape: int) -> Tensor:
        """Uniform fp32 numbers between 0 and 1."""
        return torch.rand(shape, device=self.device)

    def integers(self, number: int, *shape: int) -> Tensor:
        """One int32 number everywhere."""
        return torch.full(shape, number, dtype=torch.int32, device=self.device)

    def rotated(self, layer_bytes: int) -> int:
        """Launches that fill `ROTATED_BYTES`, at least the model's layers."""
        if self.device.type != "cuda":
            return self.heads.layers
        return max(self.heads.layers, -(-ROTATED_BYTES // layer_bytes))


class Slots(NamedTuple):
    """Bounded state of several layers, as the cache holds it."""

    key: Tensor  # [layers, batch, num_kv_heads, num_slots, head_dim]
    value: Tensor
    position: Tensor  # [layers, batch, num_kv_heads, num_slots] int32
    slope: Tensor  # like position, fp32
    offset: Tensor
    num_valid: Tensor  # [layers, batch, num_kv_heads] int32
    t: Tensor  # [batch] int32


def make_slots(case: Case, layers: int, num_slots: int, num_valid: int) -> Slots:
    """Slots with positions in random order and rates of all sizes."""
    shape = (layers, case.batch, case.heads.num_kv_heads, num_slots)
    return Slots(
        key=case.randn(*shape, case.heads.head_dim),
        value=case.randn(*shape, case.heads.head_dim),
        position=case.numbers(*shape).argsort(dim=-1).to(torch.int32),
        slope=-case.numbers(*shape),
        offset=torch.zeros(shape, device=case.device),
        num_valid=case.integers(num_valid, *shape[:3]),
        t=case.integers(num_slots, case.batch),
    )


class DecodeInputs(NamedTuple):
    """One query token per sequence and layer. The token to append is in the last slot already."""

    query: Tensor  # [layers, batch, num_heads, head_dim]
    new_key: Tensor  # [layers, batch, num_kv_heads, head_dim]
    new_value: Tensor
    slots: Slots


@dataclass(kw_only=True)
class DecodeCase(Case):
    """One new token per sequence against ``slots`` slots, itself included."""

    op = "decode"
    axes = ("batch", "slots")
    slots: int
    against_flex: bool = False  # FlexAttention is compiled anew for each shape, which takes long

    @property
    def _rows(self) -> int:
        return self.batch * self.heads.num_kv_heads * self.slots

    @property
    def launches(self) -> int:
        return self.rotated(2 * self._rows * self.heads.head_dim * self.dtype.itemsize)

    @property
    def bytes(self) -> int:
        rows = 2 * self._rows + 2 * self.batch * self.heads.num_heads
        return rows * self.heads.head_dim * self.dtype.itemsize

    @cached_property
    def inputs(self) -> DecodeInputs:
        layers, heads = self.launches, self.heads
        slots = make_slots(self, layers, self.slots, self.slots - 1)
        slots.position[..., -1] = self.slots - 1
        return DecodeInputs(
            query=self.randn(layers, self.batch, heads.num_heads, heads.head_dim),
            new_key=slots.key[..., -1, :].clone(),
            new_value=slots.value[..., -1, :].clone(),
            slots=slots,
        )

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        key, value = self.inputs.slots.key[0].double(), self.inputs.slots.value[0].double()
        query = self.inputs.query[0].double().unflatten(1, (-1, self.heads.group))
        logits = query @ key.transpose(2, 3) * self.heads.head_dim**-0.5
        return ((logits.softmax(dim=-1) @ value).flatten(1, 2),)


class EvictInputs(NamedTuple):
    """Several states of a whole model, and what each is set back to."""

    pristine: Slots
    states: list[Slots]


@dataclass(kw_only=True)
class EvictCase(Case):
    """All layers of a model shrink to ``budget`` slots; one launch is all of a step's eviction."""

    op = "evict"
    axes = ("batch", "budget", "buffer", "full")
    budget: int
    buffer: int
    full: bool = True  # otherwise no head has anything to evict, as at most steps

    @property
    def num_slots(self) -> int:
        return self.budget + self.buffer

    @property
    def launches(self) -> int:
        return 4 if self.device.type == "cuda" else 2

    @property
    def tolerance(self) -> float:
        return 0.0

    @property
    def _heads(self) -> int:
        return self.heads.layers * self.batch * self.heads.num_kv_heads

    @property
    def bytes(self) -> int:
        """Positions and rates of every slot, and the rows kept outside of the budget, moved."""
        if not self.full:
            return 4 * self._heads
        row = 2 * self.heads.head_dim * self.dtype.itemsize + 12
        moved = int((self._kept >= self.budget).sum())
        return 12 * self._heads * self.num_slots + 2 * row * moved

    @cached_property
    def _kept(self) -> Tensor:
        """The slots that stay, by score."""
        slots = self.inputs.pristine
        score = slots.slope * (slots.t[:, None, None] - slots.position) + slots.offset
        return score.topk(self.budget, dim=-1).indices

    @cached_property
    def inputs(self) -> EvictInputs:
        valid = self.num_slots if self.full else self.num_slots - 1
        slots = make_slots(self, self.heads.layers, self.num_slots, valid)
        states = [Slots(*(x.clone() for x in slots)) for _ in range(self.launches)]
        return EvictInputs(slots, states)

    def restore(self) -> None:
        """Undo what launches did; the copies also leave nothing of use in the L2."""
        for state in self.inputs.states:
            for tensor, before in zip(reversed(state), reversed(self.inputs.pristine), strict=True):
                tensor.copy_(before)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """Positions, keys and values of layer 0, ordered by position."""
        slots = self.inputs.pristine
        layer = slots.position[0], slots.key[0], slots.value[0]
        if self.full:
            layer = pick_slots(layer, self._kept[0])
        return tuple(tensor.double() for tensor in self.comparable(layer))

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return pick_slots(outputs, outputs[0].sort(dim=-1).indices)


def pick_slots(slots: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, keys and values (the first three) of one layer at ``index`` of each head."""
    position, key, value = slots[:3]
    rows = index[..., None].expand(*index.shape, key.shape[-1])
    return position.gather(-1, index), key.gather(-2, rows), value.gather(-2, rows)


class FillInputs(NamedTuple):
    """A prompt's keys and values in every layer, and the empty slots they are chosen into."""

    new_key: Tensor  # [layers, batch, num_kv_heads, tokens, head_dim]
    new_value: Tensor
    new_slope: Tensor  # [layers, batch, num_kv_heads, tokens] fp32
    new_position: Tensor  # [batch, tokens] int32
    slots: Slots
    t: Tensor  # [batch] int32


@dataclass(kw_only=True)
class FillCase(Case):
    """One layer keeps the best ``budget`` of a prompt's ``tokens`` tokens."""

    op = "fill_slots"
    axes = ("batch", "tokens", "budget", "buffer")
    tokens: int
    budget: int
    buffer: int

    @property
    def launches(self) -> int:
        return self.rotated(self.bytes)

    @property
    def tolerance(self) -> float:
        return 0.0

    @property
    def bytes(self) -> int:
        """A rate of every token, the kept rows read and written."""
        row = 2 * self.heads.head_dim * self.dtype.itemsize + 12
        return self.batch * self.heads.num_kv_heads * (4 * self.tokens + 2 * row * self.budget)

    @cached_property
    def inputs(self) -> FillInputs:
        shape = (self.launches, self.batch, self.heads.num_kv_heads, self.tokens)
        position = torch.arange(self.tokens, dtype=torch.int32, device=self.device)
        return FillInputs(
            new_key=self.randn(*shape, self.heads.head_dim),
            new_value=self.randn(*shape, self.heads.head_dim),
            new_slope=-self.numbers(*shape),
            new_position=position.expand(self.batch, -1).contiguous(),
            slots=make_slots(self, self.launches, self.budget + self.buffer, 0),
            t=self.integers(self.tokens, self.batch),
        )

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """Positions, keys and values of launch 0, ordered by position."""
        inputs = self.inputs
        position = inputs.new_position[:, None].expand(inputs.new_slope[0].shape)
        score = inputs.new_slope[0] * (self.tokens - position)
        kept = score.topk(self.budget, dim=-1).indices.sort(dim=-1).values
        picked = pick_slots((position, inputs.new_key[0], inputs.new_value[0]), kept)
        return tuple(tensor.double() for tensor in picked)

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return pick_slots(outputs, outputs[0].sort(dim=-1).indices)


class ExtendInputs(NamedTuple):
    """New tokens of every sequence and launch, behind the filled slots."""

    query: Tensor  # [launches, batch, num_heads, tokens, head_dim]
    key: Tensor  # [launches, batch, num_kv_heads, slots + tokens, head_dim]
    value: Tensor
    num_valid: Tensor  # [batch, num_kv_heads] int32


@dataclass(kw_only=True)
class ExtendCase(Case):
    """``tokens`` new tokens per sequence against ``slots`` filled slots and themselves."""

    op = "extend"
    axes = ("batch", "slots", "tokens")
    slots: int
    tokens: int
    against_flex: bool = False

    @property
    def launches(self) -> int:
        return self.rotated(self.bytes)

    @property
    def bytes(self) -> int:
        heads, length = self.heads, self.slots + self.tokens
        rows = 2 * heads.num_kv_heads * length + 2 * heads.num_heads * self.tokens
        return self.batch * rows * heads.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        pairs = self.tokens * self.slots + self.tokens * (self.tokens + 1) // 2
        return 4 * self.batch * self.heads.num_heads * pairs * self.heads.head_dim

    @cached_property
    def inputs(self) -> ExtendInputs:
        heads, length = self.heads, self.slots + self.tokens
        keys = (self.launches, self.batch, heads.num_kv_heads, length, heads.head_dim)
        queries = (self.launches, self.batch, heads.num_heads, self.tokens, heads.head_dim)
        num_valid = self.integers(self.slots, self.batch, heads.num_kv_heads)
        return ExtendInputs(self.randn(*queries), self.randn(*keys), self.randn(*keys), num_valid)

    @cached_property
    def mask(self) -> Tensor:
        """``[tokens, slots + tokens]`` bool: every slot, and the call's own past."""
        ones = torch.ones(self.tokens, self.slots + self.tokens, dtype=torch.bool)
        return ones.tril(self.slots).to(self.device)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """Of the first sequence."""
        group = self.heads.group
        query, key, value = (x[0, 0].double() for x in self.inputs[:3])
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        logits = query @ key.transpose(1, 2) * self.heads.head_dim**-0.5
        return (logits.masked_fill(~self.mask, -torch.inf).softmax(dim=-1) @ value,)

    def comparable(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [outputs[0][0]]


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


def decode_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """D1 to D8 of the goals."""
    if toy:
        yield DecodeCase(**_common(device), batch=2, slots=24, against_flex=True)
        return
    for slots in (1024, 4096, 512, 2048):
        for batch in (1, 4, 8, 16, 64):
            flex = slots in (1024, 4096) and batch in (1, 8, 64)
            common = _common(device, QWEN3_4B)
            yield DecodeCase(**common, batch=batch, slots=slots, against_flex=flex)


def evict_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """E1 to C2 of the goals, and the step at which nobody has anything to evict."""
    common, size = _common(device), (9, 1, 3)
    if not toy:
        common, size = _common(device, QWEN3_4B), (1024, 1, 128)
    budget, one, many = size
    yield EvictCase(**common, batch=2 if toy else 8, budget=budget, buffer=one)
    yield EvictCase(**common, batch=2 if toy else 4, budget=budget, buffer=many)
    yield EvictCase(**common, batch=2 if toy else 4, budget=budget, buffer=many, full=False)
    tokens = 20 if toy else 4096
    yield FillCase(**common, batch=2, tokens=tokens, budget=budget, buffer=many)


def extend_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """X1 and X2 of the goals, a long call on a long cache, a few draft tokens."""
    if toy:
        yield ExtendCase(**_common(device), batch=2, slots=9, tokens=7, against_flex=True)
        return
    common = _common(device, QWEN3_4B)
    yield ExtendCase(**common, batch=4, slots=1024, tokens=1024, against_flex=True)
    yield ExtendCase(**common, batch=1, slots=4096, tokens=512)
    yield ExtendCase(**common, batch=8, slots=1024, tokens=8)


def retention_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """T1 to T4 of the goals, and the shorter sequence of a quick look."""
    common = _common(device, TOY if toy else QWEN3_4B)
    long, short = (40, 16) if toy else (8192, 2048)
    for backward in (False, True):
        yield RetentionCase(**common, seq=long, backward=backward, against_flex=True)
        yield RetentionCase(**common, seq=long, backward=backward, mode="scale")
    if not toy:
        for backward in (False, True):
            yield RetentionCase(**common, batch=4, seq=short, backward=backward)


def sum_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """R1 and R2 of the goals."""
    common = _common(device, TOY if toy else QWEN3_4B) | {"dtype": torch.float32}
    many, few = ((6, 80), (2, 130)) if toy else ((288, 16384), (8, 131072))
    yield SumCase(**common, rows=many[0], seq=many[1], backward=True, against_all_pairs=True)
    for backward in (False, True):
        yield SumCase(**common, rows=few[0], seq=few[1], backward=backward)


CASES = {
    "decode": decode_cases,
    "evict": evict_cases,
    "extend": extend_cases,
    "retention": retention_cases,
    "sum": sum_cases,
}


def _common(device: torch.device, heads: Heads = TOY) -> dict[str, Any]:
    """A GPU's cases are in bf16; a CPU's in fp32, where a wrong formula cannot hide."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"device": device, "heads": heads, "dtype": dtype}
