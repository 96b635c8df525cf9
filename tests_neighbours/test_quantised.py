"""Models whose weights other libraries have quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import agreement

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8}


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Sizes that every library's blocks of weights divide."""
    return tiny.llama(**SIZES, **changes).to(dtype)


def torchao(config: str, **options: Any) -> Any:
    from torchao import quantization

    model = llama()
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model


def torchao_int4() -> Any:
    from torchao.quantization import PerGroup

    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


def quanto(weights: str) -> Any:
    from optimum import quanto as library

    model = llama()
    library.quantize(model, weights=getattr(library, weights))
    library.freeze(model)
    return model


def dynamic() -> Any:
    return torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)


WEIGHTS_ONLY: dict[str, Callable[[], Any]] = {
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao_int4,
    "quanto int8": lambda: quanto("qint8"),
    "quanto int4": lambda: quanto("qint4"),
}


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_alone(name: str) -> None:
    """Only weights are rounded, and these are the same whatever cache the model has."""
    make = WEIGHTS_ONLY[name]
    agreement.check_evicting(make(), make())
    agreement.check_whole(make(), make())


LOADED = {
    "torchao": lambda: TorchAoConfig(__import__("torchao").quantization.Int8WeightOnlyConfig()),
    "quanto": lambda: QuantoConfig(weights="int8"),
    "bitsandbytes 4 bits": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
    ),
}


def loaded(config: Any, folder: Path, **options: Any) -> Any:
    llama().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, **options
    ).eval()


@pytest.mark.parametrize("name", LOADED)
def test_loaded_with_quantised_weights(name: str, tmp_path: Path) -> None:
    """By transformers' ``quantization_config``."""
    models = [loaded(LOADED[name](), tmp_path, device_map="cpu") for _ in range(2)]
    agreement.check_evicting(*models)
    agreement.check_whole(*models)


def bitsandbytes_int8(folder: Path) -> Any:
    config = BitsAndBytesConfig(load_in_8bit=True)
    return loaded(config, folder, device_map="cpu")


ACTIVATIONS: dict[str, Callable[[Path], Any]] = {
    "torch dynamic int8": lambda folder: dynamic(),
    "torchao dynamic int8": lambda folder: torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": bitsandbytes_int8,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_too(name: str, tmp_path: Path) -> None:
    """An activation near a rounding boundary may go to either side of it.

    So the order of a sum can change a logit by more than float32's rounding. By how much, the
    unpatched model says: its two attention functions differ in nothing else.
    """
    make = ACTIVATIONS[name]
    model, stock = make(tmp_path), make(tmp_path)
    agreement.check_whole(model, stock)
    agreement.check_evicting(model, stock, rounding(stock), "streaming_llm")


def rounding(stock: Any) -> float:
    """Four times the largest difference of logits between two orders of the same sums."""
    found = []
    for name in ("sdpa", "eager"):
        stock.set_attn_implementation(name)
        with torch.no_grad():
            found.append(torch.cat([stock(tiny.ids(1, 40, seed)).logits for seed in range(8)]))
    stock.set_attn_implementation("sdpa")
    return 4 * float((found[0] - found[1]).abs().max()) + 1e-4
