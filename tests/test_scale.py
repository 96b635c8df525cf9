"""docs/scale.md: every number of its tables again, from transformers' models and by hand."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from trimkv_kernels import BoundedKVCache, sizing
from trimkv_kernels.policies import make_policy
from trimkv_kernels.sizing import MODELS, ModelSize

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
BY_NAME = {model.name: model for model in MODELS}
Q4 = BY_NAME["Qwen3-4B"]


def block(title: str) -> str:
    (found,) = re.findall(rf"<!-- table: {title} -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    return found


def rows(title: str) -> list[list[str]]:
    """Cells of a table of the page, without its head."""
    lines = block(title).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(cells: list[str]) -> list[float]:
    """Numbers of cells, without what stands in brackets."""
    return [float(re.sub(r"\(.*\)|,", "", cell)) for cell in cells]


def by_hand(name: str) -> dict[str, float]:
    """What the formulas of the page need, as plain numbers."""
    m = BY_NAME[name]
    total = {"Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360, "Qwen3-14B": 14_768_307_200}
    total |= {"Qwen3-32B": 32_762_123_264, "Qwen3-30B-A3B": 30_532_122_624}
    total |= {"Qwen3-235B-A22B": 235_093_634_560}
    return {"weights": 2 * total[name], "pairs": m.num_layers * 512, "kv": m.num_kv_heads}


def slots_by_hand(name: str, budget: int, world: int) -> float:
    m = BY_NAME[name]
    kv = max(m.num_kv_heads / world, 1)
    return m.num_layers * kv * ((budget + 128) * (2 * 128 * 2 + 4 + 4 + 4) + 8) + 4


def held_by_hand(name: str, each: float, world: int) -> int:
    return max(math.floor((0.9 * 141e9 - by_hand(name)["weights"] / world) / each), 0)


def full_by_hand(name: str, tokens: int, world: int) -> float:
    it = by_hand(name)
    return it["pairs"] * max(it["kv"] / world, 1) * tokens


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_parameters_are_those_of_transformers(model: ModelSize) -> None:
    sizes = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tied,
    }
    if model.num_experts:
        config = Qwen3MoeConfig(
            **sizes,
            moe_intermediate_size=model.intermediate_size,
            num_experts=model.num_experts,
            num_experts_per_tok=model.num_experts_per_tok,
        )
    else:
        config = Qwen3Config(**sizes, intermediate_size=model.intermediate_size)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    one = sum(p.numel() for p in stock.model.layers[0].parameters())
    two = sum(p.numel() for p in stock.parameters())
    assert model.parameters == two + (model.num_layers - 2) * one
    assert sizing.weight_bytes(model) == by_hand(model.name)["weights"]


def test_sequence_bytes_are_those_of_a_cache() -> None:
    model = ModelSize("tiny", 3, 64, 4, 2, 96, head_dim=16)
    cache = BoundedKVCache(
        make_policy("streaming_llm"),
        num_layers=3,
        num_kv_heads=2,
        head_dim=16,
        batch_size=5,
        budget=32,
        buffer=8,
        dtype=torch.bfloat16,
        device="cpu",
    )
    shared = 3 * 4 + 8  # a flag of each layer, and the count of all tokens
    assert cache.stats().bytes_held == 5 * sizing.sequence_bytes(model, 32, 8) + shared


@pytest.mark.parametrize(
    ("batch", "slots", "milliseconds"),
    [(1, 512, 1.888), (8, 1024, 2.152), (64, 4096, 10.86), (4, 32768, 6.366)],
)
def test_floors_of_qwen3_4b(batch: int, slots: int, milliseconds: float) -> None:
    # (8.045 GB + batch * slots * 147,456 B) / 4.3 TB/s
    assert sizing.step_seconds(Q4, batch, slots) * 1e3 == pytest.approx(milliseconds, rel=5e-4)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_experts_read_is_a_mean_over_all_routings(batch: int) -> None:
    model = ModelSize("tiny", 1, 8, 2, 1, 4, num_experts=4, num_experts_per_tok=2)
    choices = list(itertools.combinations(range(4), 2))
    read = [len(set().union(*picks)) for picks in itertools.product(choices, repeat=batch)]
    assert model.experts_read(batch) == pytest.approx(sum(read) / len(read), rel=1e-12)
    unread = (4 - model.experts_read(batch)) * 3 * 8 * 4 + model.vocab_size * 8
    assert model.parameters_read(batch) == pytest.approx(model.parameters - unread, rel=1e-12)


def test_a_world_that_does_not_fit_the_heads_raises() -> None:
    with pytest.raises(ValueError, match="world must divide 8 KV heads"):
        sizing.rank_kv_heads(Q4, 3)
    assert [sizing.rank_kv_heads(Q4, world) for world in (1, 2, 8, 16)] == [8, 4, 1, 1]


def test_the_page_has_the_tables_of_the_module() -> None:
    assert re.findall(r"<!-- table: (.*?) -->", PAGE) == list(sizing.TABLES)
    for title, make in sizing.TABLES.items():
        assert block(title) == make(), f"docs/scale.md: write the table {title!r} anew"


def test_bytes() -> None:
    for name, *cells in rows("bytes"):
        slots = [round(slots_by_hand(name, b, 1) / 1e6, 1) for b in (512, 1024, 2048, 4096)]
        expected = [round(by_hand(name)["weights"] / 1e9, 2), *slots]
        assert numbers(cells) == [*expected, round(full_by_hand(name, 32768, 1) / 1e6)]


def test_sequences() -> None:
    table = rows("sequences")
    assert len(table) == 6 * 4
    for name, tp, *cells in table:
        world = int(tp)
        each = [slots_by_hand(name, b, world) for b in (512, 1024, 2048, 4096)]
        each.append(full_by_hand(name, 32768, world))
        expected = [held_by_hand(name, size, world) // world for size in each]
        assert [0 if cell == "-" else int(cell.replace(",", "")) for cell in cells] == expected


def test_node_and_rack() -> None:
    for name, tp, *cells in rows("node"):
        world = 4 if name == "Qwen3-235B-A22B" else 1
        low, high = (held_by_hand(name, slots_by_hand(name, b, world), world) for b in (512, 4096))
        copies = (8 // world, 32 // world)
        assert int(tp) == world
        assert numbers(cells) == [n * held for n in copies for held in (low, high)]


def times(name: str, batch: int, world: int) -> tuple[float, float] | None:
    """Milliseconds for weights and for 1,152 slots; None where the batch is not held."""
    model, it = BY_NAME[name], by_hand(name)
    if held_by_hand(name, slots_by_hand(name, 1024, world), world) < batch:
        return None
    read = it["weights"] - (0 if model.tied else 2 * 151936 * model.hidden_size)
    if model.num_experts:
        unread = 128 * (120 / 128) ** batch
        read -= 2 * model.num_layers * unread * 3 * model.hidden_size * model.intermediate_size
    slots = batch * full_by_hand(name, 1152, world)
    return read / world / 4.3e9, slots / 4.3e9


def test_floors() -> None:
    for name, tp, *cells in rows("floor"):
        for batch, cell in zip((1, 8, 64, 256), cells, strict=True):
            parts = times(name, batch, int(tp))
            if parts is None:
                assert cell == "-"
                continue
            assert cell == f"{sum(parts):.2f} ({parts[1] / sum(parts):.0%})"


def test_communication() -> None:
    for name, batch, *cells, turning in rows("communication"):
        model = BY_NAME[name]
        for world, cell in zip((2, 4, 8), cells, strict=True):
            parts = times(name, int(batch), world)
            if parts is None:
                assert cell == "-"
                continue
            data = int(batch) * model.hidden_size * 2 * 2 * (world - 1) / world
            talk = 2 * model.num_layers * (0.01 + data / 450e6)
            assert cell == f"{talk:.2f} ({talk / (talk + sum(parts)):.0%})"
        # 10 us at 450 GB/s are 4.5 MB
        assert int(turning) == math.ceil(4.5e6 / (model.hidden_size * 2 * 2 * 7 / 8))


def test_pages() -> None:
    for slots, *cells in rows("pages"):
        count = int(slots.replace(",", ""))
        for page, cell in zip((16, 64, 256), cells, strict=True):
            assert cell == f"{math.ceil(count / page)} ({-count % page})"


def test_numbers_of_the_text() -> None:
    def per_gpu(name: str, world: int) -> float:
        return held_by_hand(name, slots_by_hand(name, 512, world), world) / world

    large = slots_by_hand("Qwen3-4B", 1024, 1)
    said = {
        f"cache holds {slots_by_hand('Qwen3-4B', 512, 1) / full_by_hand('Qwen3-4B', 1, 1):.0f}.",
        f"Metadata is {12 / 524:.1%}".replace("%", " %"),
        f"add {36 * (2560 * 512 + 512 + 512 * 8 + 8) * 2 / 1e6:.0f} MB",
        f"{1024 * 8 * 512 / 1e6:.1f} MB for 1,024 tokens",
        f"holds {per_gpu('Qwen3-32B', 4) / per_gpu('Qwen3-32B', 1):.1f} times",
        f"(Qwen3-4B: {per_gpu('Qwen3-4B', 4) / per_gpu('Qwen3-4B', 1):.2f})",
        f"holds {per_gpu('Qwen3-30B-A3B', 8) / per_gpu('Qwen3-30B-A3B', 4):.2f} of",
        f"floor of {sizing.step_seconds(Q4, 8, 32768) * 1e3:.2f} ms, "
        f"{sizing.step_seconds(Q4, 8, 32768) / sizing.step_seconds(Q4, 8, 1152):.1f} times",
        f"{128 * 4096 * 2 / 1e6:.1f} MB at batch 128 of Qwen3-235B-A22B",
        f"take {large / 450e6:.2f} ms over NVLink and {large / 50e6:.1f} ms over 400 Gb/s",
        "up to 73 %" if "(73%)" in block("communication") else "",
    }
    text = " ".join(PAGE.split())
    assert all(phrase and phrase in text for phrase in said), [p for p in said if p not in text]
