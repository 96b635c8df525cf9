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

# Google docstrings; shapes and dtypes stand in their text, types in the signatures.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
python_maximum_signature_line_length = 88

# A link to a page or a heading that is not there is a warning, and `make docs` makes it an error.
# So is a name in a docstring, except of other packages and of what has no page of its own.
nitpicky = False
