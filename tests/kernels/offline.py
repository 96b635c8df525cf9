"""Compile launches for GPUs that are not here, and bound the registers and memory they take.

The launches are recorded from the very launch code of the ops, on meta tensors and in a process of
its own: where Triton interprets, `triton.jit` gives nothing that could be compiled.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"
# Registers that some versions of ptxas park outside the loops.
STACK_LIMIT = 16
# Bytes of shared memory that a block may have; code for sm_80 runs on sm_86 too.
SHARED_LIMIT = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, AMD: 65_536}

AMD_REGISTERS = 256  # a wave that takes more has its SIMD to itself

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """What one kernel takes on one target."""

    kernel: str
    function: str
    target: str
    registers: int
    stack: int
    shared: int
    atomics: int
    fused: int  # multiply-adds
    pipelined: bool
    barriers_before_copy: int
    merge_rounds: int  # of loads of other programs' parts, each waited for
    merge_loops: bool
    loads_before_leaving: int  # the loads before the first place where a program may leave

    def __str__(self) -> str:
        return (
            f"{self.kernel:40} {self.target:7} {self.registers:4} registers "
            f"{self.stack:5} B stack {self.shared:7} B shared"
        )


def compiled(script: str) -> list[Row]:
    """The rows that ``script`` prints when run as a program of its own, see :func:`main`."""
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        run = subprocess.run(
            [sys.executable, script], env=env, capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stderr
    return [Row(**row) for row in json.loads(run.stdout)]


DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
TABLE = re.compile(r"(?<=<!-- compiled kernels: make kernel-table -->\n).*?(?=<!-- end -->)", re.S)


def table_lines(rows: list[Row], names: Collection[str]) -> list[str]:
    """A line of the table in docs/kernels.md for each of ``names``."""
    found = {(row.kernel, row.target): row for row in rows}

    def cell(name: str, target: str) -> str:
        row = found.get((name, target))
        return f"{row.registers} / {row.stack} / {row.shared / 1024:.1f}" if row else "-"

    function = {row.kernel: row.function for row in rows}
    return [
        " | ".join(
            (f"| `{function[name]}`", name, *(cell(name, target) for target in (*NVIDIA, AMD)))
        )
        + " |"
        for name in names
    ]


def check_table(rows: list[Row], names: Collection[str]) -> None:
    """The table in the documentation says of ``names`` what this version of Triton compiles."""
    import triton

    table = TABLE.search(DOCS.read_text(encoding="utf-8"))[0]
    if f"Triton {triton.__version__}" in table:
        missing = [line for line in table_lines(rows, names) if line not in table]
        assert not missing, "run make kernel-table; missing:\n" + "\n".join(missing)


def check(
    rows: list[Row],
    registers: Mapping[str, int],
    amd_stack: Mapping[str, int],
    stack: Mapping[str, int] | None = None,
    amd_registers: Mapping[str, int] | None = None,
) -> None:
    """Every kernel is there for every target, and within its limits.

    ``registers`` bounds the NVIDIA targets, which may not spill, but for the bytes of a thread in
    ``stack``. On AMD, for which the tiles are not chosen, ``amd_stack`` says it for each kernel,
    and ``amd_registers`` for those that may have a SIMD to themselves.
    """
    expected = {(kernel, target) for kernel in registers for target in NVIDIA}
    expected |= {(kernel, AMD) for kernel in amd_stack}
    assert {(row.kernel, row.target) for row in rows} == expected
    over = [
        row
        for row in rows
        if row.shared > SHARED_LIMIT[row.target]
        or row.stack
        > (
            amd_stack[row.kernel]
            if row.target == AMD
            else (stack or {}).get(row.kernel, STACK_LIMIT)
        )
        or row.registers
        > (
            (amd_registers or {}).get(row.kernel, AMD_REGISTERS)
            if row.target == AMD
            else registers[row.kernel]
        )
    ]
    table = "\n".join(map(str, rows))
    assert not over, "over the limit:\n" + "\n".join(map(str, over)) + f"\nof all:\n{table}"


def record(*modules: str) -> list[Launch]:
    """Let the kernels of Triton modules note their launches instead of running."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.recorded = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: launches.append((self.recorded, args, options))

    for name in modules:
        module = importlib.import_module(f"trimkv_kernels.kernels._triton.{name}")
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            known = getattr(module, kernel)
            setattr(module, kernel, Recorder(getattr(known, "recorded", known)))
    return launches


def main(
    launches: Callable[[str], list[Launch]], names: list[str], on_amd: Collection[str]
) -> None:
    """Compile ``launches(target)``, which ``names`` name, for every target; print the rows."""
    for target in (*NVIDIA, AMD):
        wanted = on_amd if target == AMD else names
        recorded = zip(names, launches(target), strict=True)
        _JOBS.extend((name, target, launch) for name, launch in recorded if name in wanted)
    # Forked, so that the recorded launches need no pickling; the slow ones stand at the end.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(_measure, reversed(range(len(_JOBS))), chunksize=1)))


_JOBS: list[tuple[str, str, Launch]] = []


def _measure(index: int) -> dict[str, Any]:
    """Compile, and ask the binary what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    name, target, (kernel, args, options) = _JOBS[index]
    options = dict(options)
    source = _specialize(kernel, args, options)
    if target == AMD:
        binary = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
        code = binary.asm["amdgcn"]
        registers, stack = (
            int(re.search(rf"\.{field}:\s+(\d+)", code)[1])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
        atomics = len(re.findall(r"\b(?:global|flat|buffer)_atomic", code))
        fused, pipelined = len(re.findall(r"\bv_fma_f32", code)), False
        sass: list[str] = []
    else:
        capability = int(target.removeprefix("sm_"))
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        found = dict(_USAGE.findall(_tool("cuobjdump", "--dump-resource-usage", binary)))
        sass = _tool("nvdisasm", "-c", binary).splitlines()
        registers, stack = int(found["REG"]), int(found["STACK"])
        code = binary.asm["ptx"]
        atomics = len(re.findall(r"\b(?:atom|red)\.", code))
        fused, pipelined = len(re.findall(r"\bfma\.", code)), "cp.async" in code
    rounds, loops = _merge_rounds(sass)
    return {
        "kernel": name,
        "function": kernel.__name__,
        "target": target,
        "registers": registers,
        "stack": stack,
        "shared": binary.metadata.shared,
        "atomics": atomics,
        "fused": fused,
        "pipelined": pipelined,
        "barriers_before_copy": _barriers_before_copy(sass),
        "merge_rounds": rounds,
        "merge_loops": loops,
        "loads_before_leaving": _loads_before_leaving(sass),
    }


def _specialize(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The source as a launch would specialize it; takes its arguments out of ``options``."""
    from triton.compiler import ASTSource

    types = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.int32: "*i32",
        torch.bool: "*i1",
    }
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
    return ASTSource(kernel, signature, constants, attributes)


_USAGE = re.compile(r"(REG|STACK):(\d+)")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
# The parts of other programs are loaded past L1.
_PART = re.compile(r"LDG\.E(?:\.(64|128))?\.STRONG\.GPU R(\d+),")


def _barriers_before_copy(code: list[str]) -> int:
    """How many barriers stand before the first asynchronous copy."""
    copies = [index for index, line in enumerate(code) if "LDGSTS" in line]
    return sum("BAR.SYNC" in line for line in code[: copies[0] if copies else 0])


def _loads_before_leaving(code: list[str]) -> int:
    """How many loads stand before the first conditional exit or branch; all of them if none."""
    conditional = re.compile(r"@!?U?P\d (EXIT|BRA)|BRA\.U !?UP")
    leaves = [index for index, line in enumerate(code) if conditional.search(line)]
    return sum("LDG." in line for line in code[: leaves[0] if leaves else None])


def _merge_rounds(code: list[str]) -> tuple[int, bool]:
    """In how many rounds the parts of other programs are loaded, and whether a loop does it.

    A round ends where an instruction reads what one of its loads gave.
    """
    loads = [index for index, line in enumerate(code) if _PART.search(line)]
    rounds, waited, loaded = 0, True, set[int]()
    merge = code[loads[0] : loads[-1] + 1] if loads else []
    for line in merge:
        part = _PART.search(line)
        read = line[part.end() :] if part else line
        registers = [(int(number), bool(pair)) for number, pair in _REGISTER.findall(read)]
        if any({number, number + pair} & loaded for number, pair in registers):
            waited, loaded = True, set()
        if part:
            rounds, waited = rounds + waited, False
            loaded |= set(range(int(part[2]), int(part[2]) + int(part[1] or 32) // 32))
    return rounds, any(line.startswith(".L_") for line in merge)


def _tool(name: str, option: str, binary: Any) -> str:
    """What a tool that comes with Triton prints of a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout
