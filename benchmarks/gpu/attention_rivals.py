"""Contestants of attention to slots: one token per sequence, and longer calls."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimkv_kernels import kernels

from .contestants import (
    CUDNN,
    EFFICIENT,
    FLASH,
    Build,
    a_gpu,
    against_flex,
    backend,
    compiled,
    contestant,
    module,
    op,
)
from .measure import Run
from .outcome import FINISH, RAGGED
from .slot_cases import DecodeCase, ExtendCase, RaggedCase

# FlexDecoding picks two warps and no pipeline on its own.
TUNED_FLEX_DECODING = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


@contestant("append_attention", DecodeCase, op("append_attention"))
def append_attention(case: DecodeCase, mass: Tensor | None = None) -> Run:
    query, new_key, new_value, slots, t = case.inputs
    slope, offset = (torch.zeros(new_key.shape[1:3], device=case.device) for _ in range(2))

    def launch(layer: int) -> list[Tensor]:
        output = kernels.append_attention(
            query[layer], new_key[layer], new_value[layer], slots, t, layer=layer,
            new_slope=slope, new_offset=offset, mass=mass, mass_accumulate=mass is not None,
            impl=case.impl,
        )  # fmt: skip
        return [output]

    return Run(launch, reset=lambda: slots.num_valid.fill_(case.slots - 1))


@contestant("append_attention_mass", DecodeCase, op("append_attention"))
def append_attention_mass(case: DecodeCase) -> Run:
    """The same, adding up the probability that each slot receives."""
    return append_attention(case, torch.zeros_like(case.inputs.slots.slope))


@contestant("decode_attention", DecodeCase, op("decode_attention"))
def decode_attention(case: DecodeCase) -> Run:
    query, slots = case.inputs.query, case.inputs.slots
    count = torch.full_like(slots.num_valid, case.slots)

    def launch(layer: int) -> list[Tensor]:
        key, value = slots.key[layer], slots.value[layer]
        return [
            kernels.decode_attention(query[layer], key, value, count[layer], impl=case.impl),
        ]

    return Run(launch)


@contestant(RAGGED, RaggedCase, op(RAGGED))
def ragged_append_attention(case: RaggedCase) -> Run:
    query, new_key, new_value, pages, t = case.inputs
    slope, offset = (torch.zeros(new_key.shape[1:3], device=case.device) for _ in range(2))

    def launch(layer: int) -> list[Tensor]:
        output = kernels.ragged_append_attention(
            query[layer], new_key[layer], new_value[layer], pages, t, layer=layer,
            new_slope=slope, new_offset=offset, impl=case.impl,
        )  # fmt: skip
        return [output]

    return Run(launch)


@contestant("append_attention_nothing", DecodeCase, op("append_attention"))
def append_nothing(case: DecodeCase) -> Run:
    """The same launch over the same slots with a token that is padding: nothing is stored."""
    query, new_key, new_value, slots, t = case.inputs
    slope, offset = (torch.zeros(new_key.shape[1:3], device=case.device) for _ in range(2))
    valid = torch.zeros(case.batch, dtype=torch.bool, device=case.device)

    def launch(layer: int) -> list[Tensor]:
        output = kernels.append_attention(
            query[layer], new_key[layer], new_value[layer], slots, t, layer=layer, valid=valid,
            new_slope=slope, new_offset=offset, impl=case.impl,
        )  # fmt: skip
        return [output]

    return Run(launch, reset=lambda: slots.num_valid.fill_(case.slots))


@contestant(FINISH, DecodeCase, op("Rope"))
def append_finish(case: DecodeCase) -> Run:
    """The same as ``append_attention``, with a norm, a rotation and a gate that change nothing."""
    query, new_key, new_value, slots, t = case.inputs
    ones = torch.ones(case.batch, case.heads.head_dim, dtype=case.dtype, device=case.device)
    # x * 1000 / sqrt(mean(x^2) + 1000^2) is x
    weight = torch.full_like(ones[0], 1000)
    rope = kernels.Rope(ones, torch.zeros_like(ones), weight, weight, eps=1e6)
    zeros = torch.zeros(new_key.shape[1:3], dtype=case.dtype, device=case.device)
    decay = kernels.Decay(zeros, zeros[0])

    def launch(layer: int) -> list[Tensor]:
        output = kernels.append_attention(
            query[layer], new_key[layer], new_value[layer], slots, t, layer=layer,
            rope=rope, decay=decay, impl=case.impl,
        )  # fmt: skip
        return [output]

    return Run(launch, reset=lambda: slots.num_valid.fill_(case.slots - 1))


@contestant("trimkv_0.1.5_eager", DecodeCase)
def trimkv_decode(case: DecodeCase) -> Run:
    """Concatenate keys, values, rates and positions, then attend to all of it."""
    query, new_key, new_value, slots, _ = case.inputs

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
        query, slots = case.inputs.query, case.inputs.slots

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
        query, slots = case.inputs.query, case.inputs.slots
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
        query, slots = case.inputs.query, case.inputs.slots
        attend = compiled(flex_attention, case)

        def launch(layer: int) -> list[Tensor]:
            output = attend(
                query[layer, :, :, None], slots.key[layer], slots.value[layer],
                enable_gqa=True, kernel_options=options,
            )  # fmt: skip
            return [output[:, :, 0]]

        return Run(launch)

    return build


contestant("flex", DecodeCase, when=against_flex, slow=True)(flex_decode(None))
contestant("flex_tuned", DecodeCase, when=against_flex, slow=True)(flex_decode(TUNED_FLEX_DECODING))

SGLANG = "sglang.srt.layers.attention.triton_ops.decode_attention"


@contestant("sglang_triton", DecodeCase, a_gpu, module(SGLANG))
def sglang_triton(case: DecodeCase) -> Run:
    """SGLang's Triton backend: tokens in one pool, found through an index, two kernels."""
    attend = importlib.import_module(SGLANG).decode_attention_fwd
    query, slots = case.inputs.query, case.inputs.slots
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
    query, slots = case.inputs.query, case.inputs.slots
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


@contestant("flex", ExtendCase, when=against_flex, slow=True)
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
