"""Policies by name: ours, and policies of other installed packages.

A package offers policies through the entry point group ``trimkv_kernels.policies``::

    [project.entry-points."trimkv_kernels.policies"]
    my_policy = "my_package.policies:MyPolicy"

It is imported when all names are listed, or when a name is looked up that is not one of ours. If a
policy cannot be loaded, this is reported with its name, and the others work.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from trimkv_kernels.policies.base import ModelShape, RetentionPolicy
from trimkv_kernels.suggestions import did_you_mean

logger = logging.getLogger("trimkv_kernels")

ENTRY_POINTS = "trimkv_kernels.policies"

Policy = TypeVar("Policy", bound=type[RetentionPolicy])

_REGISTRY: dict[str, type[RetentionPolicy]] = {}


def register_policy(name: str) -> Callable[[Policy], Policy]:
    """Class decorator: make a policy available by name.

    Raises:
        ValueError: another class already has this name.
        TypeError: the class is not a :class:`RetentionPolicy`.
    """

    def register(cls: Policy) -> Policy:
        if not (inspect.isclass(cls) and issubclass(cls, RetentionPolicy)):
            raise TypeError(f"register_policy({name!r}) must decorate a RetentionPolicy, got {cls}")
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"policy name {name!r} is already taken by {known.__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def available_policies() -> tuple[str, ...]:
    """Names of all registered policies, sorted, including other installed packages'."""
    _plugins.load()
    return tuple(sorted(_REGISTRY))


def make_policy(name: str, **options: Any) -> RetentionPolicy:
    """The policy registered as ``name``, built with ``options``.

    Raises:
        ValueError: the name is unknown, and the message lists the known ones; or the installed
            package that offers it could not be loaded, and the message says why.
    """
    return policy_class(name)(**options)


def example_policy(name: str, shape: ModelShape) -> RetentionPolicy:
    """The policy registered as ``name``, as its own :meth:`RetentionPolicy.example` makes it.

    Raises:
        ValueError: as :func:`make_policy`.
    """
    return policy_class(name).example(shape)


def policy_class(name: str) -> type[RetentionPolicy]:
    """The class that is registered as ``name``.

    Raises:
        ValueError: as :func:`make_policy`.
    """
    if name not in _REGISTRY:
        _plugins.load()
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name in _plugins.broken:
        raise ValueError(_plugins.broken[name])
    known = available_policies()
    raise ValueError(
        f"unknown policy {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}"
    )


class _Plugins:
    """The policies of other installed packages.

    Attributes:
        broken: By name, why a policy could not be loaded.
    """

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self._is_loaded = False
        self._lock = threading.RLock()  # a package that is being loaded may look up names itself

    def load(self) -> None:
        """Find and load them, the first time."""
        with self._lock:
            if self._is_loaded:
                return
            self._is_loaded = True
            for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda x: (x.name, x.value)):
                before = dict(_REGISTRY)
                try:
                    _load(point)
                    _check_untouched(before)
                except Exception as error:  # foreign code can raise anything
                    _REGISTRY.clear()
                    _REGISTRY.update(before)
                    self._report(point, error)

    def _report(self, point: EntryPoint, error: Exception) -> None:
        package = point.dist.name if point.dist is not None else "an unnamed package"
        message = (
            f"policy {point.name!r} of the installed package {package} ({point.value}) cannot be "
            f"loaded: {type(error).__name__}: {error}"
        )
        self.broken[point.name] = message
        logger.warning("%s. The other policies work", message)


_plugins = _Plugins()


def _load(point: EntryPoint) -> None:
    """Register the class of an entry point, unless its own module has done so.

    Raises:
        ValueError: the name is taken, or the class has registered itself under another one.
        TypeError: it is not a policy class.
    """
    cls = point.load()
    if not (inspect.isclass(cls) and issubclass(cls, RetentionPolicy)):
        raise TypeError(f"it must be a RetentionPolicy class, got {cls!r}")
    if cls.name != point.name and _REGISTRY.get(cls.name) is cls:
        raise ValueError(
            f"it is registered as {cls.name!r}: the entry point must have the same name"
        )
    known = _REGISTRY.setdefault(point.name, cls)
    if known is not cls:
        raise ValueError(f"the name is already taken by {known.__module__}.{known.__qualname__}")
    cls.name = point.name


def _check_untouched(before: dict[str, type[RetentionPolicy]]) -> None:
    """Raise if a name now stands for another class than before.

    Raises:
        ValueError: names it.
    """
    for name, cls in before.items():
        if _REGISTRY.get(name) is not cls:
            raise ValueError(f"it replaces the policy {name!r} of {cls.__module__}")
