"""A ``custom_generate`` folder: transformers' way to ship a ``generate`` with the weights.

If this package is installed, a model loaded with ``trust_remote_code=True`` decodes bounded::

    write_custom_generate("my-model", policy="streaming_llm", budget=256)
    model = AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)
    model.generate(**inputs)
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from trimkv_kernels import __version__
from trimkv_kernels.files import write_files
from trimkv_kernels.integrations.discovery import find_handle
from trimkv_kernels.patching import patch
from trimkv_kernels.policies.registry import policy_class

FOLDER = "custom_generate"
_CODE = '''"""Decoding with a key/value cache of fixed size, by the package trimkv-kernels.

The first call patches the model; trimkv_kernels.unpatch(model) restores the stock generate().
"""

from trimkv_kernels.custom_generate import generate_bounded

OPTIONS = {options}  # of trimkv_kernels.patch()


def generate(*inputs, model, **arguments):
    return generate_bounded(model, OPTIONS, *inputs, **arguments)
'''


def write_custom_generate(
    folder: str | Path,
    *,
    policy: str | None = None,
    budget: int | None = None,
    buffer: int | None = None,
    prefill_chunk: int | None = None,
) -> Path:
    """Write ``custom_generate/`` into a model's folder, with the options of :func:`patch`.

    Args:
        folder: Folder of a model, or a folder for ``custom_generate/`` alone.
        policy: A registered name; None is what ``patch`` chooses when the model is used.
        budget: As in ``patch``.
        buffer: As in ``patch``.
        prefill_chunk: As in ``patch``.

    Returns:
        The folder that was written, with ``generate.py`` and ``requirements.txt``.

    Raises:
        ValueError: no such policy, a size is not an int of at least 1, or ``custom_generate`` is a
            link.
        OSError: the folder cannot be written.
    """
    options: dict[str, Any] = {
        "policy": policy, "budget": budget, "buffer": buffer, "prefill_chunk": prefill_chunk
    }  # fmt: skip
    if policy is not None:
        policy_class(policy)
    for name, size in options.items():
        if name != "policy" and size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
    given = {name: value for name, value in options.items() if value is not None}
    written = Path(folder) / FOLDER
    if written.is_symlink():  # of a downloaded model, it could lead anywhere
        raise ValueError(f"{written} must be a folder, got a link: delete it")
    write_files(
        written,
        {
            "generate.py": _CODE.format(options=json.dumps(given)),
            "requirements.txt": f"trimkv-kernels>={__version__}\n",
        },
    )
    return written


def generate_bounded(model: Any, options: dict[str, Any], *inputs: Any, **arguments: Any) -> Any:
    """Call ``generate`` of the patched model. The written ``generate.py`` calls this.

    Args:
        model: Patched with ``options`` unless it is patched already.
        options: Arguments of :func:`patch`.
        inputs: As ``generate`` takes them.
        arguments: As ``generate`` takes them.

    Raises:
        TypeError, ValueError: as :func:`patch`; the model is left as it was.
    """
    if find_handle(model) is None:
        replaced = model.__dict__.get("generate")
        by_transformers = (
            isinstance(replaced, functools.partial) and replaced.keywords.get("model") is model
        )
        if by_transformers:  # from_pretrained replaced generate by the folder's function
            del model.generate
        try:
            patch(model, **options)
        except BaseException:
            if by_transformers:
                model.generate = replaced
            raise
    return model.generate(*inputs, **arguments)
