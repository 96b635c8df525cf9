"""Files and folders: where a checkpoint is, how its files are written, how tensors are read.

Files that belong together, such as weights and their config, are written all or nothing, even
if the process dies half way::

    with staged(folder) as staging:
        save_file(tensors, staging / "gates.safetensors")
        (staging / "config.json").write_text(config)

The new files are first written to a folder inside ``folder``. Then that folder is renamed to
``.trimkv-complete``. Before this step the old files count, after it the new ones. Last, each file
moves to its name. If a process dies during these moves, :func:`finish_write` does the rest. The
next write and every read through :func:`find_folder` call it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

COMPLETE = ".trimkv-complete"
Config = TypeVar("Config")

_SHOWN = 4


def find_folder(
    folder_or_hub_id: str | Path,
    *,
    files: Iterable[str],
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find the local folder of a checkpoint, fetching its files from the hub if needed.

    The hub path is untested. ``HF_HUB_OFFLINE`` and the other variables of ``huggingface_hub``
    are obeyed.

    Args:
        folder_or_hub_id: An existing folder, or ``"owner/name"`` on the hub;
            ``"owner/name/folder"`` is a folder of such a repository.
        files: Patterns of the files to fetch from the hub.
        revision: Branch, tag or commit on the hub.
        local_files_only: Look in the hub cache only.

    Returns:
        The folder; for a hub id, its snapshot in the hub cache.

    Raises:
        ValueError: there is neither such a folder nor such a repository, or ``revision`` is given
            with a folder.
    """
    path = Path(folder_or_hub_id)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision is for hub ids only, got {revision!r} with folder {path}")
        try:
            finish_write(path)
        except OSError as error:
            raise ValueError(
                f"{path} holds a write that was cut short, and this process cannot finish it "
                f"({error}): move the files of {path / COMPLETE} one folder up"
            ) from error
        return path
    if path.exists():
        raise ValueError(f"folder_or_hub_id must be a folder, got the file {path}")
    parts = str(folder_or_hub_id).split("/", 2)
    inside = parts[2] if len(parts) == 3 else ""
    try:
        snapshot = snapshot_download(
            "/".join(parts[:2]),
            revision=revision,
            allow_patterns=[f"{inside}/{file}" if inside else file for file in files],
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder_or_hub_id must be an existing folder or a hub id 'owner/name', got "
            f"{str(folder_or_hub_id)!r}: there is no such folder, and the hub says: {error}"
        ) from error
    return Path(snapshot, inside)


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to write files in. At the end the files move to ``folder``.

    Either all of them move or none, see the top of this module. If the block raises an error,
    ``folder`` does not change.

    Args:
        folder: Where the files go; made when missing.

    Raises:
        ValueError: ``folder`` is a file, or one of the files would replace a folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a directory, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    finish_write(folder)
    with tempfile.TemporaryDirectory(prefix=".trimkv-", dir=folder) as temporary:
        staging = Path(temporary, "files")
        staging.mkdir()
        yield staging
        written = sorted(staging.iterdir())
        for path in written:
            if (folder / path.name).is_dir():
                raise ValueError(f"{folder / path.name} must be a file, got a folder")
            _sync(path)
        if len(written) == 1:  # a rename is all or nothing by itself
            os.replace(written[0], folder / written[0].name)
            return
        complete = folder / COMPLETE
        staging.rename(complete)
        try:
            finish_write(folder)
        except BaseException:
            if len(list(complete.iterdir())) == len(written):  # no file has moved yet
                complete.rename(staging)
            raise


def write_files(folder: str | Path, files: Mapping[str, bytes | str]) -> None:
    """Write files of these names and contents, all or nothing, as :func:`staged` does.

    Args:
        folder: Where to write; made when missing.
        files: Contents by name; text is written as UTF-8.

    Raises:
        ValueError: as :func:`staged`.
    """
    with staged(folder) as staging:
        for name, contents in files.items():
            if isinstance(contents, str):
                Path(staging, name).write_text(contents, encoding="utf-8")
            else:
                Path(staging, name).write_bytes(contents)


def finish_write(folder: Path) -> None:
    """Finish a write that was cut short after all its files were complete."""
    complete = folder / COMPLETE
    if not complete.is_dir():
        return
    for path in sorted(complete.iterdir()):
        # another process may have moved the file already
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, folder / path.name)
    with contextlib.suppress(FileNotFoundError):
        complete.rmdir()


def _sync(path: Path) -> None:
    """Wait until the contents are on the disk, so that a rename cannot come before them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def to_json(data: Mapping[str, Any]) -> str:
    """The contents of a config file."""
    return json.dumps(data, indent=2) + "\n"


def read_config(path: Path, build: Callable[[dict[str, Any]], Config]) -> Config:
    """``build`` of the JSON object in a file.

    Raises:
        ValueError: the file is missing or not a JSON object, or ``build`` refuses it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got a {type(data).__name__}")
        return build(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or, by any other suffix, of a torch file, on the CPU.

    Raises:
        ValueError: the file is corrupt or holds more than a dict of tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}); fetch or save it again"
            ) from error
    tensors = read_torch(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise ValueError(
            f"{path} must hold a plain dict of tensors, got other objects; "
            "fetch it again, or convert it to safetensors"
        )
    return tensors


def read_torch(path: Path) -> Any:
    """The contents of a torch file, opened with ``weights_only=True``: nothing in it is executed.

    Raises:
        ValueError: it is corrupt or holds Python objects other than tensors.
    """
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a corrupt pickle can raise nearly anything
            raise ValueError(
                f"{path} is corrupt or holds Python objects other than tensors, which are never "
                "loaded; fetch it again, or convert it to safetensors"
            ) from error


def tensor_problems(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names and shapes that differ; an empty list if none do."""
    misshaped = (
        f"{name} (expected {list(tensor.shape)}, got {list(tensors[name].shape)})"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    )
    return [
        *listed("missing", (name for name in expected if name not in tensors)),
        *listed("unexpected", (name for name in tensors if name not in expected)),
        *listed("misshaped", misshaped),
    ]


def listed(what: str, items: Iterable[str]) -> list[str]:
    """``[]``, or one line that names the first of them."""
    found = list(items)
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what} {', '.join(found[:_SHOWN])}{more}"]
