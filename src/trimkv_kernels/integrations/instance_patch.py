"""Attributes set on single objects, and how to undo this."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any


class InstancePatch:
    """Changes to single objects, undone in reverse order by :meth:`restore`.

    Classes stay as they are. As a context manager it restores at the end, after an error too.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to restore."""
        return not self._undo

    def set(self, instance: object, name: str, value: Any) -> None:
        """Set an attribute of an object. On a module, it must not be a parameter or a module.

        If others have set it by the time of the restore, it stays theirs: a hook of accelerate that
        came or went in between.
        """
        self.keep(instance, name)
        vars(instance)[name] = value
        undo = self._undo[-1]
        self._undo[-1] = functools.partial(_undo_own, instance, name, value, undo)

    def keep(self, instance: object, name: str) -> None:
        """At the restore, set an attribute back to its present value."""
        attributes = vars(instance)
        # the instance, not its dict, so that a deep copy of a patched model restores itself
        if name in attributes:
            self._undo.append(functools.partial(_put_back, instance, name, attributes[name]))
        else:
            self._undo.append(functools.partial(_remove, instance, name))

    def on_restore(self, undo: Callable[[], object]) -> None:
        """Make :meth:`restore` call ``undo``, in its place among the changes."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Undo all changes, the last one first. An error does not stop it."""
        try:
            while self._undo:
                self._undo.pop()()
        finally:
            if self._undo:
                self.restore()

    def __enter__(self) -> InstancePatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def _undo_own(instance: object, name: str, value: Any, undo: Callable[[], object]) -> None:
    if vars(instance).get(name) is value:
        undo()


def _put_back(instance: object, name: str, value: Any) -> None:
    vars(instance)[name] = value


def _remove(instance: object, name: str) -> None:
    vars(instance).pop(name, None)
