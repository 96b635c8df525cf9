"""`benchmarks/real_model.py` on the small model: its table, and bytes that can be worked out."""

import re
import subprocess
import sys
from pathlib import Path

from trimkv_kernels.embedded import EMBEDDED_MODEL, make_recall_text

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "real_model.py"


def test_the_table(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(make_recall_text(400, seed=1).text)
    sizes = ["--tokens", "300", "--chunk", "16", "--budget", "32", "--buffer", "8"]
    command = [sys.executable, str(SCRIPT), "--model", str(EMBEDDED_MODEL), "--rounds", "2"]
    command += ["--steps", "5", *sizes, "--text-file", str(text)]
    command += ["--policies", "trimkv,key_norm+uniform"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = re.findall(r"^\| (.*) \| ([\d,]+) \| \d+ \| [\d.]+ \|$", done.stdout, re.MULTILINE)
    names = ["full cache", "trimkv, budget 32", "key_norm+uniform, budget 32"]
    assert [name for name, _ in rows] == names
    full, *bounded = (int(size.replace(",", "")) for _, size in rows)
    # 2 layers, 2 KV heads of 32, keys and values of 4 bytes, 300 tokens read and 10 written
    assert full == 2 * 2 * 32 * 2 * 4 * 310
    assert max(bounded) < full / 5
