"""Tasks of ``trimkv-kernels evaluate``, one file each. Every module of this folder is imported."""

from __future__ import annotations

import importlib
import pkgutil

from trimkv_kernels.evaluation.tasks.base import (
    AnswerTask,
    Case,
    Material,
    Task,
    available_tasks,
    make_task,
    register_task,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AnswerTask",
    "Case",
    "Material",
    "Task",
    "available_tasks",
    "make_task",
    "register_task",
]
