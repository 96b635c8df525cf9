"""The suite on a machine with a GPU, as far as that can be seen without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
NO_CUDA_HERE = ("Torch not compiled with CUDA", "no NVIDIA driver", "when none is available")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: `-m gpu` shows more")
def test_what_is_marked_chooses_the_gpu(tmp_path: Path) -> None:
    """Each such test fails where it first meets the GPU, no earlier; none passes without one."""
    report = tmp_path / "report.json"
    env = {**os.environ, "FAKE_GPU_REPORT": str(report)}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    options = ["-q", "-m", "gpu", "-p", "fake_gpu", "-p", "no:cacheprovider", "--tb=no"]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS)]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=env, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    outcomes = json.loads(report.read_text())
    assert len({name.split("::")[0] for name in outcomes}) > 15
    wrong = {
        name: outcome
        for name, outcome in outcomes.items()
        if not any(text in outcome for text in NO_CUDA_HERE)
    }
    assert not wrong
