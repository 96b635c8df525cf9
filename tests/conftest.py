"""Fixtures, and the interpreter: without a GPU the Triton kernels run interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import copy
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

# one unless asked for: the tensors are tiny, and the suite runs in several processes
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A whole cache in Triton's interpreter takes seconds a test; tests/kernels has the kernels alone.
CACHE_IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.slow)]
GOLDEN = Path(__file__).parent / "golden" / "trimkv-0.1.5"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes ``device`` runs on a GPU where there is one: ``-m gpu`` picks it."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `Tensor.new_empty` give NaN, so that an output element nobody writes is seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def make_qwen3(**changes: object) -> Qwen3ForCausalLM:
    """A tiny Qwen3 with spread-out keys: a fresh one gives every key the same norm."""
    config = Qwen3Config(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_norm" in name or "q_norm" in name:
                parameter.uniform_(0.2, 3.0)
            elif parameter.dim() == 2:
                parameter.mul_(6.0)
    return model


@pytest.fixture(scope="session")
def _qwen3() -> Qwen3ForCausalLM:
    return make_qwen3()


@pytest.fixture
def qwen3(_qwen3: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A tiny Qwen3 of the test's own."""
    return copy.deepcopy(_qwen3)


@pytest.fixture
def stock(_qwen3: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The same weights, never patched."""
    return copy.deepcopy(_qwen3)
