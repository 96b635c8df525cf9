"""Compile the training kernels for GPUs that are not here, and bound what they take."""

import importlib

import offline
import pytest
import torch

# Registers per thread on NVIDIA targets.
REGISTERS = {
    "sum": 128,
    "sum few rows": 128,
    "sum gradient": 208,
    "output bf16 64": 240,
    "delta": 64,
    "query gradient bf16 64": 240,
    "key value gradient bf16 64": 255,
    "output bf16 128": 255,
    "query gradient bf16 128": 255,
    "key value gradient bf16 128": 255,
    "key value gradient bf16 128 one document": 255,
    "key value gradient fp16 80 scale": 255,
    "output fp32 128": 208,
    "query gradient fp32 128": 96,
    "key value gradient fp32 128": 160,
}
# What ptxas of an older Triton takes beyond; nothing spills there either.
REGISTERS_OF_3_6 = {"output bf16 64": 255, "query gradient bf16 64": 255}
# Bytes of scratch per thread on AMD.
AMD_STACK = {
    "sum": 0,
    "sum gradient": 0,
    "output bf16 128": 1024,
    "key value gradient bf16 128": 0,
}


@pytest.mark.slow
def test_training_kernels_fit_every_gpu() -> None:
    triton = pytest.importorskip("triton")
    older = REGISTERS_OF_3_6 if triton.__version__.startswith("3.6.") else {}
    rows = offline.compiled(__file__)
    offline.check(rows, REGISTERS | older, AMD_STACK)
    offline.check_table(rows, REGISTERS)
    assert not any(row.atomics for row in rows)


def launches_of(target: str) -> list[offline.Launch]:
    """Run the launch code of each op on meta tensors."""
    sums = importlib.import_module("trimkv_kernels.kernels.ops.retention_sum")
    attention = importlib.import_module("trimkv_kernels.kernels.ops.retention_attention")
    launches = offline.record("retention_sum", "retention_attention")
    sums.num_multiprocessors = lambda device: 132

    def real(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def attend(dtype: torch.dtype, head_dim: int, mode: str = "add", packed: bool = True) -> None:
        query, key = (real(1, heads, 4096, head_dim, dtype=dtype) for heads in (32, 8))
        lse, document = real(1, 32, 4096), None
        if packed:
            document = real(1, 4096, dtype=torch.int32)
        inputs = (query, key, key, real(1, 8, 4096))
        options = {"document": document, "scale": 0.1, "mode": mode}
        attention.retention_attention.launch(*inputs, **options)
        attention.retention_attention_grad.launch(query, lse, *inputs, query, lse, **options)

    document = real(4, 16384, dtype=torch.int32)
    for rows in (4 * 288, 4 * 2):
        sums.retention_sum.launch(real(4, rows // 4, 16384), document=document)
    grad = (real(4, 288, 16384) for _ in range(2))
    sums.retention_sum_grad.launch(*grad, document=document)
    attend(torch.bfloat16, 64)
    attend(torch.bfloat16, 128)
    attend(torch.bfloat16, 128, packed=False)
    attend(torch.float16, 80, "scale")
    attend(torch.float32, 128)
    # Delta once more, and what differs little from the others.
    for index in (20, 17, 16, 15, 13, 12, 11, 8):
        del launches[index]
    return launches


if __name__ == "__main__":
    offline.main(launches_of, list(REGISTERS), AMD_STACK)
