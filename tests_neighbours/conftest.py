"""The tests of other libraries. They run in an environment of their own, `make test-neighbours`."""

import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [
    str(Path(__file__).parents[1] / "tests" / "reliability"),
    str(Path(__file__).parent),
]
