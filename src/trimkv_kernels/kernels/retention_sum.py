"""How much of the past is retained: the sum that the capacity loss of gate training bounds."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.kernels import reference
from trimkv_kernels.kernels._dispatch import (
    check_rank,
    check_tensor,
    device_guard,
    num_multiprocessors,
    resolve_impl,
)
from trimkv_kernels.kernels._documents import document_spans
from trimkv_kernels.kernels.tuning import tuned


def retention_sum(
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum what every source still weighs at each target, in memory linear in the sequence.

    ``S[t] = sum over j <= t of exp((t - j) * log_beta[j])``: the expected number of cached tokens
    if token ``j`` survives each step with probability beta_j (arXiv 2512.03324). It is at least 1,
    the token itself, and differentiable once.

    Args:
        log_beta: ``[batch, heads, seq]`` fp32, natural logarithms, at most 0. Layers can lie in
            either dimension; below -1e4 a source counts at its own step only, as -inf does.
        document: ``[batch, seq]`` int32, which document of a packed sequence a token belongs to:
            sources of other documents do not count. A document is a run of equal ids, of whatever
            value; a negative one marks padding, which gets 0 and does not count, but has to be
            finite. ``None`` means one document.
        valid: ``[batch, seq]`` bool, False for padding; the same as a negative ``document``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, heads, seq]`` fp32.

    Raises:
        ValueError: A shape, dtype or device disagrees; the message names the argument, what was
            expected and what came.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_rank("log_beta", log_beta, "batch, heads, seq")
    check_tensor("log_beta", log_beta, log_beta.shape, (torch.float32,), log_beta.device)
    batch, _, seq = log_beta.shape
    first, end = document_spans(document, valid, (batch, seq), log_beta.device)
    impl = resolve_impl(impl, log_beta.device)
    output: Tensor = torch.ops.trimkv_kernels.retention_sum(log_beta, first, end, impl)
    return output


@dataclass(frozen=True)
class RetentionSumConfig:
    """How a launch is laid out.

    Attributes:
        block: Tokens per block, of sources and of targets alike.
        columns: Blocks of targets that a program handles at a time.
        num_warps: Warps per program.
    """

    block: int
    columns: int
    num_warps: int


def retention_sum_config(kernel: str, rows: int, seq: int, num_sms: int) -> RetentionSumConfig:
    """Choose the launch of one kernel from shapes alone.

    Args:
        kernel: ``"output"`` or ``"grad"``.
        rows: Heads over all sequences.
        seq: Tokens per sequence.
        num_sms: Multiprocessors of the device.
    """
    if kernel == "grad":
        # The compiler keeps what a block's sources weigh in registers: larger blocks spill.
        return RetentionSumConfig(block=32, columns=32, num_warps=4)
    # More columns spread the exponentials of a source further, fewer keep every processor busy.
    if rows * (seq // 2048) >= 4 * num_sms:
        return RetentionSumConfig(block=64, columns=32, num_warps=8)
    return RetentionSumConfig(block=64, columns=16, num_warps=4)


def _launch_arguments(
    kernel: str, log_beta: Tensor
) -> tuple[int, RetentionSumConfig, dict[str, Any]]:
    """Rows, layout and compile-time arguments of either kernel."""
    rows, seq = log_beta.shape[0] * log_beta.shape[1], log_beta.shape[2]
    config = tuned(
        f"retention_sum_{kernel}",
        log_beta.device,
        functools.partial(retention_sum_config, kernel),
        rows,
        seq,
        num_multiprocessors(log_beta.device),
    )
    constants = {
        "BLOCK": config.block,
        "COLUMNS": config.columns,
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }
    return rows, config, constants


def _retention_sum_triton(log_beta: Tensor, first: Tensor | None) -> Tensor:
    from trimkv_kernels.kernels._triton.retention_sum import _retention_sum_kernel

    rows, config, constants = _launch_arguments("output", log_beta)
    seq = log_beta.shape[2]
    output = log_beta.new_empty(log_beta.shape)
    with device_guard(log_beta.device):
        _retention_sum_kernel[(rows * -(-seq // (config.block * config.columns)),)](
            log_beta.contiguous(), first, output, rows, log_beta.shape[1], seq, **constants
        )
    return output


def _retention_sum_grad_triton(
    grad: Tensor, log_beta: Tensor, first: Tensor | None, end: Tensor | None
) -> Tensor:
    from trimkv_kernels.kernels._triton.retention_sum import _retention_sum_grad_kernel

    rows, config, constants = _launch_arguments("grad", log_beta)
    seq = log_beta.shape[2]
    output = log_beta.new_empty(log_beta.shape)
    with device_guard(log_beta.device):
        _retention_sum_grad_kernel[(rows * -(-seq // config.block),)](
            grad.contiguous(), log_beta.contiguous(), first, end, output,
            rows, log_beta.shape[1], seq, **constants,
        )  # fmt: skip
    return output


def _retention_sum(log_beta: Tensor, first: Tensor | None, end: Tensor | None, impl: str) -> Tensor:
    run = reference.retention_sum if impl == "torch" else _retention_sum_triton
    return run(log_beta, first)


def _retention_sum_grad(
    grad: Tensor, log_beta: Tensor, first: Tensor | None, end: Tensor | None, impl: str
) -> Tensor:
    if impl == "torch":
        return reference.retention_sum_grad(grad, log_beta, first)
    return _retention_sum_grad_triton(grad, log_beta, first, end)


def _save_for_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    arguments = (grad, *ctx.saved_tensors, ctx.impl)
    return torch.ops.trimkv_kernels.retention_sum_grad(*arguments), None, None, None


# Opaque to `torch.compile`, both implementations: it need not unroll their loops.
_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")
_LIBRARY.define("retention_sum(Tensor log_beta, Tensor? first, Tensor? end, str impl) -> Tensor")
_LIBRARY.define(
    "retention_sum_grad(Tensor grad, Tensor log_beta, Tensor? first, Tensor? end, str impl) "
    "-> Tensor"
)
for _name, _run in (("retention_sum", _retention_sum), ("retention_sum_grad", _retention_sum_grad)):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"trimkv_kernels::{_name}", lambda x, *_: x.new_empty(x.shape), lib=_LIBRARY
    )
torch.library.register_autograd(
    "trimkv_kernels::retention_sum", _grad, setup_context=_save_for_grad, lib=_LIBRARY
)
