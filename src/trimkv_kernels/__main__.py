"""``python -m trimkv_kernels``: the command ``trimkv-kernels``."""

import sys

from trimkv_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
