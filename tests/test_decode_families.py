"""`decode_loop` on every family and kind of RoPE: equal to `generate`, captured or not."""

import logging
from typing import Any

import pytest
import torch

import trimkv_kernels as tk
from conftest import make_qwen3
from test_decode_loop import Tape, fake_graphs, run
from test_models import BUDGET, NAMES, batch, make
from trimkv_kernels import capture

LONG = {
    "rope_type": "longrope",
    "long_factor": [1.5] * 4,
    "short_factor": [1.0] * 4,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
    "factor": 64.0,
    "rope_theta": 10_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10_000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10_000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in NAMES],
    ("Phi-3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    ("Llama", {"rope_parameters": LLAMA3}),
    ("Qwen2", {"rope_parameters": LINEAR}),
    ("Qwen3", {"rope_parameters": YARN}),
]
IDS = [f"{name} {changes['rope_parameters']['rope_type'] if changes else ''}".strip()
       for name, changes in CASES]  # fmt: skip


@pytest.mark.parametrize("way", ["as it is", "captured"])
@pytest.mark.parametrize(("name", "changes"), CASES, ids=IDS)
def test_every_family_decodes_as_generate_does(
    name: str,
    changes: dict[str, Any],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make(name, **changes)
    tk.patch(model, "streaming_llm", **BUDGET)
    ids, mask = batch((7, 0), 40)
    call = {"attention_mask": mask, "pad_token_id": 0}
    greedy = {"do_sample": False, "max_new_tokens": 20, **call}

    def begin() -> None:
        with torch.no_grad():  # a short text takes dynamic frequencies back to where they start
            model(ids[:, -8:], use_cache=False)

    begin()
    free = model.generate(ids, eos_token_id=None, **greedy)[:, 40:]
    eos = next(int(token) for token in free[0, 8:] if token not in free[0, :8])
    tapes: list[Tape] | None = fake_graphs(monkeypatch) if way == "captured" else None
    begin()
    assert torch.equal(run(model, ids, max_new_tokens=20, eos_token_id=(), **call), free)
    begin()
    expected = model.generate(ids, eos_token_id=eos, **greedy)[:, 40:]
    begin()
    assert torch.equal(run(model, ids, max_new_tokens=20, eos_token_id=eos, **call), expected)
    if tapes is None:
        return
    told = "cannot be captured" in caplog.text
    assert told == (not tapes and name != "Gemma 3")
    if not changes and name in ("Qwen3", "Llama", "Mistral", "Qwen2", "Phi-3"):
        assert [tape.replays > 0 for tape in tapes] == [True, True]
        assert tapes[0].replays == 20 - 1 - capture.WARM_UP


@pytest.mark.parametrize("policy", ["streaming_llm", "key_norm", "h2o"])
def test_a_capture_that_fails_leaves_no_trace(
    policy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_qwen3()
    handle = tk.patch(model, policy, **BUDGET)
    ids, _ = batch((0, 0), 40)
    options = {"max_new_tokens": 20, "eos_token_id": ()}
    theirs, ours = handle.new_cache(), handle.new_cache()
    expected = run(model, ids, past_key_values=theirs, **options)
    tapes = fake_graphs(monkeypatch)
    recorded: list[int] = []
    middle = model.model.layers[1]

    def fail(*_: object) -> None:
        if len(tapes) > len(recorded):
            recorded.append(1)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    hook = middle.register_forward_hook(fail)
    with caplog.at_level(logging.WARNING, "trimkv_kernels"):
        got = run(model, ids, past_key_values=ours, **options)
    hook.remove()
    assert torch.equal(got, expected)
    assert recorded == [1]
    assert "cannot be captured, it runs as it is: RuntimeError: CUDA error" in caplog.text
    for layer in range(3):
        assert torch.equal(ours.positions(layer), theirs.positions(layer))
    assert torch.equal(ours.slots.t, theirs.slots.t)
    with torch.no_grad():  # a call by hand goes on from there
        a, b = (model(ids[:, :9], past_key_values=cache).logits for cache in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
