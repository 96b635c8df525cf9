"""Compile the kernels of a cache for GPUs that are not here, and bound what they take."""

import importlib

import offline
import pytest
import torch

# Registers per thread on NVIDIA targets.
REGISTERS = {
    "append bf16 64": 128,
    "append bf16 128": 128,
    "append bf16 256": 128,
    "append fp16 128 one split": 128,
    "append fp32 128": 96,
    "decode bf16 128": 128,
    "evict 513 - 1": 64,
    "evict 640 - 128": 64,
    "evict 4224 - 128": 128,
    "move field": 64,
    "extend bf16 128": 255,
    "extend bf16 128 lse": 255,
    "append bf16 128 mass": 128,
    "append fp16 128 one split mass": 128,
    "decode bf16 128 mass": 128,
    "column mass bf16 128": 224,
    "column mass bf16 128 window": 196,
    "append bf16 128 mass per head": 128,
    "column mass bf16 128 below": 168,
    "column mass bf16 128 below per head": 128,
    "select of 900": 96,
    "fill bf16 128": 64,
    "fill field": 64,
    "select of 32768": 128,
}
# Bytes of scratch per thread on AMD.
AMD_STACK = dict.fromkeys(REGISTERS, 0) | {
    "evict 4224 - 128": 128,
    "extend bf16 128": 64,
    "extend bf16 128 lse": 64,
    "column mass bf16 128": 384,
    "column mass bf16 128 window": 384,
}
MAJOR = {"sm_80": 8, "sm_90": 9, "sm_100": 10, offline.AMD: 8}


def test_kernels_fit_every_gpu() -> None:
    pytest.importorskip("triton")
    rows = offline.compiled(__file__)
    offline.check(rows, REGISTERS, AMD_STACK)
    for row in rows:
        if row.target == offline.AMD:
            continue
        if row.kernel.startswith("append"):
            assert row.pipelined, row
            assert row.atomics == (0 if "one split" in row.kernel else 1), row
        if row.kernel.startswith(("evict", "select")):
            assert row.fused == 0, row  # the product is rounded before the sum


def launches_of(target: str) -> list[offline.Launch]:
    """Run the launch code of each op on meta tensors."""
    decode = importlib.import_module("trimkv_kernels.kernels.decode_attention")
    evict = importlib.import_module("trimkv_kernels.kernels.evict")
    extend = importlib.import_module("trimkv_kernels.kernels.extend_attention")
    extend.compute_capability = lambda device: MAJOR[target]
    fill = importlib.import_module("trimkv_kernels.kernels.fill_slots")
    column = importlib.import_module("trimkv_kernels.kernels.column_mass")
    launches = offline.record(
        "decode_attention", "evict", "extend_attention", "fill_slots", "column_mass"
    )
    decode.is_amd = lambda: target == offline.AMD
    decode.num_multiprocessors = lambda device: 132

    def number(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def real(*shape: int) -> torch.Tensor:
        return number(*shape, dtype=torch.float32)

    def append(dtype: torch.dtype, head_dim: int, batch: int = 1, mass: str | None = None) -> None:
        slots, new = (36, batch, 8, 1152), (batch, 8)
        heads = (36, batch, 32 if mass == "none" else 8, 1152)
        shares = () if mass is None else (real(batch, 32), real(*heads), mass, True)
        decode._append_attention_triton(
            number(batch, 32, head_dim, dtype=dtype),
            *(number(*new, head_dim, dtype=dtype) for _ in range(2)),
            *(number(*slots, head_dim, dtype=dtype) for _ in range(2)),
            number(*slots), number(*slots[:3]), number(batch), 7,
            number(batch, dtype=torch.bool),
            real(*slots), real(*slots), real(*new), real(*new), 0.1, *shares,
        )  # fmt: skip

    def compact(num_slots: int, buffer: int, fields: bool = False) -> None:
        slots = (36, 1, 8, num_slots)
        evict._evict_triton(
            *(number(*slots, 128, dtype=torch.bfloat16) for _ in range(2)),
            number(*slots), number(*slots[:3]), number(1), num_slots - buffer,
            real(*slots), real(*slots), None, 4, 32,
            [real(*slots, 2)] if fields else [], number(36),
        )  # fmt: skip

    def choose(tokens: int, filled: int) -> None:
        slots, new = (36, 1, 8, 640), (1, 8, tokens)
        fill._fill_slots_triton(
            *(number(*new, 128, dtype=torch.bfloat16) for _ in range(2)), number(1, tokens),
            *(number(*slots, 128, dtype=torch.bfloat16) for _ in range(2)),
            number(*slots), number(*slots[:3]), number(1), 7, 512,
            real(*slots), real(*slots), real(*new), real(*new), None,
            number(1, tokens, dtype=torch.bool), 4, 32,
            [real(*slots, 2)], [real(*new, 2)], number(36), filled,
        )  # fmt: skip

    append(torch.bfloat16, 64)
    append(torch.bfloat16, 128)
    append(torch.bfloat16, 256)
    append(torch.float16, 128, batch=64)
    append(torch.float32, 128)
    key = number(1, 8, 1152, 128, dtype=torch.bfloat16)
    decode._decode_attention_triton(
        number(1, 32, 128, dtype=torch.bfloat16), key, key, number(1, 8), 0.1
    )
    compact(513, 1)
    compact(640, 128)
    compact(4224, 128)
    compact(640, 128, fields=True)
    del launches[-2]  # the eviction itself once more
    new = number(1, 8, 1024, 128, dtype=torch.bfloat16)
    extend._extend_attention_triton(
        number(1, 32, 1024, 128, dtype=torch.bfloat16), new, new, key, key, number(1, 8), None, 0.1
    )
    lse = real(1, 32, 1024)
    extend._extend_attention_triton(
        number(1, 32, 1024, 128, dtype=torch.bfloat16), new, new, key, key,
        number(1, 8), None, 0.1, lse,
    )  # fmt: skip
    append(torch.bfloat16, 128, mass="sum")
    append(torch.float16, 128, batch=64, mass="max")
    decode._decode_attention_triton(
        number(1, 32, 128, dtype=torch.bfloat16), key, key, number(1, 8), 0.1,
        real(1, 32), real(1, 8, 1152), "mean", False,
    )  # fmt: skip
    for queries in (1024, 32):
        column._column_mass_triton(
            number(1, 32, 1024, 128, dtype=torch.bfloat16), new, key, lse, number(1, 8),
            number(1, 1024, dtype=torch.bool), 0.1, queries, "max", False,
        )  # fmt: skip
    append(torch.bfloat16, 128, mass="none")
    for reduce in ("max", "none"):
        column._column_mass_triton(
            number(1, 32, 1024, 128, dtype=torch.bfloat16), new, key, lse, number(1, 8),
            number(1, 1024, dtype=torch.bool), 0.1, 1024, reduce, True,
        )  # fmt: skip
    choose(300, 600)
    choose(32768, 0)
    del launches[-2:]  # the moves do not depend on the number of candidates
    return launches


if __name__ == "__main__":
    offline.main(launches_of, list(REGISTERS), AMD_STACK)
