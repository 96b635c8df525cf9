"""Run every policy at every budget and write what came out: `make compare`.

Writes benchmarks/results/compare.json, docs/images/compare.png and the tables of
docs/comparison.md; with --out compare.json, compare.png and compare.md into a folder of one's own.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import trimkv_kernels
from compare.contestants import contestants, left_out
from compare.measure import Protocol
from compare.report import Results, document, insert, plot, short_budgets
from compare.run import plan, run_all

ROOT = Path(__file__).parents[2]
QUICK = Protocol(budgets={256: (16, 32, 256)}, texts=2, questions=2, answer=8, continuation=16)


def main() -> None:
    arguments = parse_arguments()
    protocol = QUICK if arguments.quick else Protocol()
    start = time.perf_counter()
    protected = plan(protocol, arguments.policy)
    outcomes = run_all([*protected, *plan(unprotected(protocol), arguments.policy)], arguments.jobs)
    results = Results(protocol, outcomes[: len(protected)])
    bare = Results(unprotected(protocol), outcomes[len(protected) :])
    seconds = time.perf_counter() - start
    record = {
        **describe(),
        "seconds": round(seconds),
        "left_out": left_out(),
        "protected": {"protocol": asdict(protocol), "outcomes": outcomes_of(results)},
        "unprotected": {"protocol": asdict(bare.protocol), "outcomes": outcomes_of(bare)},
    }
    write(results, bare, record, arguments.out)
    print(f"{len(results.outcomes) + len(bare.outcomes)} runs in {seconds:.0f} s")


def unprotected(protocol: Protocol) -> Protocol:
    """The same with nothing that a policy may not evict, at the budgets of the short table."""
    budgets = {
        num_tokens: tuple(sorted({*protocol.bounding(num_tokens)} & {*short_budgets(num_tokens)}))
        for num_tokens in protocol.budgets
    }
    return replace(protocol, budgets=budgets, sinks=0, recent=0)


def outcomes_of(results: Results) -> list[dict[str, Any]]:
    """For the record."""
    return [asdict(outcome) for outcome in results.outcomes]


def describe() -> dict[str, Any]:
    """What ran, and on what."""
    return {
        "command": f"python -m compare {' '.join(sys.argv[1:])}".strip(),
        "trimkv_kernels": trimkv_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "machine": platform.machine(),
    }


def write(results: Results, bare: Results, record: dict[str, Any], out: Path | None) -> None:
    """Write the record, the plot and the tables to their places, or to a folder."""
    versions = f"torch {record['torch']}, transformers {record['transformers']}, CPU, float32"
    tables = document(results, bare, f"Written by `make compare` ({versions}).")
    if out is None:
        page = ROOT / "docs" / "comparison.md"
        page.write_text(insert(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        json_path, image = (
            ROOT / "benchmarks/results/compare.json",
            ROOT / "docs/images/compare.png",
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text(tables + "\n", encoding="utf-8")
        json_path, image = out / "compare.json", out / "compare.png"
    json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(results, image)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for all files, not the repository's own")
    parser.add_argument("--policy", nargs="+", metavar="NAME", help="only these; needs --out")
    parser.add_argument("--quick", action="store_true", help="two short texts; needs --out")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    arguments = parser.parse_args()
    if arguments.out is None and (arguments.quick or arguments.policy):
        parser.error(
            "--quick and --policy need --out: the repository's own files are of a full run"
        )
    known = list(contestants())
    if unknown := sorted(set(arguments.policy or ()) - set(known)):
        parser.error(f"--policy: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    arguments.policy = arguments.policy or known
    return arguments


if __name__ == "__main__":
    main()
