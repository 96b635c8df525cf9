"""The pages: their code runs and prints what they say, their links and tables are right."""

import dataclasses
import doctest
import importlib
import io
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import trimkv_kernels as tk
from trimkv_kernels.policies import example_policy, registry
from trimkv_kernels.policies.allocation import Uniform
from trimkv_kernels.testing import embedded_model, example_shape
from trimkv_kernels.testing.conformance import RULES

ROOT = Path(__file__).parent.parent
POLICIES_PAGE = (ROOT / "docs" / "policies.md").read_text()
WRITING_PAGE = (ROOT / "docs" / "write-a-policy.md").read_text()
API_PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md"))}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
PUBLIC_MODULES = (
    "trimkv_kernels",
    *("trimkv_kernels." + name for name in ("evaluation", "gates", "inspection", "integrations")),
    *("trimkv_kernels." + name for name in ("kernels", "policies", "testing", "training")),
)
# They import Triton, lm-eval and vLLM.
OPTIONAL = (
    "._triton",
    ".lm_eval",
    *(f".vllm.{x}" for x in ("checks", "layer", "metadata", "models")),
)
SHAPE = example_shape()
POLICIES = {
    name: policy
    for name in tk.available_policies()
    # tests and examples register policies of their own
    if type(policy := example_policy(name, SHAPE)).__module__.startswith("trimkv_kernels.")
}
BASELINES = {"full", "random"}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages register is gone afterwards: other tests run over all policies."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


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


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_quickstart_prints_what_it_says() -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    said = []
    page = (ROOT / "docs" / "quickstart.md").read_text()
    for language, block in re.findall(r"```(python|text)\n(.*?)```", page, re.DOTALL):
        if language == "text":
            said.append(block)
            continue
        with redirect_stdout(printed):
            exec(block, names)
    assert printed.getvalue() == "".join(said)


@pytest.mark.parametrize("name", API_PAGES)
def test_api_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in (*python_blocks(API_PAGES["index"]), *python_blocks(API_PAGES[name])):
        exec(block, names)


def test_every_public_name_has_an_api_entry_and_an_example() -> None:
    entries = {
        name.rsplit(".", 1)[-1]: page
        for page in API_PAGES.values()
        for name in re.findall(r"^\.\. auto(?!module)\w+:: (\S+)", page, re.MULTILINE)
    }
    for module in PUBLIC_MODULES:
        for name in importlib.import_module(module).__all__:
            assert name in entries, f"{module}.{name} is on no page of docs/api"
            code = "\n".join(python_blocks(entries[name]))
            assert re.search(rf"\b{name}\b", code), f"no example uses {module}.{name}"


def test_examples_in_docstrings_run() -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for found in pkgutil.walk_packages(tk.__path__, "trimkv_kernels."):
        if any(found.name.endswith(name) or f"{name}." in found.name for name in OPTIONAL):
            continue
        for example in finder.find(importlib.import_module(found.name)):
            runner.run(example)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles]
            assert heading in anchors, f"{page.name} links to {link}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_shows_what_its_command_prints() -> None:
    readme = (ROOT / "README.md").read_text()
    ((arguments, table),) = re.findall(
        r'`make demo ARGS="([^"]*)"` prints.*?```\n(.*?)```', readme, re.DOTALL
    )
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", *arguments.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    shown, printed = (
        [line.split() for line in text.strip().splitlines()] for text in (table, done.stdout)
    )
    assert len(shown) == len(printed)
    for ours, theirs in zip(shown, printed, strict=True):
        is_row = "%" in "".join(ours)  # its last cell is a speed
        assert (ours[:-1] if is_row else ours) == (theirs[:-1] if is_row else theirs)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert tk.__version__ == project["version"] == newest == cited


def test_the_page_on_writing_policies_runs() -> None:
    model, _ = embedded_model()
    blocks = python_blocks(WRITING_PAGE)
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


def test_the_serving_table_is_what_was_measured() -> None:
    results = ROOT / "benchmarks" / "results" / "cpu_serving.json"
    command = [sys.executable, ROOT / "benchmarks" / "serving.py", "--table", results]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "serving.md").read_text()
    assert all(table in page for table in done.stdout.strip().split("\n\n"))


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


def test_the_comparison_of_smollm2_is_what_was_measured() -> None:
    """Every figure of the essay that later tables show, beside its policy."""
    record = ROOT / "benchmarks" / "results" / "smollm2.json"
    cells = json.loads(record.read_text())["cells"]
    page = (ROOT / "docs" / "comparison.md").read_text()
    shown = {
        ("kl", 2048): (section(page, "SmolLM2: budgets from 64 to 512"), "{:.3f}"),
        ("kl", 4000): (section(page, "SmolLM2: a longer text, and perplexity"), "{:.3f}"),
        ("perplexity", 2048): (section(page, "SmolLM2: a longer text, and perplexity"), "{:.2f}"),
        ("needle_single", 1000): (
            section(page, "SmolLM2: a number in a long text"),
            "{:.0f} of 10",
        ),
        ("needle_single", 2000): (section(page, "SmolLM2: a number in a long text"), "{:.0f} of 5"),
        ("agreement", 1000): (
            section(page, "SmolLM2: how long a continuation stays the same"),
            "{:.1%}",
        ),
    }
    shared = section(page, "SmolLM2: heads that share a budget")
    found = 0
    for cell in (x for x in cells if x["text"].startswith("avg.txt")):
        text, form = shown.get((cell["task"], cell["length"]), ("", ""))
        policy, _, allocation = cell["policy"].partition("+")
        if allocation in ("adaptive_heads", "layer_preference"):
            text = shared
        elif allocation:
            policy = cell["policy"]
        row = next((x for x in text.splitlines() if x.startswith(f"| `{policy}` |")), None)
        if row is not None:
            times = int(form.split()[-1]) if " of " in form else 1
            assert form.format(times * cell["figure"]) in row, cell
            found += 1
    assert found >= 75


def test_the_tables_of_smollm2_are_what_was_measured() -> None:
    records = ROOT / "benchmarks" / "results"
    cells = json.loads((records / "smollm2_kl.json").read_text())["cells"]
    measured = {(cell["policy"], cell["budget"]): cell for cell in cells}
    page = section((ROOT / "docs" / "results.md").read_text(), "A real language model")
    rows = re.findall(r"^\| \**`(\S+)`\** \| ([^|]+) \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == len({cell["policy"] for cell in cells}) - 1  # all but the full cache
    for policy, group, shown in rows:
        figures = [cell.strip() for cell in shown.split("|")]
        for budget, figure, size in zip((128, 256), figures[:2], figures[2:], strict=True):
            cell = measured[policy, budget]
            interval = f"({cell['low']:.3f} to {cell['high']:.3f})"
            assert figure == f"{cell['figure']:.3f} {interval}"
            assert (group, size) == (cell["group"], f"{cell['kv_bytes'] / 1e6:.1f}")
