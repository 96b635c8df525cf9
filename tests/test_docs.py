"""The pages under docs/ and the example of a policy: their code runs, their tables are right."""

import dataclasses
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import trimkv_kernels as tk
from trimkv_kernels.policies import example_policy
from trimkv_kernels.policies.allocation import Uniform
from trimkv_kernels.testing import embedded_model, example_shape
from trimkv_kernels.testing.conformance import RULES

ROOT = Path(__file__).parent.parent
POLICIES_PAGE = (ROOT / "docs" / "policies.md").read_text()
WRITING_PAGE = (ROOT / "docs" / "write-a-policy.md").read_text()
SHAPE = example_shape()
POLICIES = {
    name: policy
    for name in tk.available_policies()
    # tests and examples register policies of their own
    if type(policy := example_policy(name, SHAPE)).__module__.startswith("trimkv_kernels.")
}
BASELINES = {"full", "random"}


def section(page: str, title: str) -> str:
    """What stands under a heading of the second level."""
    pattern = rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)"
    (found,) = re.findall(pattern, page, re.DOTALL | re.MULTILINE)
    return found


def table(text: str) -> dict[str, list[str]]:
    """Cells of each row by the row's name, of rows that begin with one in backticks."""
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    names = [row[0].strip("`") for row in cells]
    assert len(set(names)) == len(names)
    return {name: row[1:] for name, row in zip(names, cells, strict=True)}


SCORES = table(section(POLICIES_PAGE, "What they keep"))
OPTIONS = table(section(POLICIES_PAGE, "Options, and what differs from the authors' code"))


def test_the_page_on_writing_policies_runs() -> None:
    model, _ = embedded_model()
    blocks = re.findall(r"```python\n(.*?)```", WRITING_PAGE, re.DOTALL)
    assert len(blocks) >= 10
    names = {"model": model, "tk": tk}
    with torch.no_grad():
        for block in blocks:
            exec(block, names)


def test_the_page_on_writing_policies_lists_every_rule() -> None:
    assert list(table(section(WRITING_PAGE, "check_policy"))) == list(RULES)


def test_every_row_is_of_a_policy() -> None:
    readme = (ROOT / "README.md").read_text()
    assert set(SCORES) <= set(POLICIES)
    assert set(OPTIONS) == set(SCORES)
    assert set(table(section(POLICIES_PAGE, "Cost"))) <= set(SCORES)
    assert set(SCORES) <= set(re.findall(r"`(\w+)`", readme[readme.index("### Policies") :]))
    if missing := set(POLICIES) - set(SCORES):  # a policy is one new file: its row may follow
        warnings.warn(f"docs/policies.md has no rows of {sorted(missing)}", stacklevel=1)


@pytest.mark.parametrize("name", SCORES)
def test_paper(name: str) -> None:
    paper = SCORES[name][0]
    if name in BASELINES:
        assert paper == "baseline"
    else:
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}", paper)
        assert paper in " ".join((type(POLICIES[name]).__doc__ or "").split())


@pytest.mark.parametrize("name", SCORES)
def test_kind_bytes_and_protection(name: str) -> None:
    policy = POLICIES[name].bind(SHAPE)
    _, _, needs, per_slot, sinks, recent = SCORES[name]
    kind = needs.split(":")[0]
    assert (kind == "affine") == policy.is_affine
    if not kind.startswith("the base's"):
        observed = policy.needs.attention is not None
        assert kind == ("affine" if policy.is_affine else "observed" if observed else "recomputed")
    assert int(per_slot) == bytes_per_slot(policy)
    assert int(sinks) == policy.sinks
    assert recent == ("auto" if policy.recent is None else str(policy.recent))


def bytes_per_slot(policy: tk.RetentionPolicy) -> float:
    """What each slot of a cache holds beside key and value."""

    def held(budget: int) -> int:
        cache = tk.BoundedKVCache(
            policy,
            num_layers=SHAPE.num_layers,
            num_heads=SHAPE.num_heads,
            num_kv_heads=SHAPE.num_kv_heads,
            head_dim=SHAPE.head_dim,
            batch_size=1,
            budget=budget,
            buffer=1,
            sinks=0,
            recent=0,
            allocation=Uniform(),
            dtype=torch.float32,
            device="cpu",
        )
        return cache.stats().bytes_held

    pairs = 2 * SHAPE.head_dim * 4
    return (held(101) - held(1)) / (100 * SHAPE.num_layers * SHAPE.num_kv_heads) - pairs


@pytest.mark.parametrize("name", SCORES)
def test_class_and_options(name: str) -> None:
    class_name, options, _ = OPTIONS[name]
    policy = type(POLICIES[name])
    assert class_name == f"`{policy.__name__}`"
    for option in dataclasses.fields(policy):
        assert f"`{option.name}`" in options
    assert (options == "none") == (not dataclasses.fields(policy))


def test_the_cost_table_is_what_was_measured() -> None:
    path = ROOT / "benchmarks" / "results" / "cpu_policy_cost.json"
    figures = json.loads(path.read_text())["ms"]
    for name, row in table(section(POLICIES_PAGE, "Cost")).items():
        measured = figures[name]
        assert row == [
            f"{measured['amortised']:.1f}",
            f"{measured['ratio']:.2f}",
            f"{measured['eviction']:.1f}",
            f"{measured['eviction_share']:.1%}",
        ]


def test_custom_policy_example() -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "examples" / "custom_policy.py"),
            *("--budget", "64", "--tokens", "400", "--texts", "1"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "large_values passes the conformance suite" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    share = {row[0]: float(row[2].rstrip("%")) for row in rows if len(row) == 4 and row[1] == "64"}
    assert share["large_values"] > max(share["streaming_llm"], share["random"])
