"""A pytest plugin that pretends there is a GPU: what the suite decides then, on a machine without.

It runs one case of every test that is marked ``gpu``, and writes what became of each to the file
that ``FAKE_GPU_REPORT`` names.
"""

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)
torch.cuda.is_available = lambda: True

_OUTCOMES: dict[str, str] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    first = {item.nodeid.split("[")[0]: item for item in reversed(items)}
    items[:] = [item for item in items if item is first[item.nodeid.split("[")[0]]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    error = call.excinfo
    if error is not None or call.when == "call":
        outcome = "passed" if error is None else f"{error.typename}: {error.value}"
        _OUTCOMES.setdefault(item.nodeid, outcome)
    return (yield)


def pytest_sessionfinish() -> None:
    Path(os.environ["FAKE_GPU_REPORT"]).write_text(json.dumps(_OUTCOMES))
