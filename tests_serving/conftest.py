"""What the tests of a real vLLM share: models, the library's own run of a request, servers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trimkv_kernels as tk
from trimkv_kernels.embedded import EMBEDDED_MODEL

MARGIN = 1e-4  # where the two best logits are closer, either token may come
HERE = Path(__file__).parent
MARK = "RESULT "  # the line of engine.py; vLLM's processes print before and after it
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Alone:
    """What the library does with one request on a cache of its own.

    Attributes:
        tokens: The generated tokens.
        margins: By how much the best logit was above the second, for each of them.
        held: ``[layer][head]``, the positions that the cache holds at the end, sorted.
    """

    tokens: list[int]
    margins: list[float]
    held: list[list[list[int]]]

    def check(self, tokens: list[int]) -> bool:
        """Compare a server's tokens up to the first that either may be.

        Returns:
            Whether all were compared.
        """
        for index, (own, given) in enumerate(zip(self.tokens, tokens, strict=True)):
            if own != given:
                assert self.margins[index] <= MARGIN, (index, own, given, self.margins[index])
                return False
        return True


def run_alone(model: Any, prompt: list[int], new: int, policy: Any, **options: Any) -> Alone:
    """A request on a patched model, its prompt in chunks of the buffer."""
    with tk.patch(model, policy, prefill_chunk=options["buffer"], **options) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            output = model.generate(
                torch.tensor([prompt]), past_key_values=cache, max_new_tokens=new,
                min_new_tokens=new, do_sample=False, output_logits=True, eos_token_id=None,
                return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
        best = torch.stack(output.logits)[:, 0].topk(2).values
        held = [
            [sorted(p for p in head if p >= 0) for head in cache.positions(layer)[0].tolist()]
            for layer in range(model.config.num_hidden_layers)
        ]
    tokens = output.sequences[0, len(prompt) :].tolist()
    return Alone(tokens, (best[:, 0] - best[:, 1]).tolist(), held)


def run_engine(
    prompts: list[list[int]], new: list[int], held: bool = True, **engine: Any
) -> dict[str, Any]:
    """What vLLM gives, see ``engine.py``."""
    engine = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True} | engine
    asked = json.dumps({"engine": engine, "prompts": prompts, "new": new, "held": held})
    run = subprocess.run(
        [sys.executable, HERE / "engine.py"], input=asked, capture_output=True, text=True,
        env=os.environ | ENVIRONMENT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    (result,) = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(result.removeprefix(MARK)) | {"log": run.stdout + run.stderr}


def overrides(family: str, **trimkv: Any) -> dict[str, Any]:
    """What ``--hf-overrides`` says."""
    return {"architectures": [f"TrimKV{family}ForCausalLM"], "trimkv": trimkv}


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded Qwen3."""
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval()


class Server:
    """A process that serves the embedded Qwen3.

    Args:
        log: File for what it prints.
        trimkv: The options of the bounded rows.
        arguments: More of ``vllm serve``.
    """

    def __init__(self, log: Path, trimkv: dict[str, Any], *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = log
        self._command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(EMBEDDED_MODEL)),
            *("--served-model-name", "embedded", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"),
            *("--hf-overrides", json.dumps(overrides("Qwen3", **trimkv)), *arguments),
        ]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log[-6000:]
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            time.sleep(0.5)
        raise AssertionError(f"no answer:\n{self.log[-6000:]}")

    def kill(self) -> None:
        """End all its processes at once, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=60)

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text("utf-8", errors="replace")

    def metric(self, name: str) -> float:
        """One number of its metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(name + "{"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on rows of 48 + 16 slots with the gates that lie beside the model."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    server = Server(log, {"policy": "trimkv", "budget": 48, "buffer": 16}, "--max-num-seqs", "8")
    yield server
    server.kill()
