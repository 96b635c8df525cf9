"""A pytest plugin: run every n-th test from the i-th on, as ``GPU_SHARD=i/n`` says."""

import os
from typing import Any

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    index, count = (int(number) for number in os.environ["GPU_SHARD"].split("/"))
    items[:] = items[index::count]
