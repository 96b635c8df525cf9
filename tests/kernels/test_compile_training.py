"""Compile the training kernels for GPUs that are not here, and bound what they take.

As in `test_compile_offline`, the launches are recorded from the launch code of the ops in a process
of its own: where Triton interprets, `triton.jit` gives nothing that could be compiled.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

TARGETS = ("sm_80", "sm_90", "sm_100")
# Bytes of shared memory that a block may have: on sm_86, whose code is that of sm_80, on sm_90 and
# sm_100, and on gfx942.
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
STACK = 16  # registers that some versions of ptxas park outside the loops
# Registers per thread of the NVIDIA targets.
LIMITS = {
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
# The tiles are not chosen for it: they have to compile and to fit, and may spill.
ON_GFX942 = ("sum", "sum gradient", "output bf16 128", "key value gradient bf16 128")


def test_training_kernels_fit_every_gpu() -> None:
    pytest.importorskip("triton")
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        run = subprocess.run(
            [sys.executable, __file__], env=env, capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    expected = {(kernel, target) for kernel in LIMITS for target in TARGETS}
    expected |= {(kernel, "gfx942") for kernel in ON_GFX942}
    assert {(row["kernel"], row["target"]) for row in rows} == expected
    table = "\n".join(
        f"{row['kernel']:40} {row['target']:7} {row['registers']:4} registers "
        f"{row['stack']:5} B stack {row['shared']:7} B shared"
        for row in rows
    )
    assert not any(row["atomics"] for row in rows)
    moved = [f"{row['kernel']} {row['target']}" for row in rows if _is_over(row)]
    assert not moved, f"over the limit: {', '.join(moved)}\n{table}"


def _is_over(row: dict) -> bool:
    if row["shared"] > SHARED[row["target"]]:
        return True
    spills = row["stack"] > STACK or row["registers"] > LIMITS[row["kernel"]]
    return spills and row["target"] != "gfx942"


def _record_launches() -> list[tuple[str, object, tuple, dict]]:
    """Run the launch code of each op on meta tensors, with kernels that note their arguments."""
    sums = importlib.import_module("trimkv_kernels.kernels.retention_sum")
    attention = importlib.import_module("trimkv_kernels.kernels.retention_attention")
    launches: list[tuple[object, tuple, dict]] = []

    class Recorder:
        def __init__(self, kernel: object) -> None:
            self.recorded = kernel

        def __getitem__(self, grid: object) -> object:
            return lambda *args, **options: launches.append((self.recorded, args, options))

    for name in ("retention_sum", "retention_attention"):
        module = importlib.import_module(f"trimkv_kernels.kernels._triton.{name}")
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            setattr(module, kernel, Recorder(getattr(module, kernel)))
    sums.num_multiprocessors = lambda device: 132

    def real(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def attend(dtype: torch.dtype, head_dim: int, mode: str = "add", packed: bool = True) -> None:
        query, key = (real(1, heads, 4096, head_dim, dtype=dtype) for heads in (32, 8))
        lse, span = real(1, 32, 4096), real(1, 4096, dtype=torch.int32) if packed else None
        inputs = (query, key, key, real(1, 8, 4096), span)
        attention._retention_attention_triton(*inputs, 0.1, mode)
        attention._retention_attention_grad_triton(
            query, lse, *inputs, span, query, lse, 0.1, mode, True, True
        )

    span = real(4, 16384, dtype=torch.int32)
    for rows in (4 * 288, 4 * 2):
        sums._retention_sum_triton(real(4, rows // 4, 16384), span)
    sums._retention_sum_grad_triton(*(real(4, 288, 16384) for _ in range(2)), span, span)
    attend(torch.bfloat16, 64)
    attend(torch.bfloat16, 128)
    attend(torch.bfloat16, 128, packed=False)
    attend(torch.float16, 80, "scale")
    attend(torch.float32, 128)
    # Delta once more, and what differs little from the others.
    for index in (20, 17, 16, 15, 13, 12, 11, 8):
        del launches[index]
    return [(name, *launch) for name, launch in zip(LIMITS, launches, strict=True)]


def _specialize(kernel: object, args: tuple, options: dict) -> object:
    """The source as a launch would specialize it; the compiler's options are left."""
    from triton.compiler import ASTSource

    types = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.int32: "*i32",
    }
    bound = dict(zip(kernel.arg_names, args, strict=False))
    bound |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        given = bound[name]
        divisible = isinstance(given, torch.Tensor) or (type(given) is int and given % 16 == 0)
        if parameter.is_constexpr or given is None or (type(given) is int and given == 1):
            signature[name], constants[name], divisible = "constexpr", given, False
        elif isinstance(given, torch.Tensor):
            signature[name] = types[given.dtype]
        else:
            signature[name] = "fp32" if isinstance(given, float) else "i32"
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _measure(job: tuple[int, str]) -> dict[str, object]:
    """Compile, and ask the binary what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    index, target = job
    name, kernel, args, options = LAUNCHES[index]
    options = dict(options)
    source = _specialize(kernel, args, options)
    if target == "gfx942":
        binary = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
        code = binary.asm["amdgcn"]
        registers, stack = (
            int(re.search(rf"\.{field}:\s+(\d+)", code)[1])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
        atomics = len(re.findall(r"\b(?:global|flat|buffer)_atomic", code))
    else:
        capability = int(target.removeprefix("sm_"))
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found = _resource_usage(binary.asm["cubin"])
        registers, stack = int(found["REG"]), int(found["STACK"])
        atomics = len(re.findall(r"\b(?:atom|red)\.", binary.asm["ptx"]))
    return {
        "kernel": name,
        "target": target,
        "registers": registers,
        "stack": stack,
        "shared": binary.metadata.shared,
        "atomics": atomics,
    }


def _resource_usage(cubin: bytes) -> dict[str, str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(REG|STACK):(\d+)", usage))


if __name__ == "__main__":
    LAUNCHES = _record_launches()
    jobs = [(index, target) for index in range(len(LAUNCHES)) for target in TARGETS]
    jobs += [(list(LIMITS).index(name), "gfx942") for name in ON_GFX942]
    # Forked, so that the recorded launches need no pickling.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(_measure, jobs, chunksize=1)))
