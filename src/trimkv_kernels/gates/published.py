"""Find the retention gates of a base model."""

from __future__ import annotations

import json
from pathlib import Path

from trimkv_kernels.gates.checkpoint import WEIGHTS_NAME, checkpoint_folder

SHIPPED_FOLDER = "retention_gates"  # inside the folder of a base model

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# In the folder of a model that we unpacked: its hub id, under "base_model".
UNPACKED_NAME = "trimkv_unpacked.json"
# Gates in this package, for base models that are not in it.
SHIPPED = {SMOLLM2: Path(__file__).parent / "shipped" / "smollm2-135m-instruct"}

# From the model table of github.com/ngocbh/trimkv, for the families we can patch.
PUBLISHED = {
    "Qwen/Qwen3-1.7B": "ngocbh/TrimKV-Qwen3-1.7B-Math",
    "Qwen/Qwen3-4B": "ngocbh/TrimKV-Qwen3-4B-Math",
    "Qwen/Qwen3-8B": "ngocbh/TrimKV-Qwen3-8B-Math",
    "Qwen/Qwen3-14B": "ngocbh/TrimKV-Qwen3-14B-Math",
    "Qwen/Qwen3-4B-Instruct-2507": "ngocbh/TrimKV-Qwen3-4B-Instruct-2507",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "ngocbh/TrimKV-DeepSeek-R1-Distill-Llama-8B",
    "microsoft/Phi-3-mini-128k-instruct": "ngocbh/TrimKV-Phi-3-mini-128k-instruct",
}


def find_gates(base: str) -> str | None:
    """A folder with gates for ``base`` that is on this machine already, or None.

    Args:
        base: The base model's hub id, or its folder, which may have a folder ``retention_gates``.
            If we unpacked the folder, it also names a hub id to search for.
    """
    beside = Path(base) / SHIPPED_FOLDER
    if (beside / WEIGHTS_NAME).is_file():
        return str(beside)
    shipped = SHIPPED.get(_base_id(base))
    if shipped is not None:
        return str(shipped)
    published = PUBLISHED.get(base)
    if published is None:
        return None
    try:
        return str(checkpoint_folder(published, local_files_only=True))
    except ValueError:
        return None


def _base_id(base: str) -> str:
    """The hub id of a base model, for a folder that names it; else ``base``."""
    try:
        unpacked = json.loads((Path(base) / UNPACKED_NAME).read_text("utf-8"))
        return str(unpacked["base_model"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return base
