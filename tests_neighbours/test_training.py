"""Gates trained by two gloo processes under DeepSpeed and FSDP2, and runs logged by wandb."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recall_rows import recall_rows

from gloo_training import OPTIONS, ZERO
from trimkv_kernels import training
from trimkv_kernels.gates import RetentionGates, load_gates
from trimkv_kernels.testing import embedded_model

SCRIPT = Path(__file__).parent / "gloo_training.py"


def torchrun(way: str, out: Path, start: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               str(SCRIPT), way, str(out), start]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> RetentionGates:
    """The same rows on one process: two steps are accumulated instead."""
    out = tmp_path_factory.mktemp("one")
    options = {**OPTIONS, "gradient_accumulation_steps": 2}
    return training.train(embedded_model()[0], recall_rows(8), out=out, **options).gates


def assert_same(found: RetentionGates, wanted: RetentionGates) -> None:
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    start = RetentionGates(wanted.config)
    assert not torch.allclose(start.layers[0].bias, wanted.layers[0].bias, atol=1e-3)


@pytest.mark.parametrize("way", ["zero1", "zero2", "fsdp2"])
def test_two_processes_train_what_one_trains(
    way: str, one_process: RetentionGates, tmp_path: Path
) -> None:
    """From the start to the end, and from a checkpoint to the end."""
    torchrun(way, tmp_path, "fresh")
    assert_same(load_gates(tmp_path), one_process)
    assert_same(load_gates(tmp_path / "checkpoint-3"), one_process)
    assert load_gates(tmp_path / "checkpoint-2").config.steps == 2
    shutil.rmtree(tmp_path / "checkpoint-3")
    for path in tmp_path.glob("tr*"):
        path.unlink()
    torchrun(way, tmp_path, "resume")
    assert_same(load_gates(tmp_path), one_process)


def test_zero_3_is_refused(tmp_path: Path) -> None:
    options = {**OPTIONS, "deepspeed": {**ZERO, "zero_optimization": {"stage": 3}}}
    with pytest.raises(ValueError, match="got stage 3.*fsdp_version 2"):
        training.train(embedded_model()[0], recall_rows(2), out=tmp_path, **options)


def test_wandb_offline(
    one_process: RetentionGates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the gates are in the run, on the disk, and nothing else changes."""
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    options = {**OPTIONS, "gradient_accumulation_steps": 2, "report_to": "wandb"}
    policy = training.train(embedded_model()[0], recall_rows(8), out=tmp_path / "out", **options)
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert_same(policy.gates, one_process)
    for name in ("loss", "base_loss", "capacity_loss", "occupancy", "layer_00/beta_p50"):
        assert summary[f"train/{name}"] > 0, name
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0
