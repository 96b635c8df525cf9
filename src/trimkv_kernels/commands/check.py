"""run the conformance suite on a policy"""

from __future__ import annotations

import argparse
import importlib
import sys

from trimkv_kernels.policies import RetentionPolicy
from trimkv_kernels.policies.registry import policy_class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "policy", help="registered name, or package.module:Class; the current folder is searched"
    )


def run(options: argparse.Namespace) -> int:
    """Print each rule with its result.

    Returns:
        0 if all hold, else 1.
    """
    from trimkv_kernels.policies.base import policy_name
    from trimkv_kernels.testing import PolicyError, check_policy, example_shape
    from trimkv_kernels.testing.conformance import RULES

    cls = find_class(options.policy)
    try:
        policy = cls.example(example_shape())
    except TypeError as error:
        raise TypeError(
            f"{cls.__name__} cannot be made without arguments ({error}): define its classmethod "
            "example(shape)"
        ) from error
    width = max(map(len, RULES))
    broken = 0
    for rule in RULES:
        try:
            check_policy(policy, rules=[rule])
            print(f"{rule:{width}}  pass", flush=True)
        except PolicyError as error:
            broken += 1
            print(f"{rule:{width}}  FAIL  {error}", flush=True)
    print(f"policy {policy_name(policy)!r}: {len(RULES) - broken} of {len(RULES)} rules hold")
    return int(broken > 0)


def find_class(name: str) -> type[RetentionPolicy]:
    """The policy class of a registered name, or of ``package.module:Class``.

    Raises:
        ValueError: there is none.
        TypeError: it is not a policy class.
        ImportError: the module cannot be imported.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon:
        return policy_class(name)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as with python -m
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # foreign code can raise anything
        raise ImportError(
            f"policy {name!r}: module {module_name} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"policy {name!r}: {module_name} has no {class_name!r}")
    if not (isinstance(found, type) and issubclass(found, RetentionPolicy)):
        raise TypeError(f"policy {name!r} must be a RetentionPolicy class, got {found!r}")
    return found
