"""A release: built, checked, installed into an empty environment and used from another folder."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import trimkv_kernels as tk

ROOT = Path(__file__).parents[1]
ONE_LINER = """
import torch
from transformers import AutoModelForCausalLM
import trimkv_kernels as tk
from trimkv_kernels.embedded import EMBEDDED_MODEL

model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
handle = tk.patch(model)
output = model.generate(torch.arange(3, 203)[None], max_new_tokens=8, eos_token_id=None)
print(tk.__file__, handle.policy.name, output.shape[1])
"""

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder)
    return folder


def test_the_files_are_complete_and_checked(dist: Path) -> None:
    wheel, sdist = f"trimkv_kernels-{tk.__version__}-py3-none-any.whl", f"{tk.__version__}.tar.gz"
    assert {path.name for path in dist.iterdir()} == {wheel, f"trimkv_kernels-{sdist}"}
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    source = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(dist / wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    assert packed == source
    with tarfile.open(dist / f"trimkv_kernels-{sdist}") as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= names
    assert {f"src/{name}" for name in source} <= names


def test_the_wheel_works_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*install, "--constraint", ROOT / "constraints.txt", wheel)
    where, policy, length = run(python, "-c", ONE_LINER, cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path)
    assert (policy, length) == ("trimkv", "208")
    command = tmp_path / "env" / "bin" / "trimkv-kernels"
    assert run(command, "--version", cwd=tmp_path) == f"trimkv-kernels {tk.__version__}\n"
    (sdist,) = dist.glob("*.tar.gz")
    run(*install, "--no-deps", "--force-reinstall", sdist)
    assert run(command, "--version", cwd=tmp_path) == f"trimkv-kernels {tk.__version__}\n"
