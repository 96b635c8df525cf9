"""What importing the package may and may not do; each case in a fresh process."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import trimkv_kernels


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_needs_neither_triton_nor_transformers() -> None:
    run(
        "import sys\n"
        "sys.modules['triton'] = sys.modules['transformers'] = None\n"  # importing them now fails
        "import torch, trimkv_kernels as tk\n"
        "from trimkv_kernels.policies import make_policy\n"
        "cache = tk.BoundedKVCache(make_policy('random'), num_layers=1, num_kv_heads=1, "
        "head_dim=16, batch_size=1, budget=8, buffer=2, sinks=0, recent=0, dtype=torch.float32, "
        "device='cpu')\n"
        "for _ in range(20):\n"
        "    x = torch.randn(1, 1, 1, 16)\n"
        "    cache.attend(0, x, x, x)\n"
        "    cache.evict()\n"
        "assert cache.stats().budget_reached\n"
    )


def test_import_touches_no_registry_of_transformers() -> None:
    run(
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A\n"
        "from transformers.models.qwen3 import modeling_qwen3 as q\n"
        "before = (dict(A), q.Qwen3Attention.forward, q.Qwen3Model.forward)\n"
        "import trimkv_kernels; trimkv_kernels.patch\n"
        "assert before == (dict(A), q.Qwen3Attention.forward, q.Qwen3Model.forward)\n"
    )


def test_public_names_exist() -> None:
    for name in trimkv_kernels.__all__:
        assert getattr(trimkv_kernels, name) is not None, name
    assert files("trimkv_kernels").joinpath("py.typed").is_file()


def test_no_file_is_too_long_to_read() -> None:
    lengths = {
        str(path.relative_to(Path(__file__).parents[1])): len(path.read_text().splitlines())
        for folder in ("src", "benchmarks")
        for path in (Path(__file__).parents[1] / folder).rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > 500} == {}
