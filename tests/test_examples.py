"""The README's code, the demo and the embedded model, as a new user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trimkv_kernels as tk
from trimkv_kernels.embedded import FIRST_HELD_OUT_SEED, make_recall_text, recall
from trimkv_kernels.testing import embedded_model, masked_reference

ROOT = Path(__file__).parent.parent


def test_readme_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        model, tokenizer = embedded_model()
        text = make_recall_text(300, seed=FIRST_HELD_OUT_SEED)
        inputs = tokenizer(text.prompt(text.questions[0]), return_tensors="pt")
        code = block.replace("max_new_tokens=32768", "max_new_tokens=8")
        with torch.no_grad():
            exec(code, {"model": model, "inputs": inputs, "tk": tk})


@pytest.mark.parametrize("policy", ["trimkv", "streaming_llm", "key_norm", "random"])
def test_the_embedded_model_on_few_slots_equals_the_masked_oracle(policy: str) -> None:
    (model, tokenizer), (stock, _) = embedded_model(), embedded_model()
    texts = [make_recall_text(n, seed=FIRST_HELD_OUT_SEED + n).text for n in (200, 260)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    cache = tk.patch(model, policy, budget=48, buffer=8).new_cache()
    bounded, reference = masked_reference(
        model,
        stock,
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        calls=[200, *[1] * 20, 30, *[1] * 10],
        cache=cache,
    )
    scale = reference.abs().max().item()  # a trained model's logits are not of order one
    torch.testing.assert_close(bounded, reference, atol=1e-6 * scale, rtol=1e-5)


def test_recall_with_a_full_budget_equals_the_stock_model() -> None:
    model, tokenizer = embedded_model()
    texts = [make_recall_text(300, seed=FIRST_HELD_OUT_SEED + i) for i in range(3)]
    expected = recall(model, tokenizer, texts)
    handle = tk.patch(model, "full", budget=800)
    assert recall(model, tokenizer, texts, new_cache=handle.new_cache) == expected
    handle.unpatch()
    handle = tk.patch(model, "streaming_llm", budget=32, buffer=4)
    assert recall(model, tokenizer, texts, new_cache=handle.new_cache) < expected


def demo(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_prints_a_row_per_policy_and_budget() -> None:
    lines = demo(
        "--tokens", "256", "--texts", "1", "--policy", "random,key_norm", "--budget", "32,64"
    ).splitlines()
    assert lines[0].split()[:3] == ["policy", "budget", "recall"]
    assert lines[1].startswith("full cache")
    assert [line.split()[:2] for line in lines[2:6]] == [
        ["random", "32"],
        ["random", "64"],
        ["key_norm", "32"],
        ["key_norm", "64"],
    ]
    slots = [int(line.split()[4]) for line in lines[2:6]]
    assert all(n < 32 + 4 for n in slots[::2])
    assert all(n < 64 + 8 for n in slots[1::2])


def test_vision_draws_what_was_kept_of_the_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "kept.png"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "vision.py", "--budget", "48", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "166 tokens, 144 of them of the image"
    assert lines[1].startswith("185 tokens seen, at most ")
    # 22 words stay, and of the rest as many pieces of the image as the budget leaves room for
    assert lines[2] == f"kept of the image: {(48 - 22) / 144:.1%}, mean of all heads"
    assert out.read_bytes()[1:4] == b"PNG"


def test_rows_serve_every_prompt_on_the_same_memory() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "rows.py", "--rows", "2", "--tokens", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert sorted(line.split(" in row")[0] for line in lines) == [f"request {n}" for n in range(6)]
    assert re.fullmatch(r"\d+ tokens in .* s, 0\.2 MB of cache before and after", last)


def test_demo_on_own_text_and_model(tmp_path: Path) -> None:
    model, tokenizer = embedded_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text(make_recall_text(200, seed=FIRST_HELD_OUT_SEED).text)
    output = demo(
        *("--model", str(tmp_path / "model"), "--prompt-file", str(tmp_path / "notes.txt")),
        *("--policy", "streaming_llm", "--budget", "64", "--new", "10"),
    )
    assert "--- full cache" in output
    assert "--- streaming_llm 64" in output
