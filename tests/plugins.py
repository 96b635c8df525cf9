"""Packages that bring policies, installed into a folder as pip lays them out."""

from pathlib import Path

POLICY = """
import torch
from dataclasses import dataclass
from trimkv_kernels import Needs, RetentionPolicy, SlotView


@dataclass(frozen=True)
class {name}(RetentionPolicy):
    needs = Needs(score=("value",))

    def score(self, slots: SlotView) -> torch.Tensor:
        return {score}
"""
GOOD = "slots.value.float().norm(dim=-1)"
BAD = "torch.rand_like(slots.value[..., 0].float())"


def install(folder: Path, package: str, code: str, policies: dict[str, str]) -> None:
    """Install a package.

    Args:
        folder: A folder of ``sys.path``.
        package: Its name.
        code: Of its one module, ``{package}.policies``.
        policies: Class in that module, by the name it goes by.
    """
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "policies.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {package}.policies:{cls}" for name, cls in policies.items()]
    (info / "entry_points.txt").write_text("\n".join(["[trimkv_kernels.policies]", *lines, ""]))
