"""SIGKILL while gates are trained or converted: every file is whole, and the next run goes on.

Run as a script this file is the process that is killed again and again. It imports everything once
and forks for each try. A try dies at one of its operations on files, or some milliseconds later.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimkv_kernels import training
from trimkv_kernels.embedded import EMBEDDED_MODEL, embedded_model
from trimkv_kernels.files import COMPLETE
from trimkv_kernels.gates import (
    GateConfig,
    RetentionGates,
    convert_gates,
    load_gates,
    save_gates,
)

TRAINING = Path(__file__).parents[1] / "training"
ON_FILES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
STEPS, TRIES = 6, 5
OPTIONS: dict[str, Any] = {
    "budget": 4, "max_steps": STEPS, "save_steps": 1, "save_total_limit": 2, "logging_steps": 1,
    "intermediate_size": 8, "learning_rate": 0.01, "warmup_steps": 0, "use_cpu": True,
    "disable_tqdm": True, "bias_init": 3.0, "report_to": [],
}  # fmt: skip


def train(out: Path) -> None:
    from recall_rows import recall_rows

    training.train(embedded_model()[0], recall_rows(2), out=out, resume=True, **OPTIONS)


def gates(steps: int) -> RetentionGates:
    """All parameters say how many steps the config names."""
    config = GateConfig("rg", 128, 8, 2, 2, base_model=str(EMBEDDED_MODEL), steps=steps)
    made = RetentionGates(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(float(steps))
    return made


def forked(work: Callable[[], None], watch: Path, at: int | None, delay: float = 0) -> int:
    """Run ``work`` in a child that kills itself; the number of its operations on files if not.

    Args:
        work: What to do.
        watch: Operations on files in this folder count.
        at: The operation at which the child dies; None lets it live.
        delay: Seconds from the operation to the death.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        with os.fdopen(receive) as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return -1
        assert status == 0, said
        return int(said)
    count, folder = 0, str(watch)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in ON_FILES or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and arguments[1] == "r":
            return
        if count == at:
            threading.Timer(delay, die).start() if delay else die()
        count += 1

    sys.addaudithook(heard)
    code = 1
    try:
        work()
        code = 0
    finally:
        os.write(send, str(count).encode())
        os._exit(code)


def check_checkpoints(out: Path) -> int:
    """Check that every file that has its name is whole; the step of the last checkpoint."""
    last = 0
    for folder in out.glob("checkpoint-*"):
        step = int(folder.name.removeprefix("checkpoint-"))
        assert load_gates(folder).config.steps == step
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(folder / name, weights_only=True)
        json.loads((folder / "training.json").read_text())
        last = max(last, step)
    if (out / "trimkv_config.json").exists():
        assert load_gates(out).config.steps == STEPS
    return last


def is_ours(name: str) -> bool:
    """Whether a file is of a write that was cut short, which has no name of its own yet."""
    return name.startswith(".trimkv-") and name != COMPLETE


def kill_training(folder: Path) -> dict[str, Any]:
    """Die anywhere, and resume."""
    whole, chance = folder / "whole", random.Random(0)
    total = forked(lambda: train(whole), whole, None)
    wanted = load_gates(whole).state_dict()
    steps, names = [], set()
    for number in range(TRIES):
        out = folder / f"killed-{number}"
        at = total * number // TRIES + chance.randrange(total // TRIES)
        delay = chance.random() / 50 if number % 2 else 0
        assert forked(lambda out=out: train(out), out, at, delay) < 0 or delay
        steps.append(check_checkpoints(out))
        assert forked(lambda out=out: train(out), out, None) >= 0
        assert check_checkpoints(out) == STEPS
        found = load_gates(out).state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        names |= {path.name for path in out.iterdir()}
    return {"steps": steps, "left": [name for name in sorted(names) if not is_ours(name)]}


def kill_conversion(folder: Path, layout: str) -> dict[str, Any]:
    """Convert over the gates of an earlier conversion, and die at each operation in turn."""
    source, out, found = folder / "source", folder / layout, []
    save_gates(gates(1), folder / "first")
    save_gates(gates(2), source)
    at, done = 0, -1
    while done < 0:
        shutil.rmtree(out, ignore_errors=True)
        convert_gates(folder / "first", out, layout=layout)
        done = forked(lambda: convert_gates(source, out, layout=layout), out, at)
        loaded = load_gates(out)
        values = {float(x) for p in loaded.parameters() for x in p.detach().flatten()}
        assert values == {float(loaded.config.steps)}
        found.append(loaded.config.steps)
        convert_gates(source, out, layout=layout)  # the next one is not disturbed
        assert load_gates(out).config.steps == 2
        at += 1
    return {"found": found, "left": sorted(path.name for path in out.iterdir())}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kills")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False,
        env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_while_training(report: dict[str, Any]) -> None:
    """Checkpoints are whole, and the end is that of a run without kills, to the bit."""
    found = report["training"]
    assert len(set(found["steps"])) > 3
    assert found["left"] == [
        f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}", "training.json", "trimkv_config.json",
        "trimkv_gates.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["safetensors", "published"])
def test_a_kill_while_converting(report: dict[str, Any], layout: str) -> None:
    """The old gates until one operation, the new ones from there on."""
    found = report[layout]["found"]
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == 2
    assert len(found) > 8
    assert len(report[layout]["left"]) == 2


if __name__ == "__main__":
    sys.path.insert(0, str(TRAINING))
    torch.set_num_threads(1)
    made = {layout: kill_conversion(Path(sys.argv[1]), layout) for layout in (
        "safetensors", "published")}  # fmt: skip
    print(json.dumps({"training": kill_training(Path(sys.argv[1])), **made}))
