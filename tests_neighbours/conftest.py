"""The tests of other libraries. They run in an environment of their own, `make test-neighbours`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(folder) for folder in (HERE, TESTS / "reliability", TESTS / "training")]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(sys.path[:3]),  # of processes that a test starts
}
