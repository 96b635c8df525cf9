"""The command ``trimkv-kernels``: retention gates, and what a policy keeps and costs."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

import torch
from safetensors import SafetensorError

from trimkv_kernels import __version__
from trimkv_kernels.commands import find_commands
from trimkv_kernels.suggestions import did_you_mean

PROGRAM = "trimkv-kernels"
# Errors that a user's arguments, files or machine can cause. All others are our own faults.
_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    ImportError,
    SafetensorError,
    torch.OutOfMemoryError,
)
_INTERRUPTED = 130  # as in shells


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Of the command line; None is the process's own.

    Returns:
        The exit status: 0, or 1 after an error that names what to do, or what the command returns.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = find_commands()
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    choices = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {}
    for name, command in commands.items():
        summary, _, epilog = inspect.cleandoc(command.__doc__ or "").partition("\n")
        parsers[name] = choices.add_parser(name, help=summary, description=summary, epilog=epilog)
        command.add_arguments(parsers[name])
    # options before the command have no values
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    if named is not None and named not in commands:
        known = ", ".join(commands)
        parser.error(f"unknown command {named!r}; known: {known}.{did_you_mean(named, commands)}")
    options, rest = parser.parse_known_args(arguments)
    if "passed_on" in options:
        options.passed_on = rest
    elif rest:
        meant = did_you_mean(rest[0], parsers[options.command]._option_string_actions)
        parsers[options.command].error(f"unrecognized arguments: {' '.join(rest)}.{meant}")
    try:
        return commands[options.command].run(options) or 0
    except _USER_ERRORS as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
