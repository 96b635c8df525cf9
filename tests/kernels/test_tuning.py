"""The table of launch configurations."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from trimkv_kernels.kernels import tuning


@dataclass(frozen=True)
class Config:
    rows: int
    num_warps: int


def choose(heads: int, slots: int) -> Config:
    return Config(heads * slots, 4)


def test_without_a_table_the_function_decides() -> None:
    assert tuning.tuned("kernel", torch.device("cpu"), choose, 3, 5) == Config(15, 4)


def test_an_entry_changes_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 80GB-x")
    path = tmp_path / "some_gpu_80gb_x.json"
    assert tuning.table_path("Some GPU 80GB-x") == path
    path.write_text(json.dumps({"kernel 4 1024": {"num_warps": 8}}))
    tuning.table.cache_clear()
    device = torch.device("cuda", 0)
    assert tuning.tuned("kernel", device, choose, 3, 1000) == Config(3000, 8)
    assert tuning.tuned("kernel", device, choose, 4, 513) == Config(2052, 8)
    assert tuning.tuned("kernel", device, choose, 4, 1025) == Config(4100, 4)
    assert tuning.tuned("other", device, choose, 4, 1024) == Config(4096, 4)
    tuning.table.cache_clear()


def test_a_device_without_a_table_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    tuning.table.cache_clear()
    assert tuning.tuned("kernel", torch.device("cuda", 0), choose, 1, 0) == Config(0, 4)
    tuning.table.cache_clear()


def test_shipped_tables_are_tables() -> None:
    for path in tuning.TABLES.glob("*.json"):
        for name, entry in json.loads(path.read_text()).items():
            kernel, *shape = name.split()
            assert name == tuning.entry_name(kernel, *map(int, shape)), path
            assert all(isinstance(number, int) for number in entry.values()), path
