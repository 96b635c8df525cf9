"""Causal attention that fades with age: the attention through which retention gates are trained."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from trimkv_kernels.kernels import reference
from trimkv_kernels.kernels._dispatch import (
    FLOAT_DTYPES,
    check_int,
    check_rank,
    check_tensor,
    device_guard,
    is_interpreted,
    resolve_impl,
)
from trimkv_kernels.kernels._documents import document_spans
from trimkv_kernels.kernels.tuning import tuned

MODES = ("add", "scale")


@overload
def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    mode: str = "add",
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    mode: str = "add",
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    mode: str = "add",
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend causally, every source weighed down by its log beta per step of age.

    The logit of target ``t`` and source ``j <= t`` is ``scale * q_t.k_j + log_beta_j * (t - j)``
    (retention-gated attention, arXiv 2512.03324). Differentiable once in all four tensors; the
    gradients are deterministic.

    Args:
        query: ``[batch, num_heads, seq, head_dim]``, fp32, fp16 or bf16; head_dim at most 256.
        key: ``[batch, num_kv_heads, seq, head_dim]``, dtype of ``query``. ``num_heads`` is a
            multiple of ``num_kv_heads``.
        value: As ``key``.
        log_beta: ``[batch, num_kv_heads, seq]`` fp32, natural logarithms, at most 0; what is below
            -1e4 counts as -1e4.
        document: ``[batch, seq]`` int32, which document of a packed sequence a token belongs to:
            it attends to that one alone. A document is a run of equal ids, of whatever value; a
            negative one marks padding, which gives 0 and is seen by nothing, but has to be finite.
            ``None`` means one document.
        valid: ``[batch, seq]`` bool, False for padding; the same as a negative ``document``.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        mode: ``"add"``, or ``"scale"`` for the logit ``scale * q_t.k_j * beta_j ** (t - j)``, which
            is another function.
        return_lse: Also return the log-sum-exp of the logits, differentiable as well.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, num_heads, seq, head_dim]``, dtype of ``query``; with ``return_lse`` also
        ``[batch, num_heads, seq]`` fp32, natural logarithms, -inf for padding.

    Raises:
        ValueError: A shape, dtype or device disagrees, or ``mode`` is unknown; the message names
            the argument, what was expected and what came.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    _check_inputs(query, key, value, log_beta)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    batch, _, seq, head_dim = query.shape
    first, end = document_spans(document, valid, (batch, seq), query.device)
    output, lse = torch.ops.trimkv_kernels.retention_attention(
        query, key, value, log_beta, first, end, head_dim**-0.5 if scale is None else scale,
        mode, resolve_impl(impl, query.device),
    )  # fmt: skip
    return (output, lse) if return_lse else output


@dataclass(frozen=True)
class RetentionAttentionConfig:
    """How one of the launches is laid out.

    Attributes:
        block_t: Targets (queries) per tile.
        block_s: Sources (keys) per tile.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
    """

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


def retention_attention_config(
    kernel: str, mode: str, head_dim: int, itemsize: int
) -> RetentionAttentionConfig:
    """Choose the launch of one kernel: the largest tiles that do not spill registers.

    Args:
        kernel: ``"output"``, ``"query_grad"`` or ``"key_value_grad"``.
        mode: ``"add"`` or ``"scale"``.
        head_dim: Elements per head vector.
        itemsize: Bytes per element.
    """
    config = _CONFIGS[itemsize, kernel, max(_block_d(head_dim), 64)]
    if kernel == "key_value_grad" and mode == "scale":
        # The decay of every pair wants registers too.
        config = replace(config, block_t=max(config.block_t // 2, 16))
    return config


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


_MAX_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634
# By itemsize, kernel and padded head_dim: targets, sources, warps, stages.
_CONFIGS = {
    (2, "output", 64): RetentionAttentionConfig(128, 64, 8, 3),
    (2, "output", 128): RetentionAttentionConfig(128, 64, 8, 2),
    (2, "output", 256): RetentionAttentionConfig(64, 32, 8, 2),
    (2, "query_grad", 64): RetentionAttentionConfig(128, 64, 8, 2),
    (2, "query_grad", 128): RetentionAttentionConfig(128, 32, 8, 3),
    (2, "query_grad", 256): RetentionAttentionConfig(32, 64, 8, 1),
    (2, "key_value_grad", 64): RetentionAttentionConfig(64, 128, 8, 2),
    (2, "key_value_grad", 128): RetentionAttentionConfig(16, 128, 8, 3),
    (2, "key_value_grad", 256): RetentionAttentionConfig(32, 32, 8, 1),
    (4, "output", 64): RetentionAttentionConfig(64, 32, 8, 2),
    (4, "output", 128): RetentionAttentionConfig(64, 16, 8, 2),
    (4, "output", 256): RetentionAttentionConfig(32, 32, 8, 1),
    (4, "query_grad", 64): RetentionAttentionConfig(32, 32, 8, 1),
    (4, "query_grad", 128): RetentionAttentionConfig(32, 16, 8, 1),
    (4, "query_grad", 256): RetentionAttentionConfig(16, 16, 4, 1),
    (4, "key_value_grad", 64): RetentionAttentionConfig(32, 32, 8, 2),
    (4, "key_value_grad", 128): RetentionAttentionConfig(16, 32, 8, 1),
    (4, "key_value_grad", 256): RetentionAttentionConfig(16, 16, 8, 1),
}


def _launch_arguments(
    kernel: str, query: Tensor, key: Tensor, mode: str
) -> tuple[RetentionAttentionConfig, dict[str, Any]]:
    """Layout and compile-time arguments of one of the three tile kernels."""
    head_dim = query.shape[3]
    config = tuned(
        f"retention_attention_{kernel}_{mode}",
        query.device,
        functools.partial(retention_attention_config, kernel, mode),
        head_dim,
        query.element_size(),
    )
    constants = {
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_DIM": head_dim,
        "SCALED": mode == "scale",
        "BLOCK_T": config.block_t,
        "BLOCK_S": config.block_s,
        "BLOCK_D": _block_d(head_dim),
        "UPCAST": is_interpreted(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    return config, constants


def _retention_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    first: Tensor | None,
    scale: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    from trimkv_kernels.kernels._triton.retention_attention import _retention_attention_kernel

    batch, num_heads, seq, _ = query.shape
    config, constants = _launch_arguments("output", query, key, mode)
    query, key, value = (_with_dense_rows(tensor) for tensor in (query, key, value))
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    with device_guard(query.device):
        _retention_attention_kernel[(batch * num_heads * -(-seq // config.block_t),)](
            query, key, value, log_beta.contiguous(), first, output, lse,
            scale * _LOG2_E, num_heads, seq,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], **constants,
        )  # fmt: skip
    return output, lse


def _retention_attention_grad_triton(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    mode: str,
    need_query: bool,
    need_rest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from trimkv_kernels.kernels._triton.retention_attention import (
        _delta_kernel,
        _key_value_grad_kernel,
        _query_grad_kernel,
    )

    batch, num_heads, seq, head_dim = query.shape
    num_kv_heads = key.shape[1]
    grads = _empty_grads(query, key, value, log_beta, need_query, need_rest)
    grad, query, key, value = (_with_dense_rows(tensor) for tensor in (grad, query, key, value))
    log_beta, lse_log2, delta = (
        log_beta.contiguous(),
        lse.new_empty(lse.shape),
        lse.new_empty(lse.shape),
    )
    strides = [stride for tensor in (query, key, value, grad) for stride in tensor.stride()[:3]]
    with device_guard(query.device):
        _delta_kernel[(batch * num_heads * -(-seq // _DELTA_BLOCK),)](
            output, lse, grad, grad_lse.contiguous(), lse_log2, delta,
            num_heads, seq, *grad.stride()[:3],
            HEAD_DIM=head_dim, BLOCK_T=_DELTA_BLOCK, BLOCK_D=_block_d(head_dim),
            enable_fp_fusion=True,
        )  # fmt: skip
        if need_query:
            config, constants = _launch_arguments("query_grad", query, key, mode)
            _query_grad_kernel[(batch * num_heads * -(-seq // config.block_t),)](
                query, key, value, log_beta, first, grad, lse_log2, delta, grads[0],
                scale, num_heads, seq, *strides, **constants,
            )  # fmt: skip
        if need_rest:
            config, constants = _launch_arguments("key_value_grad", query, key, mode)
            _key_value_grad_kernel[(batch * num_kv_heads * -(-seq // config.block_s),)](
                query, key, value, log_beta, end, grad, lse_log2, delta, *grads[1:],
                scale, num_kv_heads, seq, *strides, **constants,
            )  # fmt: skip
    return grads


_DELTA_BLOCK = 32


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but that of a head vector's elements."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_grads(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, need_query: bool, need_rest: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense tensors for the gradients; those that nobody needs hold no numbers."""

    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    rest = (like(key, need_rest), like(value, need_rest), like(log_beta, need_rest))
    return (like(query, need_query), *rest)


def _retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    scale: float,
    mode: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    run = reference.retention_attention if impl == "torch" else _retention_attention_triton
    return run(query, key, value, log_beta, first, scale, mode)


def _retention_attention_grad(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    mode: str,
    impl: str,
    need_query: bool,
    need_rest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        return _retention_attention_grad_triton(
            grad, grad_lse, query, key, value, log_beta, first, end, output, lse,
            scale, mode, need_query, need_rest,
        )  # fmt: skip
    grads = reference.retention_attention_grad(
        grad, grad_lse, query, key, value, log_beta, first, output, lse, scale, mode
    )
    # What nobody needs is empty, as from the kernels.
    needs = (need_query, need_rest, need_rest, need_rest)
    grad_query, grad_key, grad_value, grad_log_beta = (
        found if needed else found.new_empty(0) for found, needed in zip(grads, needs, strict=True)
    )
    return grad_query, grad_key, grad_value, grad_log_beta


def _save_for_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.mode, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = torch.ops.trimkv_kernels.retention_attention_grad(
        grad, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.mode, ctx.impl, needs[0], any(needs[1:])
    )
    found = [one if needed else None for one, needed in zip(grads, needs, strict=True)]
    return (*found, None, None, None, None, None)


def _fake(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_grad(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(query, key, value, log_beta, *rest[-2:])


# Opaque to `torch.compile`, both implementations: it need not unroll their loops.
_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")
_LIBRARY.define(
    "retention_attention(Tensor query, Tensor key, Tensor value, Tensor log_beta, Tensor? first, "
    "Tensor? end, float scale, str mode, str impl) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "retention_attention_grad(Tensor grad, Tensor grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor log_beta, Tensor? first, Tensor? end, Tensor output, Tensor lse, "
    "float scale, str mode, str impl, bool need_query, bool need_rest) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
for _name, _run, _shapes in (
    ("retention_attention", _retention_attention, _fake),
    ("retention_attention_grad", _retention_attention_grad, _fake_grad),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"trimkv_kernels::{_name}", _shapes, lib=_LIBRARY)
torch.library.register_autograd(
    "trimkv_kernels::retention_attention", _grad, setup_context=_save_for_grad, lib=_LIBRARY
)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> None:
    check_rank("query", query, "batch, num_heads, seq, head_dim")
    check_rank("key", key, "batch, num_kv_heads, seq, head_dim")
    batch, num_heads, seq, head_dim = query.shape
    num_kv_heads = key.shape[1]
    check_tensor("query", query, query.shape, FLOAT_DTYPES, query.device)
    check_int("head_dim", head_dim, 1, _MAX_HEAD_DIM)
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"query must have a multiple of {num_kv_heads} heads (those of key), got {num_heads}"
        )
    shape = (batch, num_kv_heads, seq, head_dim)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, shape, (query.dtype,), query.device)
    check_tensor("log_beta", log_beta, shape[:3], (torch.float32,), query.device)
