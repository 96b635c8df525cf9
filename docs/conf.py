"""The site: ``make docs`` builds it from the pages of this folder and from the docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

project = "trimkv-kernels"
author = "trimkv_kernels contributors"
release = re.findall(
    r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
)[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"{project} {release}"

# Google docstrings: shapes and dtypes are in their text, types in the signatures.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88

# `make docs` makes warnings errors: links to pages and headings, and names in docstrings. What
# belongs to other packages, or is not public, has no page to link to.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!trimkv_kernels\.).*"),
    ("py:.*", r"trimkv_kernels\.(cache\.(storage|clock)|embedded)\b.*"),
    ("py:.*", r"trimkv_kernels\.integrations\.(discovery|prompt_pins)\b.*"),
    ("py:.*", r"trimkv_kernels\.policies\.(base\.Policy|registry\.Policy|shares)\b.*"),
    ("py:.*", r"trimkv_kernels\.(loading\.ModelSource|kernels\.pages)\b.*"),
]
exclude_patterns = ["_build"]

# Links to these files work on GitHub; the site has a page of each.
PROJECT_PAGES = {
    "../benchmarks/README.md": "project/benchmarks.md",
    "../benchmarks/RUNBOOK.md": "project/RUNBOOK.md",
    "../CONTRIBUTING.md": "project/contributing.md",
    "../SECURITY.md": "project/security.md",
    "../CHANGELOG.md": "project/changelog.md",
}


def link_to_project_pages(app: Any, docname: str, source: list[str]) -> None:
    for file, page in PROJECT_PAGES.items():
        source[0] = source[0].replace(f"]({file})", f"]({page})")


def setup(app: Any) -> None:
    app.connect("source-read", link_to_project_pages)
