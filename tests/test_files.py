"""Files that belong together are written all or nothing, whatever the moment a process dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trimkv_kernels.files import COMPLETE, find_folder, read_tensors, staged, write_files

OLD, NEW = {"config": "old", "weights": b"old"}, {"config": "new", "weights": b"new"}

# Writes NEW over OLD and dies, without any clean-up, at the n-th rename or write.
DYING = """
import os, sys
from pathlib import Path
from trimkv_kernels import files

left = int(sys.argv[2])

def dying(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(7)
        return real(*arguments, **options)
    return call

Path.write_text, Path.write_bytes = dying(Path.write_text), dying(Path.write_bytes)
Path.rename, os.replace = dying(Path.rename), dying(os.replace)
files.write_files(sys.argv[1], {"config": "new", "weights": b"new"})
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("steps", range(6))
def test_a_process_that_dies_leaves_the_old_files_or_the_new_ones(
    tmp_path: Path, steps: int
) -> None:
    write_files(tmp_path, OLD)
    done = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), str(steps)], check=False)
    assert done.returncode == (0 if steps == 5 else 7)
    assert find_folder(tmp_path, files=()) == tmp_path
    word = b"new" if steps > 2 else b"old"  # two writes, and the rename that decides
    assert contents(tmp_path) == {"config": word, "weights": word}
    assert not (tmp_path / COMPLETE).exists()


def test_the_next_write_finishes_the_one_before(tmp_path: Path) -> None:
    write_files(tmp_path, OLD)
    (tmp_path / COMPLETE).mkdir()
    (tmp_path / COMPLETE / "weights").write_bytes(b"new")
    write_files(tmp_path, {"third": "3"})
    assert contents(tmp_path) == {"config": b"old", "weights": b"new", "third": b"3"}


def test_an_error_on_the_way_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, OLD)
    with pytest.raises(FileNotFoundError), staged(tmp_path) as staging:
        (staging / "weights").write_bytes((tmp_path / "missing").read_bytes())
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken must be a file, got a folder"):
        write_files(tmp_path, {**NEW, "taken": ""})
    (tmp_path / "taken").rmdir()

    def fail(*paths: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    for files in (NEW, {"config": "new"}):
        with pytest.raises(OSError, match="disk full"):
            write_files(tmp_path, files)
    assert contents(tmp_path) == {"config": b"old", "weights": b"old"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_write_that_cannot_be_finished_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / COMPLETE).mkdir()
    (tmp_path / COMPLETE / "weights").write_bytes(b"new")

    def fail(*paths: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match=r"cut short.*read-only.*move the files of"):
        find_folder(tmp_path, files=())


def test_tensors_by_suffix(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        assert torch.equal(read_tensors(tmp_path / name)["a"], tensors["a"])
