"""The gates that ship with the embedded model, and the script that trains them."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import trimkv_kernels as tk
from trimkv_kernels.embedded import (
    EMBEDDED_MODEL,
    FIRST_HELD_OUT_SEED,
    embedded_model,
    make_recall_text,
    recall,
)
from trimkv_kernels.gates import load_gates
from trimkv_kernels.gates.published import SHIPPED_FOLDER

pytestmark = pytest.mark.numeric

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_embedded_gates.py"
GATES = EMBEDDED_MODEL / SHIPPED_FOLDER


def test_the_gates_are_small_and_say_where_they_come_from() -> None:
    assert {file.name for file in GATES.iterdir()} == {
        "trimkv_config.json",
        "trimkv_gates.safetensors",
    }
    assert sum(file.stat().st_size for file in GATES.iterdir()) < 300e3
    config = load_gates(GATES).config
    assert (config.budget, config.buffer) == (64, 16)
    assert config.context is not None
    assert config.steps is not None
    assert "recall texts" in str(config.data)


def test_they_are_the_default_policy(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = embedded_model()
    with caplog.at_level(logging.WARNING, "trimkv_kernels"), tk.patch(model) as handle:
        assert "policy='trimkv', budget=64, buffer=16, sinks=0, recent=0" in repr(handle)
    assert "TRIM-KV with the gates in" in caplog.text


def test_they_name_their_base_model() -> None:
    model = tk.from_pretrained(GATES)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    tk.unpatch(model)


@pytest.mark.parametrize(("budget", "least"), [(64, 0.97), (32, 0.9)])
def test_what_they_keep_on_held_out_texts(budget: int, least: float) -> None:
    model, tokenizer = embedded_model()
    first = FIRST_HELD_OUT_SEED + 20_000
    texts = [make_recall_text(512, seed=first + i, spacing=(20, 28)) for i in range(3)]
    full = recall(model, tokenizer, texts, question_chunk=4096)
    found = {}
    for policy in ("trimkv", "random"):
        with tk.patch(model, policy, budget=budget, buffer=8, sinks=1, recent=2) as handle:
            found[policy] = recall(
                model, tokenizer, texts, new_cache=handle.new_cache, context_chunk=16
            )
    assert found["trimkv"] >= least * full
    assert found["trimkv"] > found["random"] + 0.5


@pytest.mark.slow
def test_the_script_trains(tmp_path: Path) -> None:
    arguments = ("--steps", "2", "--num-texts", "0", "--threads", "1", "--out", str(tmp_path))
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trained in" in done.stdout
    trained, shipped = load_gates(tmp_path), load_gates(GATES)
    assert trained.config.steps == 2
    assert {name: x.shape for name, x in trained.state_dict().items()} == {
        name: x.shape for name, x in shipped.state_dict().items()
    }
