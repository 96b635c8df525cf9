"""How contestants are registered, and what may be missing for them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimkv_kernels import kernels

from .case import Case
from .measure import Run

Build = Callable[[Any], Run]
Missing = Callable[[Case], str | None]

FLASH, CUDNN, EFFICIENT = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        name: As it stands in the results.
        case: The kind of case it computes.
        build: Prepares a run; not timed.
        when: Whether it is a sensible rival in a case at all.
        missing: Why it cannot run here, None if it can.
        slow: Compiled anew for each shape, which takes long: a part of its own has it.
    """

    name: str
    case: type[Case]
    build: Build
    when: Callable[[Any], bool]
    missing: Missing
    slow: bool


CONTESTANTS: list[Contestant] = []


def contestant(
    name: str,
    case: type[Case],
    *needs: Missing,
    when: Callable[[Any], bool] = lambda case: True,
    slow: bool = False,
) -> Callable[[Build], Build]:
    """Register a builder; ``needs`` tell what is missing here."""

    def missing(case: Case) -> str | None:
        return next(filter(None, (need(case) for need in needs)), None)

    def register(build: Build) -> Build:
        CONTESTANTS.append(Contestant(name, case, build, when, missing, slow))
        return build

    return register


def a_gpu(case: Case) -> str | None:
    """A need: compiled for GPUs only."""
    return None if case.device.type == "cuda" else "needs a GPU"


def module(name: str) -> Missing:
    """A need: a package that imports, with everything it imports."""

    def missing(case: Case) -> str | None:
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"{name} does not import: {type(error).__name__}"
        return None

    return missing


def op(name: str) -> Missing:
    """A need: one of our ops, which this revision may not have."""

    def missing(case: Case) -> str | None:
        found = callable(getattr(kernels, name, None))
        return None if found else f"this revision has no {name}"

    return missing


def compiled(function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """``torch.compile`` for static shapes, which never falls back; on a CPU the function itself."""
    if case.device.type != "cuda":
        return function
    torch.compiler.reset()  # else the shapes of earlier cases count against the recompile limit
    return torch.compile(function, dynamic=False, fullgraph=True)


def backend(case: Case, *backends: SDPBackend) -> contextlib.AbstractContextManager[None]:
    """Force SDPA's backend; a CPU has its own."""
    return sdpa_kernel(list(backends)) if case.device.type == "cuda" else contextlib.nullcontext()


def against_flex(case: Any) -> bool:
    return bool(case.against_flex)
