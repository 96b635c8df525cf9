"""Compile the kernels for GPUs that are not here, and bound the registers and memory they take.

The launches are recorded from the very launch code of the ops, in a process of its own: where
Triton interprets, `triton.jit` gives nothing that could be compiled.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100)
STACK_LIMIT = 8  # one pair of registers, which some versions of ptxas park outside the loops
# Per kernel: registers per thread, and bytes of shared memory, of which a block has 99 KB on sm_86
# and 227 KB on sm_90.
LIMITS = {
    "append bf16 64": (128, 72_000),
    "append bf16 128": (128, 72_000),
    "append bf16 256": (128, 75_000),
    "append fp16 128 one split": (128, 72_000),
    "append fp32 128": (96, 76_000),
    "decode bf16 128": (128, 72_000),
    "evict 513 - 1": (64, 200),
    "evict 640 - 128": (64, 8_200),
    "evict 4224 - 128": (128, 33_000),
    "move field": (64, 0),
    "extend bf16 128": (255, 133_000),
    "extend bf16 128 lse": (255, 133_000),
    "append bf16 128 mass": (128, 75_000),
    "append fp16 128 one split mass": (128, 75_000),
    "decode bf16 128 mass": (128, 75_000),
    "column mass bf16 128": (224, 83_000),
    "column mass bf16 128 window": (196, 58_000),
    "select of 900": (96, 8_200),
    "fill bf16 128": (64, 0),
    "fill field": (64, 0),
    "select of 32768": (128, 16_400),
}


def test_kernels_fit_every_gpu() -> None:
    pytest.importorskip("triton")
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        env["TRITON_CACHE_DIR"] = cache
        path = os.pathsep.join(map(str, sys.path))
        run = subprocess.run(
            [sys.executable, __file__],
            env={**env, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {(row["kernel"], row["sm"]) for row in rows} == {
        (kernel, sm) for kernel in LIMITS for sm in CAPABILITIES
    }
    table = "\n".join(
        f"{row['kernel']:32} sm_{row['sm']:<4} {row['registers']:4} registers "
        f"{row['stack']:5} B stack {row['shared']:7} B shared"
        for row in rows
    )
    for row in rows:
        if row["kernel"].startswith("append"):
            assert row["pipelined"], row
            assert row["atomics"] == (0 if "one split" in row["kernel"] else 1), row
        if row["kernel"].startswith(("evict", "select")):
            assert row["fused"] == 0, row  # the product is rounded before the sum
    moved = [
        f"{row['kernel']} sm_{row['sm']}"
        for row in rows
        if row["stack"] > STACK_LIMIT
        or row["registers"] > LIMITS[row["kernel"]][0]
        or row["shared"] > LIMITS[row["kernel"]][1]
    ]
    assert not moved, f"over the limit: {', '.join(moved)}\n{table}"


def _record_launches(capability: int) -> list[tuple[str, object, tuple, dict]]:
    """Run the launch code of each op on meta tensors, with kernels that note their arguments."""
    import importlib

    import torch

    decode = importlib.import_module("trimkv_kernels.kernels.decode_attention")
    evict = importlib.import_module("trimkv_kernels.kernels.evict")
    extend = importlib.import_module("trimkv_kernels.kernels.extend_attention")
    extend.compute_capability = lambda device: capability // 10
    fill = importlib.import_module("trimkv_kernels.kernels.fill_slots")
    column = importlib.import_module("trimkv_kernels.kernels.column_mass")
    kernels = [
        importlib.import_module(f"trimkv_kernels.kernels._triton.{name}")
        for name in ("decode_attention", "evict", "extend_attention", "fill_slots", "column_mass")
    ]
    launches = []

    class Recorder:
        def __init__(self, kernel: object) -> None:
            self.recorded = kernel

        def __getitem__(self, grid: object) -> object:
            return lambda *args, **options: launches.append((self.recorded, args, options))

    for module in kernels:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            setattr(module, name, Recorder(getattr(kernel, "recorded", kernel)))
    decode.num_multiprocessors = lambda device: 132

    def number(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def real(*shape: int) -> torch.Tensor:
        return number(*shape, dtype=torch.float32)

    def append(dtype: torch.dtype, head_dim: int, batch: int = 1, mass: str | None = None) -> None:
        slots, new = (36, batch, 8, 1152), (batch, 8)
        shares = () if mass is None else (real(batch, 32), real(*slots), mass, True)
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
            number(1, 1024, dtype=torch.bool), 0.1, queries, "max",
        )  # fmt: skip
    choose(300, 600)
    choose(32768, 0)
    del launches[-2:]  # the moves do not depend on the number of candidates
    return [(name, *launch) for name, launch in zip(LIMITS, launches, strict=True)]


def _compile(kernel: object, args: tuple, options: dict, capability: int) -> dict[str, int]:
    """Specialize as a launch would, compile, and ask the binary what it needs."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
        torch.int32: "*i32", torch.bool: "*i1",
    }  # fmt: skip
    bound = dict(zip(kernel.arg_names, args, strict=False))
    bound |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        given, free = bound[name], parameter.do_not_specialize
        divisible = not free
        if (
            parameter.is_constexpr
            or given is None
            or (type(given) is int and given == 1 and not free)
        ):
            signature[name], constants[name], divisible = "constexpr", given, False
        elif isinstance(given, torch.Tensor):
            signature[name] = types[given.dtype]
        elif isinstance(given, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32", divisible and given % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": binary.metadata.shared,
        "pipelined": "cp.async" in binary.asm["ptx"],
        "atomics": len(re.findall(r"\batom\.", binary.asm["ptx"])),
        "fused": len(re.findall(r"\bfma\.", binary.asm["ptx"])),
    }


def _measure(job: tuple[int, int]) -> dict[str, object]:
    index, capability = job
    name, kernel, args, options = LAUNCHES[capability][index]
    return {"kernel": name, "sm": capability, **_compile(kernel, args, dict(options), capability)}


if __name__ == "__main__":
    LAUNCHES = {sm: _record_launches(sm) for sm in CAPABILITIES}
    jobs = [(index, sm) for index in reversed(range(len(LIMITS))) for sm in CAPABILITIES]
    # Forked, so that the recorded launches need no pickling.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(_measure, jobs, chunksize=1)))
