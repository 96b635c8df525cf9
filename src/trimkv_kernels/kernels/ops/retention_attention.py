"""Causal attention that fades with age, for the training of retention gates."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import retention_attention as _torch
from trimkv_kernels.kernels.checks import (
    BOOL,
    FLOAT32,
    FLOAT_DTYPES,
    INT32,
    Shape,
    check_choice,
    check_groups,
    check_int,
)
from trimkv_kernels.kernels.documents import document_spans
from trimkv_kernels.kernels.launch import (
    block_d,
    device_guard,
    is_interpreted,
    log2_scale,
    softmax_scale,
)
from trimkv_kernels.kernels.op import Grad, op
from trimkv_kernels.kernels.tuning import tuned

MODES = ("add", "scale")


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
    config = _CONFIGS[itemsize, kernel, max(block_d(head_dim), 64)]
    if kernel == "key_value_grad" and mode == "scale":
        # The decay of every pair needs registers too.
        config = replace(config, block_t=max(config.block_t // 2, 16))
    return config


_MAX_HEAD_DIM = 256
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
        "BLOCK_D": block_d(head_dim),
        "UPCAST": is_interpreted(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    return config, constants


_DELTA_BLOCK = 32


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """Make head vectors contiguous; the kernels take any other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_grads(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, need_query: bool, need_rest: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense tensors for the gradients; empty for those that are not needed."""

    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    rest = (like(key, need_rest), like(value, need_rest), like(log_beta, need_rest))
    return (like(query, need_query), *rest)


def _fake_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    need_query: bool,
    need_rest: bool,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(query, key, value, log_beta, need_query, need_rest)


@op(torch=_torch.retention_attention_grad, fake=_fake_grad)
def retention_attention_grad(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    mode: str = "add",
    need_query: bool = True,
    need_rest: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `retention_attention` in ``query``, ``key``, ``value`` and ``log_beta``.

    The arguments are not checked. The query's gradient is empty if it is not needed, and so are
    the other three.
    """
    from trimkv_kernels.kernels._triton.retention_attention import (
        _delta_kernel,
        _key_value_grad_kernel,
        _query_grad_kernel,
    )

    batch, num_heads, seq, head_dim = query.shape
    num_kv_heads, scale = key.shape[1], softmax_scale(scale, head_dim)
    start, end = document_spans(document, valid)
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
            HEAD_DIM=head_dim, BLOCK_T=_DELTA_BLOCK, BLOCK_D=block_d(head_dim),
            enable_fp_fusion=True,
        )  # fmt: skip
        if need_query:
            config, constants = _launch_arguments("query_grad", query, key, mode)
            _query_grad_kernel[(batch * num_heads * -(-seq // config.block_t),)](
                query, key, value, log_beta, start, grad, lse_log2, delta, grads[0],
                scale, num_heads, seq, *strides, **constants,
            )  # fmt: skip
        if need_rest:
            config, constants = _launch_arguments("key_value_grad", query, key, mode)
            _key_value_grad_kernel[(batch * num_kv_heads * -(-seq // config.block_s),)](
                query, key, value, log_beta, end, grad, lse_log2, delta, *grads[1:],
                scale, num_kv_heads, seq, *strides, **constants,
            )  # fmt: skip
    return grads


def _run_grad(
    inputs: Sequence[Any],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    needed: Sequence[bool],
    impl: str,
) -> list[Tensor | None]:
    *tensors, document, valid, scale, mode = inputs
    found = retention_attention_grad.unchecked(
        *grads, *tensors, *outputs, document=document, valid=valid, scale=scale, mode=mode,
        need_query=needed[0], need_rest=any(needed[1:4]), impl=impl,
    )  # fmt: skip
    wanted = [one if want else None for one, want in zip(found, needed, strict=False)]
    return wanted + [None] * (len(inputs) - len(wanted))


def _check(query: Tensor, key: Tensor, mode: str, **_: object) -> None:
    check_int("head_dim", query.shape[3], 1, _MAX_HEAD_DIM)
    check_groups(query, key.shape[1])
    check_choice("mode", mode, MODES)


def _fake(query: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@op(torch=_torch.retention_attention, check=_check, fake=_fake, grad=Grad(_run_grad))
def retention_attention(
    query: Annotated[Tensor, Shape("batch, num_heads, seq, head_dim", FLOAT_DTYPES)],
    key: Annotated[Tensor, Shape("batch, num_kv_heads, seq, head_dim")],
    value: Annotated[Tensor, Shape("batch, num_kv_heads, seq, head_dim")],
    log_beta: Annotated[Tensor, Shape("batch, num_kv_heads, seq", FLOAT32)],
    *,
    document: Annotated[Tensor | None, Shape("batch, seq", INT32)] = None,
    valid: Annotated[Tensor | None, Shape("batch, seq", BOOL)] = None,
    scale: float | None = None,
    mode: str = "add",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend causally; the logit of a source falls by its log beta per step of age.

    The logit of target ``t`` and source ``j <= t`` is ``scale * q_t.k_j + log_beta_j * (t - j)``
    (retention-gated attention, arXiv 2512.03324). Both results are differentiable once in
    all four tensors; the gradients are deterministic.

    Args:
        query: ``[batch, num_heads, seq, head_dim]``, fp32, fp16 or bf16; head_dim at most 256.
        key: ``[batch, num_kv_heads, seq, head_dim]``, dtype of ``query``. ``num_heads`` is a
            multiple of ``num_kv_heads``.
        value: As ``key``.
        log_beta: ``[batch, num_kv_heads, seq]`` fp32, natural logarithms, at most 0. Values below
            -1e4 count as -1e4.
        document: ``[batch, seq]`` int32, which document of a packed sequence a token belongs to.
            Tokens attend within their document only. A document is a run of equal ids. Negative ids
            mark padding: its output is 0 and nothing sees it, but its inputs must be finite.
            ``None`` means one document.
        valid: ``[batch, seq]`` bool, False for padding; the same as a negative ``document``.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        mode: ``"add"``, or ``"scale"`` for the logit ``scale * q_t.k_j * beta_j ** (t - j)``, which
            is another function.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        The output, ``[batch, num_heads, seq, head_dim]``, dtype of ``query``, and the log-sum-exp
        of the logits, ``[batch, num_heads, seq]`` fp32, natural logarithms, -inf for padding.

    Raises:
        ValueError: A shape, dtype or device disagrees, or ``mode`` is unknown; the message names
            the argument, what was expected and what came.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.retention_attention import _retention_attention_kernel

    batch, num_heads, seq, head_dim = query.shape
    start, _ = document_spans(document, valid)
    config, constants = _launch_arguments("output", query, key, mode)
    query, key, value = (_with_dense_rows(tensor) for tensor in (query, key, value))
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    with device_guard(query.device):
        _retention_attention_kernel[(batch * num_heads * -(-seq // config.block_t),)](
            query, key, value, log_beta.contiguous(), start, output, lse,
            log2_scale(scale, head_dim), num_heads, seq,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], **constants,
        )  # fmt: skip
    return output, lse
