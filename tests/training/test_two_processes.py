"""Two processes on a CPU (gloo): they train what one process trains on the same rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recall_rows import recall_rows
from two_processes import OPTIONS

from trimkv_kernels import training
from trimkv_kernels.gates import GateConfig, RetentionGates, load_gates
from trimkv_kernels.testing import embedded_model
from trimkv_kernels.training import GateModel

SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               str(SCRIPT), str(folder)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_ddp_equals_accumulating_on_one_process(out: Path, tmp_path: Path) -> None:
    # The mean over processes is the mean over the steps of an accumulation.
    one = training.train(
        embedded_model()[0],
        recall_rows(8),
        out=tmp_path,
        gradient_accumulation_steps=2,
        **OPTIONS,
    )
    first, second = (torch.load(out / f"rank{rank}.pt") for rank in (0, 1))
    for name, value in one.gates.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    start = RetentionGates(one.gates.config)
    assert not torch.allclose(start.layers[0].bias, first["layers.0.bias"], atol=1e-3)
    assert load_gates(out).config.steps == 3
    names = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert names == ["checkpoint-2", "checkpoint-3"]
    rngs = sorted(path.name for path in (out / "checkpoint-2").glob("rng_state*"))
    assert rngs == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.slow
def test_fsdp_equals_one_process(out: Path) -> None:
    found = torch.load(out / "fsdp.pt")
    torch.manual_seed(0)
    config = GateConfig(
        kind="rg10", tied=True, hidden_size=128, intermediate_size=16, num_layers=2, num_kv_heads=2,
        bias_init=3.0,
    )  # fmt: skip
    model = GateModel(embedded_model()[0], RetentionGates(config), budget=4, scope="global")
    with model.attached():
        loss = model.train()(recall_rows(1)[0]["input_ids"][None])["loss"]
        loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=0)
    grads = dict(model.gates.named_parameters())
    assert found["grads"].keys() == grads.keys()
    for name, grad in found["grads"].items():
        torch.testing.assert_close(grad, grads[name].grad, rtol=1e-4, atol=1e-7)
    assert found["keys"] == sorted(f"gates.{name}" for name in model.gates.state_dict())
