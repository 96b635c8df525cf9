"""Write the table of supported models into the pages that have a place for it.

    python scripts/support_table.py

A page's place is what stands between the two marks; the table comes from the registry.
"""

from __future__ import annotations

import re
from pathlib import Path

from trimkv_kernels.integrations import INTEGRATIONS, support_table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "models.md",)
START, END = "<!-- supported models: scripts/support_table.py -->", "<!-- end -->"
PLACE = re.compile(f"(?<={re.escape(START)}\n).*?(?={re.escape(END)})", re.DOTALL)


def main() -> None:
    table = support_table(INTEGRATIONS) + "\n"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(PLACE.sub(lambda _: table, text), encoding="utf-8")


if __name__ == "__main__":
    main()
