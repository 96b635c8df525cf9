"""Tokens and kept positions of vLLM's engine against the library's own run of each request."""

import importlib
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from conftest import Alone, overrides, run_alone, run_engine
from trimkv_kernels import TrimKV
from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.gates import convert_gates
from trimkv_kernels.gates.published import find_gates
from trimkv_kernels.policies import make_policy
from trimkv_kernels.policies.allocation import Uniform
from trimkv_kernels.smollm2 import smollm2_folder

BUDGET, BUFFER = 48, 16
SIZES = {"budget": BUDGET, "buffer": BUFFER}
PROMPTS, NEW = (30, 200, 97, 5, 64), (60, 40, 50, 90, 33)
GATES = EMBEDDED_MODEL / "retention_gates"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SMALL),
    "Mistral": MistralConfig(**SMALL, sliding_window=None),
    "Qwen2": Qwen2Config(**SMALL),
    "Qwen3": Qwen3Config(**SMALL, head_dim=16),
    "Qwen3Moe": Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "Phi3": Phi3Config(**SMALL, pad_token_id=0, sliding_window=None),
}


def prompts(vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, vocabulary) for _ in range(length)] for length in PROMPTS]


def check(given: dict[str, Any], alone: list[Alone]) -> None:
    """The same tokens, and of each request that has them all a block with the same positions."""
    complete = [own.check(tokens) for own, tokens in zip(alone, given["tokens"], strict=True)]
    assert sum(complete) >= len(alone) - 1  # a tie of the best logits is rare
    for own, is_complete in zip(alone, complete, strict=True):
        assert not is_complete or own.held in given["held"]


@pytest.fixture(scope="session", params=FAMILIES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model of each family with spread-out keys: its name, folder and model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_norm" in name or "q_norm" in name:
                parameter.uniform_(0.2, 3.0)
            elif parameter.dim() == 2:
                parameter.mul_(6.0)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, folder, model


def test_every_family(small: Any) -> None:
    family, folder, model = small
    texts = prompts(96)
    given = run_engine(
        texts, list(NEW), model=str(folder), skip_tokenizer_init=True, max_num_seqs=3,
        max_num_batched_tokens=70, hf_overrides=overrides(family, policy="key_norm", **SIZES),
    )  # fmt: skip
    alone = [
        run_alone(model, text, new, "key_norm", **SIZES)
        for text, new in zip(texts, NEW, strict=True)
    ]
    check(given, alone)


@pytest.mark.parametrize(
    ("policy", "chunk"),
    [
        ("streaming_llm", 37),
        ("trimkv", 512),
        ("published gates", 64),
        ("expected_attention", 50),
        ("r_kv", 64),
        ("critical_kv", 64),
        ("random", 41),
    ],
)
def test_policies_in_chunks_of_any_size(
    policy: str, chunk: int, embedded: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"policy": policy}
    own: Any = policy
    if policy == "trimkv":
        own = TrimKV.from_pretrained(GATES)
    elif policy == "published gates":
        convert_gates(GATES, tmp_path / "gates", layout="published")
        options = {"policy": "trimkv", "gates": str(tmp_path / "gates")}
        options["options"] = {"age_offset": -1}
        own = TrimKV.from_pretrained(tmp_path / "gates", age_offset=-1)
    elif policy == "random":
        options["options"] = {"seed": 7}
        own = make_policy("random", seed=7)
    elif policy == "r_kv":
        options["options"] = {"window": 8}
        own = make_policy("r_kv", window=8)
    texts = prompts(60)
    given = run_engine(
        texts, list(NEW), model=str(EMBEDDED_MODEL), max_num_seqs=3, max_num_batched_tokens=chunk,
        hf_overrides=overrides("Qwen3", **options, **SIZES),
    )  # fmt: skip
    alone = [
        run_alone(embedded, text, new, own, **SIZES) for text, new in zip(texts, NEW, strict=True)
    ]
    check(given, alone)
    assert f"{BUDGET + BUFFER} slots for each of 2 KV heads in 2 layers" in given["log"]


def test_two_processes_share_the_heads(embedded: Any) -> None:
    texts = prompts(60)
    given = run_engine(
        texts, list(NEW), model=str(EMBEDDED_MODEL), max_num_seqs=3, max_num_batched_tokens=64,
        held=False, tensor_parallel_size=2, distributed_executor_backend="mp",
        hf_overrides=overrides("Qwen3", policy="trimkv", **SIZES),
    )  # fmt: skip
    own = TrimKV.from_pretrained(GATES)
    for text, new, tokens in zip(texts, NEW, given["tokens"], strict=True):
        run_alone(embedded, text, new, own, **SIZES).check(tokens)
    assert f"{BUDGET + BUFFER} slots for each of 1 KV heads in 2 layers" in given["log"]


def test_compiled_as_vllm_compiles(embedded: Any) -> None:
    texts = prompts(60)
    given = run_engine(
        texts, list(NEW), model=str(EMBEDDED_MODEL), max_num_seqs=3, max_num_batched_tokens=64,
        enforce_eager=False, hf_overrides=overrides("Qwen3", policy="trimkv", **SIZES),
    )  # fmt: skip
    own = TrimKV.from_pretrained(GATES)
    alone = [
        run_alone(embedded, text, new, own, **SIZES) for text, new in zip(texts, NEW, strict=True)
    ]
    check(given, alone)


OTHER = """
import torch
from trimkv_kernels.policies import Needs, RetentionPolicy

class LargeValues(RetentionPolicy):
    needs = Needs(score=("value",))

    def score(self, slots):
        return slots.value.float().norm(dim=-1)
"""


def test_a_worker_finds_policies_of_other_packages(
    embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_package.py").write_text(OTHER)
    meta = tmp_path / "other_package-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    entry = "[trimkv_kernels.policies]\nother_values = other_package:LargeValues\n"
    (meta / "entry_points.txt").write_text(entry)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    texts = prompts(60)
    given = run_engine(
        texts, list(NEW), held=False, model=str(EMBEDDED_MODEL), max_num_seqs=3,
        distributed_executor_backend="mp",
        hf_overrides=overrides("Qwen3", policy="other_values", **SIZES),
    )  # fmt: skip
    own = importlib.import_module("other_package").LargeValues()
    for text, new, tokens in zip(texts, NEW, given["tokens"], strict=True):
        run_alone(embedded, text, new, own, **SIZES).check(tokens)


def test_smollm2() -> None:
    """A real model, where it is unpacked already: ``make test-smollm2`` fetches it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not (cache / "trimkv_kernels" / "smollm2-135m-instruct-q4_1").is_dir():
        pytest.skip("SmolLM2 is not installed")
    folder = str(smollm2_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = (
        "Tell me a long story about a fox and a hen.",
        "What is gravity? Explain it to a child in simple words, with apples and the moon. " * 5,
        "List five facts about bees.",
    )
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in asked
    ]
    new = [40, 30, 50]
    given = run_engine(
        texts, new, model=folder, max_num_seqs=2, max_num_batched_tokens=64,
        hf_overrides=overrides("Llama", policy="trimkv", allocation="uniform", **SIZES),
    )  # fmt: skip
    own = TrimKV.from_pretrained(find_gates(folder))
    alone = [
        run_alone(model, x, n, own, allocation=Uniform(), **SIZES)
        for x, n in zip(texts, new, strict=True)
    ]
    check(given, alone)
