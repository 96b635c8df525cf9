"""Who takes part: our ops, and everything else on the machine that computes the same.

A contestant is one function that builds a `Run` for a case. What cannot take part is recorded as
absent with a reason, what fails with its error; neither stops the run.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimkv_kernels import kernels

from .cases import (
    Case,
    DecodeCase,
    EvictCase,
    ExtendCase,
    FillCase,
    RetentionCase,
    Slots,
    SumCase,
    pick_slots,
    sum_all_pairs,
)
from .measure import Run

Build = Callable[[Any], Run]
Missing = Callable[[Case], str | None]

FLASH, CUDNN, EFFICIENT = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
# FlexDecoding picks two warps and no pipeline on its own.
TUNED_FLEX_DECODING = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        name: As it stands in the results.
        case: The kind of case it computes.
        build: Prepares a run; not timed.
        when: Whether it is a sensible rival in a case at all.
        missing: Why it cannot run here, None if it can.
    """

    name: str
    case: type[Case]
    build: Build
    when: Callable[[Any], bool]
    missing: Missing


CONTESTANTS: list[Contestant] = []


def contestant(
    name: str,
    case: type[Case],
    *needs: Missing,
    when: Callable[[Any], bool] = lambda case: True,
) -> Callable[[Build], Build]:
    """Register a builder; ``needs`` tell what is missing here."""

    def missing(case: Case) -> str | None:
        return next(filter(None, (need(case) for need in needs)), None)

    def register(build: Build) -> Build:
        CONTESTANTS.append(Contestant(name, case, build, when, missing))
        return build

    return register


def contestants_of(case: Case) -> list[Contestant]:
    """Everybody who computes a case, ours first."""
    return [x for x in CONTESTANTS if type(case) is x.case and x.when(case)]


def a_gpu(case: Case) -> str | None:
    """A need: compiled for GPUs only."""
    return None if case.device.type == "cuda" else "needs a GPU"


def module(name: str) -> Missing:
    """A need: a package that imports, with everything it imports."""

    def missing(case: Case) -> str | None:
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"{name} does not import: {type(error).__name__}"
        return None

    return missing


def op(name: str) -> Missing:
    """A need: one of our ops, which this revision may not have."""

    def missing(case: Case) -> str | None:
        found = callable(getattr(kernels, name, None))
        return None if found else f"this revision has no {name}"

    return missing


def compiled(function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """``torch.compile`` for static shapes, which never falls back; on a CPU the function itself."""
    if case.device.type != "cuda":
        return function
    torch.compiler.reset()  # else the shapes of earlier cases count against the recompile limit
    return torch.compile(function, dynamic=False, fullgraph=True)


def backend(case: Case, *backends: SDPBackend) -> contextlib.AbstractContextManager[None]:
    """Force SDPA's backend; a CPU has its own."""
    return sdpa_kernel(list(backends)) if case.device.type == "cuda" else contextlib.nullcontext()


@contestant("append_attention", DecodeCase, op("append_attention"))
def append_attention(case: DecodeCase, mass: Tensor | None = None) -> Run:
    query, new_key, new_value, slots = case.inputs
    slope, offset = (torch.zeros(new_key.shape[1:3], device=case.device) for _ in range(2))

    def launch(layer: int) -> list[Tensor]:
        output = kernels.append_attention(
            query[layer], new_key[layer], new_value[layer], slots.key, slots.value,
            slots.position, slots.num_valid, slots.t, layer=layer, slope=slots.slope,
            offset=slots.offset, new_slope=slope, new_offset=offset, mass=mass,
            mass_accumulate=mass is not None, impl=case.impl,
        )  # fmt: skip
        return [output]

    return Run(launch, reset=lambda: slots.num_valid.fill_(case.slots - 1))


@contestant("append_attention_mass", DecodeCase, op("append_attention"))
def append_attention_mass(case: DecodeCase) -> Run:
    """The same, adding up the probability that each slot receives."""
    return append_attention(case, torch.zeros_like(case.inputs[3].slope))


@contestant("decode_attention", DecodeCase, op("decode_attention"))
def decode_attention(case: DecodeCase) -> Run:
    query, _, _, slots = case.inputs
    count = torch.full_like(slots.num_valid, case.slots)

    def launch(layer: int) -> list[Tensor]:
        key, value = slots.key[layer], slots.value[layer]
        return [
            kernels.decode_attention(query[layer], key, value, count[layer], impl=case.impl),
        ]

    return Run(launch)


@contestant("trimkv_0.1.5_eager", DecodeCase)
def trimkv_decode(case: DecodeCase) -> Run:
    """Concatenate keys, values, rates and positions, then attend to all of it."""
    query, new_key, new_value, slots = case.inputs

    def launch(layer: int) -> list[Tensor]:
        appended = []
        for tensor in (slots.slope, slots.position):
            appended.append(torch.cat((tensor[layer, ..., :-1], tensor[layer, ..., -1:]), dim=-1))
        key = torch.cat((slots.key[layer, ..., :-1, :], new_key[layer, :, :, None]), dim=-2)
        value = torch.cat((slots.value[layer, ..., :-1, :], new_value[layer, :, :, None]), dim=-2)
        with backend(case, FLASH):
            output = F.scaled_dot_product_attention(
                query[layer, :, :, None], key, value, enable_gqa=True
            )
        return [output[:, :, 0], *appended]

    return Run(launch)


def sdpa_decode(kind: SDPBackend) -> Build:
    """SDPA as a model calls it: one query row per head."""

    def build(case: DecodeCase) -> Run:
        query, _, _, slots = case.inputs

        def launch(layer: int) -> list[Tensor]:
            with backend(case, kind):
                output = F.scaled_dot_product_attention(
                    query[layer, :, :, None], slots.key[layer], slots.value[layer], enable_gqa=True
                )
            return [output[:, :, 0]]

        return Run(launch)

    return build


def sdpa_decode_packed(kind: SDPBackend) -> Build:
    """SDPA at its best: the group's queries are the rows of one head, so keys are read once."""

    def build(case: DecodeCase) -> Run:
        query, _, _, slots = case.inputs
        query = query.unflatten(2, (-1, case.heads.group))

        def launch(layer: int) -> list[Tensor]:
            with backend(case, kind):
                output = F.scaled_dot_product_attention(
                    query[layer], slots.key[layer], slots.value[layer]
                )
            return [output.flatten(1, 2)]

        return Run(launch)

    return build


# The efficient backend has no grouped queries: repeating keys for it would only be slower.
contestant("sdpa_flash", DecodeCase)(sdpa_decode(FLASH))
contestant("sdpa_cudnn", DecodeCase)(sdpa_decode(CUDNN))
contestant("sdpa_flash_packed", DecodeCase)(sdpa_decode_packed(FLASH))
contestant("sdpa_cudnn_packed", DecodeCase)(sdpa_decode_packed(CUDNN))
contestant("sdpa_efficient_packed", DecodeCase)(sdpa_decode_packed(EFFICIENT))


def flex_decode(options: dict[str, int] | None) -> Build:
    def build(case: DecodeCase) -> Run:
        query, _, _, slots = case.inputs
        attend = compiled(flex_attention, case)

        def launch(layer: int) -> list[Tensor]:
            output = attend(
                query[layer, :, :, None], slots.key[layer], slots.value[layer],
                enable_gqa=True, kernel_options=options,
            )  # fmt: skip
            return [output[:, :, 0]]

        return Run(launch)

    return build


def against_flex(case: Any) -> bool:
    return bool(case.against_flex)


contestant("flex", DecodeCase, when=against_flex)(flex_decode(None))
contestant("flex_tuned", DecodeCase, when=against_flex)(flex_decode(TUNED_FLEX_DECODING))

SGLANG = "sglang.srt.layers.attention.triton_ops.decode_attention"


@contestant("sglang_triton", DecodeCase, a_gpu, module(SGLANG))
def sglang_triton(case: DecodeCase) -> Run:
    """SGLang's Triton backend: tokens in one pool, found through an index, two kernels."""
    attend = importlib.import_module(SGLANG).decode_attention_fwd
    query, _, _, slots = case.inputs
    heads, batch, device, most = case.heads, case.batch, case.device, 16
    key, value = (_token_major(tensor) for tensor in (slots.key, slots.value))
    first = torch.arange(batch + 1, dtype=torch.int32, device=device) * case.slots
    index = torch.arange(batch * case.slots, dtype=torch.int64, device=device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = min(max(2 * multiprocessors // (batch * heads.num_kv_heads), 1), most)
    num_splits = case.integers(splits, batch)
    shape = (batch, heads.num_heads, most)
    part = torch.empty(*shape, heads.head_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(shape, dtype=torch.float32, device=device)

    def launch(layer: int) -> list[Tensor]:
        output = torch.empty_like(query[layer])
        attend(
            query[layer], key[layer], value[layer], output, first, index, part, part_lse,
            num_splits, most, heads.head_dim**-0.5, 1.0, 1.0,
        )  # fmt: skip
        return [output]

    return Run(launch)


@contestant("flashinfer", DecodeCase, a_gpu, module("flashinfer"))
def flashinfer(case: DecodeCase) -> Run:
    """FlashInfer's paged decode on tensor cores, pages of 16 tokens, planned once."""
    wrapper_type = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    query, _, _, slots = case.inputs
    heads, batch, page = case.heads, case.batch, 16
    key, value = (
        _token_major(tensor).unflatten(1, (-1, page)) for tensor in (slots.key, slots.value)
    )
    pages = case.slots // page
    first = torch.arange(batch + 1, dtype=torch.int32, device=case.device) * pages
    index = torch.arange(batch * pages, dtype=torch.int32, device=case.device)
    last = case.integers(page, batch)
    workspace = torch.empty(2**28, dtype=torch.uint8, device=case.device)
    wrapper = wrapper_type(
        workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=first.clone(), paged_kv_indices_buffer=index.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        first, index, last, heads.num_heads, heads.num_kv_heads, heads.head_dim, page,
        q_data_type=case.dtype, kv_data_type=case.dtype,
    )  # fmt: skip
    return Run(lambda layer: [wrapper.run(query[layer], (key[layer], value[layer]))])


def _token_major(tensor: Tensor) -> Tensor:
    """``[layers, batch * slots, num_kv_heads, head_dim]``: how paged caches lie in memory."""
    return tensor.transpose(2, 3).flatten(1, 2)


@contestant("evict", EvictCase, op("evict"))
def evict(case: EvictCase) -> Run:
    states = case.inputs.states
    held = case.budget if case.full else case.num_slots

    def launch(index: int) -> list[Tensor]:
        state = states[index]
        kernels.evict(
            state.key, state.value, state.position, state.num_valid, state.t,
            budget=case.budget, slope=state.slope, offset=state.offset, impl=case.impl,
        )  # fmt: skip
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
            score = log_beta * (state.t[:, None, None] - position)
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
        *tensors, _, t = states[index]
        for layer in range(case.heads.layers):
            replace_lowest(*(tensor[layer] for tensor in tensors), t)
        return _first_layer(states[index], case.budget)

    return Run(launch, reset=case.restore)


@contestant("torch_compiled", EvictCase, when=one_at_a_time)
def replace_at_once(case: EvictCase) -> Run:
    """All layers in one call, fused by the compiler."""
    states = case.inputs.states
    replace = compiled(replace_lowest, case)

    def launch(index: int) -> list[Tensor]:
        *tensors, _, t = states[index]
        replace(*tensors, t)
        return _first_layer(states[index], case.budget)

    return Run(launch, reset=case.restore)


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
            new_key[layer], new_value[layer], new_position, slots.key, slots.value,
            slots.position, slots.num_valid, t, layer=layer, budget=case.budget,
            slope=slots.slope, offset=slots.offset, new_slope=new_slope[layer],
            new_offset=new_offset, filled=0, impl=case.impl,
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


@contestant("extend_attention", ExtendCase, op("extend_attention"))
def extend_attention(case: ExtendCase) -> Run:
    query, key, value, num_valid = case.inputs
    filled, new = slice(None, case.slots), slice(case.slots, None)

    def launch(index: int) -> list[Tensor]:
        output = kernels.extend_attention(
            query[index], key[index][:, :, new], value[index][:, :, new],
            key[index][:, :, filled], value[index][:, :, filled], num_valid, impl=case.impl,
        )  # fmt: skip
        return [output]

    return Run(launch)


@contestant("sdpa_flash_lower_right", ExtendCase)
def sdpa_lower_right(case: ExtendCase) -> Run:
    """Flash attention, possible because every slot is valid and lies before the new tokens."""
    query, key, value, _ = case.inputs
    mask = causal_lower_right(case.tokens, case.slots + case.tokens)

    def launch(index: int) -> list[Tensor]:
        output = F.scaled_dot_product_attention(
            query[index], key[index], value[index], attn_mask=mask, enable_gqa=True
        )
        return [output]

    return Run(launch)


def sdpa_masked(kind: SDPBackend) -> Build:
    """SDPA with a mask, the only way once heads hold different numbers of slots.

    The group's queries are the rows of one head, so nothing is repeated but the mask.
    """

    def build(case: ExtendCase) -> Run:
        query, key, value, _ = case.inputs
        group = case.heads.group
        query = query.unflatten(2, (-1, group)).flatten(3, 4)
        mask = case.mask.repeat(group, 1)

        def launch(index: int) -> list[Tensor]:
            with backend(case, kind):
                output = F.scaled_dot_product_attention(
                    query[index], key[index], value[index], attn_mask=mask
                )
            return [output.unflatten(2, (group, -1)).flatten(1, 2)]

        return Run(launch)

    return build


contestant("sdpa_masked_cudnn", ExtendCase)(sdpa_masked(CUDNN))
contestant("sdpa_masked_efficient", ExtendCase)(sdpa_masked(EFFICIENT))


@contestant("flex", ExtendCase, when=against_flex)
def flex_extend(case: ExtendCase) -> Run:
    query, key, value, _ = case.inputs
    slots = case.slots

    def seen(batch: Tensor, head: Tensor, token: Tensor, source: Tensor) -> Tensor:
        return source <= token + slots

    length = slots + case.tokens
    mask = create_block_mask(seen, None, None, case.tokens, length, device=case.device.type)
    attend = compiled(flex_attention, case)

    def launch(index: int) -> list[Tensor]:
        return [attend(query[index], key[index], value[index], block_mask=mask, enable_gqa=True)]

    return Run(launch)


@contestant("retention_attention", RetentionCase, op("retention_attention"))
def retention_attention(case: RetentionCase) -> Run:
    inputs = case.inputs

    def attend(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> Tensor:
        return kernels.retention_attention(
            query, key, value, log_beta, mode=case.mode, impl=case.impl
        )

    return Run(lambda index: differentiate(case, attend, index, inputs[:4]))


def flex_retention(learned: bool) -> Build:
    """FlexAttention with the decay as a captured bias, as trimkv trains.

    Args:
        learned: Whether the gradient of log_beta is wanted too.
    """

    def build(case: RetentionCase) -> Run:
        group, inputs = case.heads.group, case.inputs

        def past(batch: Tensor, head: Tensor, target: Tensor, source: Tensor) -> Tensor:
            return source <= target

        mask = create_block_mask(past, None, None, case.seq, case.seq, device=case.device.type)

        def attend(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> Tensor:
            def fade(
                score: Tensor, batch: Tensor, head: Tensor, target: Tensor, source: Tensor
            ) -> Tensor:
                return score + log_beta[batch, head // group, source] * (target - source)

            return flex_attention(
                query, key, value, score_mod=fade, block_mask=mask, enable_gqa=True
            )

        run = compiled(attend, case)
        wanted = inputs[:4] if learned else (*inputs[:3], [x.detach() for x in inputs.log_beta])
        return Run(lambda index: differentiate(case, run, index, wanted))

    return build


def flex_can(case: Case) -> str | None:
    """A need: FlexAttention has no backward pass on a CPU."""
    return a_gpu(case) if case.needs_grad else None


def fades_additively(case: RetentionCase) -> bool:
    return case.against_flex and case.mode == "add"


contestant("flex", RetentionCase, flex_can, when=fades_additively)(flex_retention(learned=True))
contestant(
    "flex_frozen_bias",
    RetentionCase,
    flex_can,
    when=lambda case: fades_additively(case) and case.backward,
)(flex_retention(learned=False))


def differentiate(
    case: RetentionCase | SumCase,
    function: Callable[..., Tensor],
    index: int,
    inputs: tuple[list[Tensor], ...],
) -> list[Tensor]:
    """The output of one launch and, in a backward case, the gradients of all that wants one."""
    arguments = [tensors[index] for tensors in inputs]
    output = function(*arguments)
    if not case.backward:
        return [output]
    wanted = [tensor for tensor in arguments if tensor.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, case.inputs.grad[index])]


@contestant("retention_sum", SumCase, op("retention_sum"))
def retention_sum(case: SumCase) -> Run:
    def add(log_beta: Tensor) -> Tensor:
        return kernels.retention_sum(log_beta, impl=case.impl)

    return Run(lambda index: differentiate(case, add, index, (case.inputs.log_beta,)))


def against_all_pairs(case: SumCase) -> bool:
    return case.against_all_pairs


@contestant("torch_chunked", SumCase, when=against_all_pairs)
def torch_chunked(case: SumCase) -> Run:
    """One exponential per pair, in chunks that fit in memory."""
    log_beta, grad = case.inputs

    def launch(index: int) -> tuple[Tensor, Tensor]:
        return sum_all_pairs(log_beta[index].detach(), grad[index])

    return Run(launch)


def sum_by_row(log_beta: Tensor) -> Tensor:
    """The retention sum as a reduction over all pairs, for a compiler."""
    _, weight = _all_pairs(log_beta)
    return weight.sum(dim=-1)


def sum_by_row_grad(log_beta: Tensor, grad: Tensor) -> Tensor:
    """Its gradient, likewise."""
    age, weight = _all_pairs(log_beta)
    return (weight * age * grad[..., None]).sum(dim=-2)


def _all_pairs(log_beta: Tensor) -> tuple[Tensor, Tensor]:
    step = torch.arange(log_beta.shape[-1], dtype=log_beta.dtype, device=log_beta.device)
    age = step[:, None] - step
    return age, torch.where(age >= 0, (age.clamp(min=0) * log_beta[..., None, :]).exp(), 0.0)


@contestant("torch_compiled", SumCase, when=against_all_pairs)
def torch_compiled(case: SumCase) -> Run:
    """What a brute-force Triton kernel does: the compiler never writes the pairs to memory."""
    log_beta, grad = case.inputs
    add, add_grad = compiled(sum_by_row, case), compiled(sum_by_row_grad, case)

    def launch(index: int) -> list[Tensor]:
        rates = log_beta[index].detach()
        return [add(rates), add_grad(rates, grad[index])]

    return Run(launch)
