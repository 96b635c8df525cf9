"""Cases of the ops that work on slots: decode, evict, fill and extend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from trimkv_kernels.kernels import Slots
from trimkv_kernels.kernels.pages import PAGE, Pages

from .case import Case
from .outcome import RAGGED


def make_slots(case: Case, layers: int, num_slots: int, num_valid: int) -> Slots:
    """Slots with positions in random order and rates of all sizes."""
    slots = Slots.zeros(
        layers, case.batch, case.heads.num_kv_heads, num_slots, case.heads.head_dim,
        dtype=case.dtype, device=case.device,
    )  # fmt: skip
    shape = slots.position.shape
    slots.key.normal_()
    slots.value.normal_()
    slots.position.copy_(case.numbers(*shape).argsort(dim=-1))
    slots.slope.copy_(-case.numbers(*shape))
    slots.num_valid.fill_(num_valid)
    return slots


def pick_slots(slots: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, keys and values (the first three) of one layer at ``index`` of each head."""
    position, key, value = slots[:3]
    rows = index[..., None].expand(*index.shape, key.shape[-1])
    return position.gather(-1, index), key.gather(-2, rows), value.gather(-2, rows)


class StepInputs(NamedTuple):
    """One query token per sequence and layer."""

    query: Tensor  # [layers, batch, num_heads, head_dim]
    new_key: Tensor  # [layers, batch, num_kv_heads, head_dim]
    new_value: Tensor
    slots: Slots | Pages
    t: Tensor  # [batch] int32


@dataclass(kw_only=True)
class StepCase(Case):
    """One new token per sequence against ``slots`` slots of each head on average, itself included.

    ``inputs`` are :class:`StepInputs`.
    """

    slots: int

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


@dataclass(kw_only=True)
class DecodeCase(StepCase):
    """All heads have the same number of slots. The token to append is in the last one already."""

    op = "decode"
    axes = ("batch", "slots")
    against_flex: bool = False  # FlexAttention is compiled anew for each shape, which takes long

    @cached_property
    def inputs(self) -> StepInputs:
        layers, heads = self.launches, self.heads
        slots = make_slots(self, layers, self.slots, self.slots - 1)
        slots.position[..., -1] = self.slots - 1
        return StepInputs(
            query=self.randn(layers, self.batch, heads.num_heads, heads.head_dim),
            new_key=slots.key[..., -1, :].clone(),
            new_value=slots.value[..., -1, :].clone(),
            slots=slots,
            t=self.integers(self.slots, self.batch),
        )

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        key, value = self.inputs.slots.key[0].double(), self.inputs.slots.value[0].double()
        query = self.inputs.query[0].double().unflatten(1, (-1, self.heads.group))
        logits = query @ key.transpose(2, 3) * self.heads.head_dim**-0.5
        return ((logits.softmax(dim=-1) @ value).flatten(1, 2),)


@dataclass(kw_only=True)
class RaggedCase(StepCase):
    """Heads share a budget.

    Skewed, one head has all slots of its layer but for a page of each other head.
    """

    op = RAGGED
    axes = ("batch", "slots", "skewed")
    skewed: bool

    @property
    def lengths(self) -> list[int]:
        """Pairs of each head of a layer."""
        heads = self.heads.num_kv_heads
        if not self.skewed:
            return [self.slots] * heads
        return [self.slots * heads - PAGE * (heads - 1)] + [PAGE] * (heads - 1)

    @cached_property
    def inputs(self) -> StepInputs:
        layers, heads, batch = self.launches, self.heads, self.batch
        pages = Pages.zeros(
            layers, batch, heads.num_kv_heads, self.slots, PAGE, heads.head_dim,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip
        pages.key.normal_()
        pages.value.normal_()
        pages.page.copy_(self.numbers(*pages.page.shape).argsort(dim=-1))
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        pages.first_page.zero_()
        pages.first_page[..., 1:] = (-(-lengths // PAGE)).cumsum(0)
        pages.kept.copy_((lengths - 1).expand_as(pages.kept))
        t = self.integers(max(self.lengths), batch)
        pages.cut.copy_((t - 1).expand_as(pages.cut))
        new = (layers, batch, heads.num_kv_heads, heads.head_dim)
        query = self.randn(layers, batch, heads.num_heads, heads.head_dim)
        return StepInputs(query, self.randn(*new), self.randn(*new), pages, t)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        query, new_key, new_value, pages, _ = self.inputs
        group, output = self.heads.group, torch.zeros_like(query[0], dtype=torch.float64)
        for row in range(self.batch):
            for head, length in enumerate(self.lengths):
                index = torch.arange(length - 1, device=self.device)
                page = pages.page[0, row, pages.first_page[0, row, head] + index // PAGE]
                address = page.long() * PAGE + index % PAGE
                key, value = (
                    torch.cat((old[0, row, address], new[0, row, head, None])).double()
                    for old, new in ((pages.key, new_key), (pages.value, new_value))
                )
                own = slice(head * group, (head + 1) * group)
                logits = query[0, row, own].double() @ key.T * self.heads.head_dim**-0.5
                output[row, own] = logits.softmax(dim=-1) @ value
        return (output,)


class EvictInputs(NamedTuple):
    """Several states of a whole model, and what each is set back to."""

    pristine: Slots
    states: list[Slots]
    t: Tensor  # [batch] int32


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
        age = self.inputs.t[:, None, None] - slots.position
        score = slots.slope * age + slots.offset
        return score.topk(self.budget, dim=-1).indices

    @cached_property
    def inputs(self) -> EvictInputs:
        valid = self.num_slots if self.full else self.num_slots - 1
        slots = make_slots(self, self.heads.layers, self.num_slots, valid)
        states = [slots.map(torch.clone) for _ in range(self.launches)]
        return EvictInputs(slots, states, self.integers(self.num_slots, self.batch))

    def restore(self) -> None:
        """Undo what launches did; the copies also leave nothing of use in the L2."""
        for state in self.inputs.states:
            for name, tensor in reversed(list(state.tensors().items())):
                tensor.copy_(self.inputs.pristine.tensors()[name])

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
