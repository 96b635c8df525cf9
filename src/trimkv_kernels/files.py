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
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

COMPLETE = ".trimkv-complete"
Config = TypeVar("Config")

_SHOWN = 4
_LARGEST_CONFIG = 1 << 24  # bytes; the configs of the largest models have some thousands
_LONGEST_MESSAGE = 1000  # characters, where a file's own contents are repeated


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
    names = str(folder_or_hub_id).removesuffix("/").split("/")
    if not {"", ".", ".."}.isdisjoint(names):  # such a name could lead out of the hub cache
        raise ValueError(
            f"folder_or_hub_id must be an existing folder or a hub id 'owner/name', got "
            f"{str(folder_or_hub_id)!r}: there is no such folder"
        )
    inside = "/".join(names[2:])
    try:
        snapshot = snapshot_download(
            "/".join(names[:2]),
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
    """Finish a write that was cut short after all its files were complete.

    Raises:
        ValueError: what is there cannot be ours, so that nothing may be moved.
    """
    complete = folder / COMPLETE
    if complete.is_symlink():
        raise ValueError(
            f"{complete} must be a folder of an interrupted write, got a link: delete it"
        )
    if not complete.is_dir():
        return
    written = sorted(complete.iterdir())
    other = [path.name for path in written if path.is_symlink() or path.is_dir()]
    if other:
        raise ValueError(
            f"{complete} is of an interrupted write and must hold files only, got "
            f"{'; '.join(listed('folders or links', other))}: delete it"
        )
    for path in written:
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
        ValueError: the file is missing, too large or not a JSON object, or ``build`` refuses it.
    """
    try:
        if path.exists() and not path.is_file():  # to read a pipe would wait for ever
            raise ValueError("it must be a file")
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(
                f"a config has at most {_LARGEST_CONFIG} bytes, got {path.stat().st_size}"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got a {type(data).__name__}")
        return build(data)
    # `build` meets values of every type that JSON has
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {str(error)[:_LONGEST_MESSAGE]}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or, by any other suffix, of a torch file, on the CPU.

    Raises:
        ValueError: the file is missing, corrupt, or holds more than a dict of dense tensors.
    """
    if path.suffix == ".safetensors":
        _require_file(path)
        try:
            # copies: the file's own pages would change, or kill the process, if it is overwritten
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        except Exception as error:  # of a dtype that torch does not have, nearly anything
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
    check_dense(path, tensors)
    return tensors


def read_torch(path: Path) -> Any:
    """The contents of a torch file, opened with ``weights_only=True``: nothing in it is executed.

    Raises:
        ValueError: it is missing, corrupt, compressed or holds Python objects other than tensors.
    """
    _require_file(path)
    _refuse_compressed(path)
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a corrupt pickle can raise nearly anything
            raise ValueError(
                f"{path} is corrupt or holds Python objects other than tensors, which are never "
                "loaded; fetch it again, or convert it to safetensors"
            ) from error


def check_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors of a torch file have their numbers in memory.

    A file of some bytes can declare a tensor of any size, with a stride of 0.

    Raises:
        ValueError: names those that do not.
    """
    found = listed("others:", (name for name, x in tensors.items() if not _is_dense(x)))
    if found:
        raise ValueError(
            f"{path} must hold plain dense tensors, got {found[0]}; fetch it again, or convert it "
            "to safetensors"
        )


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} must be a file, and there is none")


def _refuse_compressed(path: Path) -> None:
    """Torch never compresses, and a small file that is compressed can fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # not an archive, or a broken one, as torch will say
        return
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} must not be compressed, as torch never does it; fetch it again")


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
