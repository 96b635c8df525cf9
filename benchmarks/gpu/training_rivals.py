"""Contestants of the ops that gates are trained through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimkv_kernels import kernels

from .case import Case
from .contestants import Build, a_gpu, compiled, contestant, op
from .measure import Run
from .training_cases import RetentionCase, SumCase, sum_all_pairs


@contestant("retention_attention", RetentionCase, op("retention_attention"))
def retention_attention(case: RetentionCase) -> Run:
    inputs = case.inputs

    def attend(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> Tensor:
        output, _ = kernels.retention_attention(
            query, key, value, log_beta, mode=case.mode, impl=case.impl
        )
        return output

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


contestant("flex", RetentionCase, flex_can, when=fades_additively, slow=True)(
    flex_retention(learned=True)
)
contestant(
    "flex_frozen_bias",
    RetentionCase,
    flex_can,
    when=lambda case: fades_additively(case) and case.backward,
    slow=True,
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
