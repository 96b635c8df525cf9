"""How much of the past is retained, for the capacity loss of gate training."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from trimkv_kernels.kernels._torch import retention_sum as _torch
from trimkv_kernels.kernels.checks import BOOL, FLOAT32, INT32, Shape
from trimkv_kernels.kernels.documents import document_spans
from trimkv_kernels.kernels.launch import device_guard, num_multiprocessors
from trimkv_kernels.kernels.op import Grad, op
from trimkv_kernels.kernels.tuning import tuned


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
        # The weights of a block's sources are kept in registers: larger blocks spill.
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


def _like_log_beta(log_beta: Tensor, **_: object) -> Tensor:
    return log_beta.new_empty(log_beta.shape)


@op(torch=_torch.retention_sum_grad, fake=_like_log_beta)
def retention_sum_grad(
    grad: Tensor,
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Gradient of `retention_sum` in ``log_beta``. The arguments are not checked."""
    from trimkv_kernels.kernels._triton.retention_sum import _retention_sum_grad_kernel

    rows, config, constants = _launch_arguments("grad", log_beta)
    seq = log_beta.shape[2]
    start, end = document_spans(document, valid)
    output = log_beta.new_empty(log_beta.shape)
    with device_guard(log_beta.device):
        _retention_sum_grad_kernel[(rows * -(-seq // config.block),)](
            grad.contiguous(), log_beta.contiguous(), start, end, output,
            rows, log_beta.shape[1], seq, **constants,
        )  # fmt: skip
    return output


def _run_grad(
    inputs: Sequence[Any],
    outputs: Sequence[None],
    grads: Sequence[Tensor],
    needed: Sequence[bool],
    impl: str,
) -> list[Tensor | None]:
    log_beta, document, valid = inputs
    (grad,) = grads
    found = retention_sum_grad.unchecked(grad, log_beta, document=document, valid=valid, impl=impl)
    return [found, None, None]


@op(
    torch=_torch.retention_sum,
    fake=_like_log_beta,
    grad=Grad(_run_grad, saves_outputs=False),
)
def retention_sum(
    log_beta: Annotated[Tensor, Shape("batch, heads, seq", FLOAT32)],
    *,
    document: Annotated[Tensor | None, Shape("batch, seq", INT32)] = None,
    valid: Annotated[Tensor | None, Shape("batch, seq", BOOL)] = None,
    impl: str = "auto",
) -> Tensor:
    """Sum the remaining weight of every source at each target, in linear memory.

    ``S[t] = sum over j <= t of exp((t - j) * log_beta[j])``: the expected number of cached tokens
    if token ``j`` survives each step with probability beta_j (arXiv 2512.03324). It is at least 1,
    for the token itself, and differentiable once.

    Args:
        log_beta: ``[batch, heads, seq]`` fp32, natural logarithms, at most 0. Several layers can be
            joined along ``batch`` or ``heads``. Below -1e4, including -inf, a source counts only at
            its own step.
        document: ``[batch, seq]`` int32, which document of a packed sequence a token belongs to.
            Sources of other documents do not count. A document is a run of equal ids. Negative ids
            mark padding, which gets 0 and does not count, but must be finite. ``None`` means one
            document.
        valid: ``[batch, seq]`` bool, False for padding; the same as a negative ``document``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, heads, seq]`` fp32.

    Raises:
        ValueError: A shape, dtype or device disagrees; the message names the argument, what was
            expected and what came.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.retention_sum import _retention_sum_kernel

    rows, config, constants = _launch_arguments("output", log_beta)
    seq = log_beta.shape[2]
    start, _ = document_spans(document, valid)
    output = log_beta.new_empty(log_beta.shape)
    with device_guard(log_beta.device):
        _retention_sum_kernel[(rows * -(-seq // (config.block * config.columns)),)](
            log_beta.contiguous(), start, output, rows, log_beta.shape[1], seq, **constants
        )
    return output
