"""Contestants of eviction and of choosing what stays of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_kernels import kernels
from trimkv_kernels.kernels import Slots

from .contestants import compiled, contestant, op
from .measure import Run
from .slot_cases import EvictCase, FillCase, pick_slots


@contestant("evict", EvictCase, op("evict"))
def evict(case: EvictCase) -> Run:
    states, t = case.inputs.states, case.inputs.t
    held = case.budget if case.full else case.num_slots

    def launch(index: int) -> list[Tensor]:
        state = states[index]
        kernels.evict(state, t, buffer=case.buffer, impl=case.impl)
        return _first_layer(state, held)

    return Run(launch, reset=case.restore)


@contestant("trimkv_0.1.5_eager", EvictCase, when=lambda case: case.full)
def trimkv_evict(case: EvictCase) -> Run:
    """Layer by layer: score, top-k, sort to keep the order, gather four tensors."""
    states = case.inputs.states

    def launch(index: int) -> tuple[Tensor, ...]:
        state = states[index]
        layers: list[tuple[Tensor, ...]] = []
        for layer in range(case.heads.layers):
            position, log_beta = state.position[layer], state.slope[layer]
            score = log_beta * (case.inputs.t[:, None, None] - position)
            kept = score.topk(case.budget, dim=-1).indices.sort(dim=-1).values
            rows = (position, state.key[layer], state.value[layer])
            layers.append((*pick_slots(rows, kept), log_beta.gather(-1, kept)))
        return layers[0]

    return Run(launch, reset=case.restore)


def replace_lowest(
    key: Tensor, value: Tensor, position: Tensor, slope: Tensor, offset: Tensor, t: Tensor
) -> None:
    """Where one slot must go, put the last one in its place: score, argmin, scatter."""
    score = slope * (t[:, None, None] - position) + offset
    victim = score.argmin(dim=-1, keepdim=True)
    rows = victim[..., None].expand(*victim.shape, key.shape[-1])
    for tensor in (key, value):
        tensor.scatter_(-2, rows, tensor[..., -1:, :].clone())
    for tensor in (position, slope, offset):
        tensor.scatter_(-1, victim, tensor[..., -1:].clone())


def one_at_a_time(case: EvictCase) -> bool:
    return case.full and case.buffer == 1


@contestant("torch_eager", EvictCase, when=one_at_a_time)
def replace_by_layer(case: EvictCase) -> Run:
    states = case.inputs.states

    def launch(index: int) -> list[Tensor]:
        for layer in range(case.heads.layers):
            replace_lowest(*(tensor[layer] for tensor in _moved(states[index])), case.inputs.t)
        return _first_layer(states[index], case.budget)

    return Run(launch, reset=case.restore)


@contestant("torch_compiled", EvictCase, when=one_at_a_time)
def replace_at_once(case: EvictCase) -> Run:
    """All layers in one call, fused by the compiler."""
    states = case.inputs.states
    replace = compiled(replace_lowest, case)

    def launch(index: int) -> list[Tensor]:
        replace(*_moved(states[index]), case.inputs.t)
        return _first_layer(states[index], case.budget)

    return Run(launch, reset=case.restore)


def _moved(state: Slots) -> tuple[Tensor, ...]:
    return state.key, state.value, state.position, state.slope, state.offset


def _first_layer(state: Slots, held: int) -> list[Tensor]:
    return [
        state.position[0, ..., :held],
        state.key[0, ..., :held, :],
        state.value[0, ..., :held, :],
    ]


@contestant("fill_slots", FillCase, op("fill_slots"))
def fill_slots(case: FillCase) -> Run:
    new_key, new_value, new_slope, new_position, slots, t = case.inputs
    new_offset = torch.zeros_like(new_slope[0])

    def launch(layer: int) -> list[Tensor]:
        kernels.fill_slots(
            new_key[layer], new_value[layer], new_position, slots, t, layer=layer,
            buffer=case.buffer, new_slope=new_slope[layer], new_offset=new_offset,
            max_valid=0, impl=case.impl,
        )  # fmt: skip
        kept = slice(None, case.budget)
        return [
            slots.position[layer, ..., kept],
            slots.key[layer, ..., kept, :],
            slots.value[layer, ..., kept, :],
        ]

    return Run(launch, reset=lambda: slots.num_valid.zero_())


@contestant("trimkv_0.1.5_eager", FillCase)
def trimkv_fill(case: FillCase) -> Run:
    """Score, top-k, sort to keep the order, gather four tensors."""
    new_key, new_value, new_slope, new_position, _, t = case.inputs
    position = new_position[:, None].expand(new_slope.shape[1:])

    def launch(layer: int) -> list[Tensor]:
        log_beta = new_slope[layer]
        score = log_beta * (t[:, None, None] - position)
        kept = score.topk(case.budget, dim=-1).indices.sort(dim=-1).values
        rows = (position, new_key[layer], new_value[layer])
        return [*pick_slots(rows, kept), log_beta.gather(-1, kept)]

    return Run(launch)
