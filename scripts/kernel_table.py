"""Compile every kernel for every GPU, without one, and write what it takes into docs/kernels.md.

make kernel-table        # about four minutes on two cores
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests" / "kernels"
sys.path.insert(0, str(TESTS))

import offline  # noqa: E402
import test_compile_offline  # noqa: E402
import test_compile_training  # noqa: E402
import triton  # noqa: E402


def main() -> None:
    targets = (*offline.NVIDIA, offline.AMD)
    lines = [
        f"Triton {triton.__version__}. Registers of a thread / its bytes spilled to memory / KiB "
        "of shared memory of a program:",
        "",
        "| kernel | launch | " + " | ".join(targets) + " |",
        "|---" * (2 + len(targets)) + "|",
    ]
    for module in (test_compile_offline, test_compile_training):
        rows = offline.compiled(module.__file__)
        lines += offline.table_lines(rows, module.REGISTERS)
    page = offline.DOCS.read_text(encoding="utf-8")
    table = "\n" + "\n".join(lines) + "\n\n"
    offline.DOCS.write_text(offline.TABLE.sub(lambda _: table, page), encoding="utf-8")


if __name__ == "__main__":
    main()
