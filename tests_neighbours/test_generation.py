"""Libraries that call ``generate``: transformers' pipelines and TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import pipeline
from trl import GRPOConfig, GRPOTrainer

import agreement
import trimkv_kernels as tk
from trimkv_kernels.testing import embedded_model

TEXTS = [
    "alice keeps gold . the old mill was silent . what does alice keep ?",
    "rupert keeps iron . what does rupert keep ?",
    "the old mill was silent . " * 4 + "what does daniel keep ?",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
NEW = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture
def model_and_tokenizer() -> Any:
    model, tokenizer = embedded_model()
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_pipeline(model_and_tokenizer: Any, chat: bool, rows: int) -> None:
    """Without eviction, the text of the unpatched model; with it, that of ``generate``."""
    model, tokenizer = model_and_tokenizer
    inputs: Any = [[{"role": "user", "content": text}] for text in TEXTS] if chat else TEXTS
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    want = pipe(inputs, batch_size=rows, **NEW)
    with tk.patch(model, "key_norm", **agreement.WHOLE):
        assert pipe(inputs, batch_size=rows, **NEW) == want
    with tk.patch(model, "streaming_llm", **agreement.OPTIONS) as handle:
        got = pipe(inputs, batch_size=rows, return_full_text=False, **NEW)
        assert int(handle.stats().evictions.max()) > 0
        for text, (answer,) in zip(TEXTS, got, strict=True):
            prompt = f"user : {text} " if chat else text
            ids = tokenizer(prompt, return_tensors="pt")
            tokens = model.generate(**ids, **NEW)[0, ids["input_ids"].shape[1] :]
            alone = tokenizer.decode(tokens, skip_special_tokens=True)
            assert answer["generated_text"].split() == alone.split()


def grpo(model: Any, tokenizer: Any, folder: Path, **options: Any) -> list[str]:
    """All completions of two steps of GRPO."""
    seen: list[str] = []

    def reward(*, completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(set(text.split()))) for text in completions]

    config = {
        "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 16, "max_steps": 2, "report_to": [], "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-3, "seed": 0,
    }  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [*TEXTS, TEXTS[0]]})
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **{**config, **options}),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()
    return seen


def test_grpo_trains_as_without_the_patch(tmp_path: Path) -> None:
    """It generates in training mode: the same completions, rewards and weights."""
    found = []
    for patched in (False, True):
        model, tokenizer = embedded_model()
        if patched:
            tk.patch(model, "key_norm", **agreement.WHOLE)
        completions = grpo(model, tokenizer, tmp_path, temperature=3.0)
        found.append((completions, {name: x.clone() for name, x in model.state_dict().items()}))
    assert found[0][0] == found[1][0]
    assert len(set(found[0][0])) > 1
    before = embedded_model()[0].state_dict()
    moved = max(float((x - before[name]).abs().max()) for name, x in found[0][1].items())
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, atol=moved / 100, rtol=1e-4)
    assert moved > 1e-4


def test_grpo_on_a_cache_that_evicts(tmp_path: Path) -> None:
    """Its completions are those of the same patched model in eval mode."""
    model, tokenizer = embedded_model()
    new = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16}
    with tk.patch(model, "streaming_llm", **agreement.OPTIONS) as handle:
        options = {"generation_kwargs": new, "learning_rate": 0.0, "temperature": 1.0}
        completions = grpo(model, tokenizer, tmp_path, **options)
        assert int(handle.stats().evictions.max()) > 0
        model.eval()
        alone = set()
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")
            tokens = model.generate(**ids, **new)[0, ids["input_ids"].shape[1] :]
            alone.add(tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(completions) == 8
    assert set(completions) <= alone


@pytest.mark.parametrize("reason", ["attention_dropout", "gradient checkpointing"])
def test_training_mode_that_computes_otherwise_is_refused(reason: str) -> None:
    changes = {"attention_dropout": 0.1} if reason == "attention_dropout" else {}
    model = tiny.llama(**changes).train()
    if not changes:
        model.gradient_checkpointing_enable()
    with (
        tk.patch(model, "key_norm", **agreement.OPTIONS),
        pytest.raises(ValueError, match=r"call model.eval\(\)"),
    ):
        model.generate(tiny.ids(1, 20), use_cache=True, max_new_tokens=4, **tiny.GREEDY)
