"""The commands of ``trimkv-kernels``: one module each, with the name of the command.

A module's docstring is the command's help. It defines ``add_arguments(parser)``, and
``run(options)``, which may return an exit status. Importing it must be cheap, so code that needs
transformers is imported in ``run``. Modules with a leading underscore are shared by commands.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Protocol, cast


class Command(Protocol):
    """The interface of a module of this folder."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, options: argparse.Namespace) -> int | None:
        """Run the command. Errors that a user can fix are ValueError, TypeError, OSError and such.

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
