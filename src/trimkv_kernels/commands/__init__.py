"""The commands of ``trimkv-kernels``: one module each, named as the command is, found by itself.

A module's docstring is the command's help. It defines ``add_arguments(parser)``, and
``run(options)``, which may return an exit status. Importing it is cheap: what takes transformers is
imported in ``run``. A leading underscore marks what commands share.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Protocol, cast


class Command(Protocol):
    """What a module of this folder is."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, options: argparse.Namespace) -> int | None:
        """Do it. Errors that a user can mend are ValueError, TypeError, OSError and the like.

        Returns:
            The exit status; None is 0.
        """


def find_commands() -> dict[str, Command]:
    """All commands, by name."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return {
        name: cast(Command, importlib.import_module(f"{__name__}.{name}"))
        for name in names
        if not name.startswith("_")
    }
