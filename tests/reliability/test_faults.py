"""Full disks, folders that cannot be written, kills, and errors in the middle of a call."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import slots as small
import tiny
import torch

import trimkv_kernels as tk
from trimkv_kernels.gates import GateConfig, RetentionGates, load_gates, save_gates

CONFIG = GateConfig("rg", 64, 64, num_layers=2, num_kv_heads=2)


def gates(bias: float) -> RetentionGates:
    made = RetentionGates(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(bias)
    return made


def bias_of(folder: Path) -> float:
    """The one number that all gates of a folder have."""
    found = {float(x) for p in load_gates(folder).parameters() for x in p.detach().flatten()}
    assert len(found) == 1
    return found.pop()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No file may grow beyond some bytes, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the process is killed
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_gates(tmp_path: Path, full_disk: Any) -> None:
    save_gates(gates(1.0), tmp_path)
    full_disk(10_000)
    with pytest.raises(OSError, match="File too large") as error:
        save_gates(gates(2.0), tmp_path)
    assert error.value.errno == errno.EFBIG
    full_disk(1 << 30)
    assert bias_of(tmp_path) == 1.0
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "trimkv_config.json", "trimkv_gates.safetensors"
    ]  # fmt: skip


def test_a_full_disk_leaves_the_old_cache(tmp_path: Path, full_disk: Any) -> None:
    cache, path = small.cache(), tmp_path / "slots"
    small.feed(cache, 9)
    cache.save(path)
    old = path.read_bytes()
    small.feed(cache, 9, 1)
    full_disk(1000)
    with pytest.raises(OSError, match="File too large: nothing was saved") as error:
        cache.save(path)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    full_disk(1 << 30)
    assert path.read_bytes() == old
    assert [x.name for x in tmp_path.iterdir()] == ["slots"]
    small.feed(cache, 1, 2)
    cache.save(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for root nothing is read-only, the folder that cannot be made stands for one."""
    save_gates(gates(1.0), tmp_path / "gates")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        save_gates(gates(2.0), tmp_path / "gates")
    assert bias_of(tmp_path / "gates") == 1.0  # reading writes nothing


SAVING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_faults import gates, save_gates
number = 1.0
while True:
    save_gates(gates(number), Path(sys.argv[1]))
    print(number, flush=True)
    number += 1
"""


def test_a_kill_while_saving_leaves_whole_gates(tmp_path: Path) -> None:
    """Weights and config of one write, wherever the kill comes."""
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path), here], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        last = float(process.stdout.readline())
    time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = max([last, *(float(x) for x in process.stdout.read().split())])
    assert bias_of(tmp_path) in (last, last + 1)
    save_gates(gates(0.5), tmp_path)
    assert bias_of(tmp_path) == 0.5


class Broken(tk.RetentionPolicy):
    """``key_norm`` that fails while ``fails`` says so."""

    needs = tk.Needs(score=("key",))
    fails = False

    def score(self, slots: tk.SlotView) -> torch.Tensor:
        if type(self).fails:
            raise RuntimeError("the policy failed")
        return -slots.key.float().norm(dim=-1)


@pytest.mark.parametrize("where", ["policy", "hook", "interrupt"])
def test_an_error_in_a_call_is_not_forgotten(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the call says reset(), after which all is as in a new cache."""
    model, ids, more = tiny.llama(), tiny.ids(1, 20), tiny.ids(1, 3, seed=5)
    options = {"budget": 8, "buffer": 4, "sinks": 1, "recent": 1}
    with tk.patch(model, Broken(), **options) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        error = KeyboardInterrupt if where == "interrupt" else RuntimeError

        def fail(*_: Any) -> None:
            raise error("in the middle")

        hook = None
        if where == "policy":
            monkeypatch.setattr(Broken, "fails", True)
        else:
            hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(tiny.ids(1, 9, seed=3), past_key_values=cache)
        monkeypatch.setattr(Broken, "fails", False)
        if hook is not None:
            hook.remove()
        with pytest.raises(ValueError, match=r"reset\(\)"):
            model(more, past_key_values=cache)
        cache.reset()
        again = model(ids, past_key_values=cache).logits
        fresh = handle.new_cache()
        assert torch.equal(again, model(ids, past_key_values=fresh).logits)
        assert tiny.kept(cache) == tiny.kept(fresh)


def test_ctrl_c_in_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next generate is right; a cache that was passed in says reset()."""
    model, ids = tiny.llama(), tiny.ids(1, 20)
    options = {"budget": 8, "buffer": 4, "sinks": 1, "recent": 1}
    with tk.patch(model, "key_norm", **options) as handle:
        expected = model.generate(ids, max_new_tokens=12, **tiny.GREEDY)
        calls = 0

        def fail(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt

        cache = handle.new_cache()
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, past_key_values=cache, max_new_tokens=12, **tiny.GREEDY)
        hook.remove()
        assert torch.equal(model.generate(ids, max_new_tokens=12, **tiny.GREEDY), expected)
        with pytest.raises(ValueError, match=r"reset\(\)"):
            model.generate(ids, past_key_values=cache, max_new_tokens=12, **tiny.GREEDY)
        cache.reset()
        again = model.generate(ids, past_key_values=cache, max_new_tokens=12, **tiny.GREEDY)
        assert torch.equal(again, expected)
