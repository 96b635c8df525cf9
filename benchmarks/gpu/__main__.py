"""``python3 -m gpu``, which the Makefile calls; see `run`."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    print(f"make gpu: {sys.executable} has no torch; PYTHON=... picks another", file=sys.stderr)
    sys.exit(2)

from .run import main

if __name__ == "__main__":
    sys.exit(main())
