"""Compile the kernels of a cache for GPUs that are not here, and bound what they take."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import offline
import pytest
import torch

import trimkv_kernels
from trimkv_kernels.kernels import Decay, Pages, Rope, Slots

# Registers per thread on NVIDIA targets.
REGISTERS = {
    "append bf16 64": 136,
    "append bf16 128": 128,
    "append bf16 256": 144,  # its shared memory leaves room for as many programs as up to 168
    "append fp16 128 one split": 128,
    "append fp32 128": 96,
    "decode bf16 128": 128,
    "evict 513 - 1": 64,
    "evict 640 - 128": 64,
    "evict 4224 - 128": 128,
    "move field": 64,
    "extend bf16 128": 255,
    "extend bf16 128 lse": 255,
    "extend bf16 128 split": 200,
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
    "ragged bf16 128": 208,
    "ragged fp16 64": 208,
    "shared score": 64,
    "shared share": 64,
    "shared count": 64,
    "shared cut": 96,
    "shared move field": 64,
    "append bf16 128 rows": 128,
    "evict 640 - 128 rows": 80,
    "move field rows": 64,
    "pages score": 64,
    "pages score new": 64,
    "pages sure": 64,
    "pages share": 64,
    "pages count": 64,
    "pages cut": 128,
    "pages move field": 64,
    "pages place bf16 128": 64,
    "pages place field": 64,
    "append bf16 64 rope": 136,
    "append bf16 128 norm rope gate": 128,
    "ragged bf16 128 norm rope gate": 255,  # as many blocks as with 208
}
# Bytes of scratch per thread on AMD.
AMD_STACK = dict.fromkeys(REGISTERS, 0) | {
    "evict 4224 - 128": 128,
    "extend bf16 128": 64,
    "extend bf16 128 lse": 64,
    "extend bf16 128 split": 64,
    "column mass bf16 128": 384,
    "column mass bf16 128 window": 384,
}
# What Triton 3.6 takes beyond that, as compiled. Column mass spills 80 bytes there, on sm_100.
REGISTERS_OF_3_6 = {
    **dict.fromkeys(("append bf16 64", "append bf16 128", "append bf16 128 mass"), 144),
    **dict.fromkeys(("append bf16 128 rows", "append bf16 128 mass per head"), 144),
    "decode bf16 128": 144,
    "decode bf16 128 mass": 152,
    "append bf16 256": 168,
    "append bf16 128 norm rope gate": 144,
    "extend bf16 128 split": 255,
    "column mass bf16 128": 255,
    "column mass bf16 128 below": 232,
    "column mass bf16 128 window": 208,
    "pages sure": 96,
    **dict.fromkeys(
        ("ragged bf16 128", "ragged bf16 128 norm rope gate"), 255
    ),  # two blocks share a multiprocessor, as with 208
    "shared cut": 120,
}
STACK_OF_3_6 = {"column mass bf16 128": 80}
AMD_STACK_OF_3_6 = {"evict 4224 - 128": 256}
AMD_REGISTERS_OF_3_6 = {"ragged bf16 128 norm rope gate": 272}
MAJOR = {"sm_80": 8, "sm_90": 9, "sm_100": 10, offline.AMD: 8}


def test_the_table_names_every_kernel() -> None:
    from test_compile_training import REGISTERS as TRAINING

    folder = Path(trimkv_kernels.__file__).parent / "kernels" / "_triton"
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    functions = set(re.findall(r"^def (\w+_kernel)\(", source, re.M))
    table = offline.TABLE.search(offline.DOCS.read_text(encoding="utf-8"))[0]
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M)
    assert functions
    assert {function for function, _ in lines} == functions
    assert [launch for _, launch in lines] == [*REGISTERS, *TRAINING]


@pytest.mark.slow
def test_kernels_fit_every_gpu() -> None:
    triton = pytest.importorskip("triton")
    rows = offline.compiled(__file__)
    if triton.__version__.startswith("3.6."):
        registers, amd_stack = REGISTERS | REGISTERS_OF_3_6, AMD_STACK | AMD_STACK_OF_3_6
        offline.check(rows, registers, amd_stack, STACK_OF_3_6, AMD_REGISTERS_OF_3_6)
    else:
        offline.check(rows, REGISTERS, AMD_STACK)
    offline.check_table(rows, REGISTERS)
    for row in rows:
        if row.target == offline.AMD:
            continue
        if row.kernel.startswith(("append", "ragged")):
            assert row.pipelined, row
            # nothing but the counts and the query is waited for before the slots are read
            assert row.barriers_before_copy == 0, row
            if "mass" not in row.kernel:
                assert row.merge_rounds <= 3, row
                assert not row.merge_loops, row
        if row.kernel.startswith("append"):
            assert row.atomics == (0 if "one split" in row.kernel else 1), row
            if row.atomics and "mass" not in row.kernel:
                assert row.merge_rounds >= 1, row
        if row.kernel.startswith(("evict", "move field", "shared")):
            # of a head that is not full: whether it is, and where it lies
            assert row.loads_before_leaving <= 3, row
        if row.kernel.startswith(("evict", "select")):
            assert row.fused == 0, row  # the product is rounded before the sum


def launches_of(target: str) -> list[offline.Launch]:
    """Run the launch code of each op on meta tensors."""
    decode = importlib.import_module("trimkv_kernels.kernels.ops.decode_attention")
    evict = importlib.import_module("trimkv_kernels.kernels.ops.evict")
    extension = importlib.import_module("trimkv_kernels.kernels.ops.extend_attention")
    extension.compute_capability = lambda device: MAJOR[target]
    extension.num_multiprocessors = lambda device: 132
    fill = importlib.import_module("trimkv_kernels.kernels.ops.fill_slots")
    column = importlib.import_module("trimkv_kernels.kernels.ops.column_mass")
    ragged = importlib.import_module("trimkv_kernels.kernels.ops.ragged_attention")
    launches = offline.record(
        *("decode_attention", "evict", "extend_attention", "fill_slots", "column_mass"),
        *("ragged_attention", "shared_evict", "fill_pages"),
    )
    shared = importlib.import_module("trimkv_kernels.kernels.ops.shared_evict")
    pages_of = importlib.import_module("trimkv_kernels.kernels.ops.fill_pages")
    ragged.is_amd = lambda: target == offline.AMD
    ragged.num_multiprocessors = lambda device: 132
    decode.is_amd = lambda: target == offline.AMD
    decode.num_multiprocessors = lambda device: 132

    def number(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def real(*shape: int) -> torch.Tensor:
        return number(*shape, dtype=torch.float32)

    def slots_of(
        batch: int, num_slots: int, head_dim: int, dtype: torch.dtype, layers: int = 36
    ) -> Slots:
        slots = Slots.zeros(layers, batch, 8, num_slots, head_dim, dtype=dtype, device="meta")
        return replace(slots, nan_seen=number(layers))

    def append(
        dtype: torch.dtype,
        head_dim: int,
        batch: int = 1,
        mass: str | None = None,
        rows: torch.Tensor | None = None,
        rope: Rope | None = None,
        decay: Decay | None = None,
    ) -> None:
        new = (batch, 8)
        heads = (36, batch, 32 if mass == "none" else 8, 1152)
        shares = {}
        if mass is not None:
            shares = {"lse": real(batch, 32), "mass": real(*heads), "mass_reduce": mass}
        decode.append_attention.launch(
            number(batch, 32, head_dim, dtype=dtype),
            *(number(*new, head_dim, dtype=dtype) for _ in range(2)),
            slots_of(batch, 1152, head_dim, dtype, 36 if rows is None else 1), number(batch),
            layer=7, rows=rows, valid=number(batch, dtype=torch.bool), rope=rope, decay=decay,
            new_slope=real(*new) if decay is None else None,
            new_offset=real(*new) if decay is None else None,
            scale=0.1, mass_accumulate=mass is not None, **shares,
        )  # fmt: skip

    def append_pages(
        dtype: torch.dtype, head_dim: int, rope: Rope | None = None, decay: Decay | None = None
    ) -> None:
        new = (4, 8)
        pages = Pages.zeros(1, 4, 288, 1024, 128, head_dim, dtype=dtype, device="meta")
        ragged.ragged_append_attention.launch(
            number(4, 32, head_dim, dtype=dtype),
            *(number(*new, head_dim, dtype=dtype) for _ in range(2)),
            pages, number(4), layer=7, valid=number(4, dtype=torch.bool), rope=rope, decay=decay,
            new_slope=real(*new) if decay is None else None,
            new_offset=real(*new) if decay is None else None, scale=0.1,
        )  # fmt: skip

    def compact(
        num_slots: int, buffer: int, fields: bool = False, rows: torch.Tensor | None = None
    ) -> None:
        layers = 36 if rows is None else 1
        slots = slots_of(1, num_slots, 128, torch.bfloat16, layers)
        if fields:
            slots = replace(slots, fields=(real(layers, 1, 8, num_slots, 2),))
        evict.evict.launch(slots, number(1), buffer=buffer, rows=rows, sinks=4, recent=32)

    def choose(tokens: int, max_valid: int) -> None:
        new = (1, 8, tokens)
        slots = slots_of(1, 640, 128, torch.bfloat16)
        fill.fill_slots.launch(
            *(number(*new, 128, dtype=torch.bfloat16) for _ in range(2)), number(1, tokens),
            replace(slots, fields=(real(36, 1, 8, 640, 2),)), number(1), layer=7, buffer=128,
            new_slope=real(*new), new_offset=real(*new), valid=number(1, tokens, dtype=torch.bool),
            sinks=4, recent=32, new_fields=[real(*new, 2)], max_valid=max_valid,
        )  # fmt: skip

    def attend(**shares: object) -> None:
        query = number(1, 32, 128, dtype=torch.bfloat16)
        decode.decode_attention.launch(query, key, key, number(1, 8), scale=0.1, **shares)

    def extend(lse: torch.Tensor | None, tokens: int = 1024) -> None:
        query = number(1, 32, tokens, 128, dtype=torch.bfloat16)
        new = new_key[:, :, :tokens]
        extension.extend_attention.launch(
            query, new, new, key, key, number(1, 8), scale=0.1, lse=lse
        )

    def receive(queries: int, reduce: str, count_below: bool) -> None:
        column.column_mass.launch(
            number(1, 32, 1024, 128, dtype=torch.bfloat16), new_key, key, lse, number(1, 8),
            valid=number(1, 1024, dtype=torch.bool), scale=0.1, queries=queries, reduce=reduce,
            count_below=count_below,
        )  # fmt: skip

    key = number(1, 8, 1152, 128, dtype=torch.bfloat16)
    new_key = number(1, 8, 1024, 128, dtype=torch.bfloat16)
    lse = real(1, 32, 1024)
    append(torch.bfloat16, 64)
    append(torch.bfloat16, 128)
    append(torch.bfloat16, 256)
    append(torch.float16, 128, batch=64)
    append(torch.float32, 128)
    attend()
    compact(513, 1)
    compact(640, 128)
    compact(4224, 128)
    compact(640, 128, fields=True)
    del launches[-2]  # the eviction itself once more
    extend(None)
    extend(lse)
    extend(None, tokens=8)
    append(torch.bfloat16, 128, mass="sum")
    append(torch.float16, 128, batch=64, mass="max")
    attend(lse=real(1, 32), mass=real(1, 8, 1152), mass_reduce="mean")
    for queries in (1024, 32):
        receive(queries, "max", False)
    append(torch.bfloat16, 128, mass="none")
    for reduce in ("max", "none"):
        receive(1024, reduce, True)
    choose(300, 600)
    choose(32768, 0)
    del launches[-2:]  # the moves do not depend on the number of candidates
    append_pages(torch.bfloat16, 128)
    append_pages(torch.float16, 64)
    pages = Pages.zeros(
        1, 4, 288, 1024, 128, 128, dtype=torch.bfloat16, device="meta",
        fields=[((2,), torch.float32)],
    )  # fmt: skip
    shared.shared_evict.launch(
        pages, number(4), budget=1024, buffer=128, min_per_head=4, sinks=4, recent=32
    )
    append(torch.bfloat16, 128, rows=number(1))
    compact(640, 128, fields=True, rows=number(1))
    new = (4, 8, 300)
    pages_of.fill_pages.launch(
        *([number(*new, 128, dtype=torch.bfloat16)] for _ in range(2)), number(4, 300),
        pages, number(4), number(4), first_head=8, budget=1024, buffer=128,
        full=number(1, 4, dtype=torch.bool), min_per_head=4, threshold=-3.0, new_slope=[real(*new)],
        new_offset=[real(*new)], new_fields=[real(*new, 2)], valid=number(4, 300, dtype=torch.bool),
        sinks=4, recent=32,
    )  # fmt: skip
    turn, turn_64, weight = (number(*n, dtype=torch.bfloat16) for n in ((1, 128), (1, 64), (128,)))
    append(torch.bfloat16, 64, rope=Rope(turn_64, turn_64))
    gate = Decay(number(1, 8, dtype=torch.bfloat16), number(8, dtype=torch.bfloat16))
    append(torch.bfloat16, 128, rope=Rope(turn, turn, weight, weight, 1e-6), decay=gate)
    turns = turn.expand(4, -1)
    gates = Decay(number(4, 8, dtype=torch.bfloat16), gate.bias)
    append_pages(torch.bfloat16, 128, Rope(turns, turns, weight, weight, 1e-6), gates)
    return launches


if __name__ == "__main__":
    offline.main(launches_of, list(REGISTERS), AMD_STACK)
