"""`make compare`: its measures by hand, its protocol, and a small run of it."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import trimkv_kernels as tk
from trimkv_kernels.embedded import FIRST_HELD_OUT_SEED, make_recall_text, recall
from trimkv_kernels.policies import available_policies
from trimkv_kernels.testing import embedded_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def load(name: str) -> Any:
    return importlib.import_module(f"compare.{name}")


def small(**changes: Any) -> Any:
    options = {"budgets": {200: (24, 64)}, "texts": 2, "questions": 1, "answer": 4}
    return load("measure").Protocol(**{**options, "continuation": 8, **changes})


def test_divergence_and_agreement_by_hand() -> None:
    full = torch.tensor([[[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [1.0, 1.0, 1.0]]]).log()
    bounded = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [9.0, 1.0, 1.0]]]).log()
    counted = torch.tensor([[True, True, False]])
    first = 0.7 * math.log(7 / 5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(1 / 2)
    second = 0.2 * math.log(1 / 3) + 0.5 * math.log(5) + 0.3 * math.log(1)
    # logits may be shifted by any constant
    divergence, agreement = load("measure").mean_divergence(full + 3, bounded - 2, counted)
    assert divergence == pytest.approx((first + second) / 2, rel=1e-6)
    assert agreement == 0.5


def test_tokens_that_are_ruled_out_add_nothing_to_the_divergence() -> None:
    full = torch.tensor([[[0.7, 0.3, 0.0], [0.5, 0.5, 0.0]]]).log()
    bounded = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]]).log()
    counted = torch.ones(1, 2, dtype=torch.bool)
    first = 0.7 * math.log(7 / 5) + 0.3 * math.log(3 / 5)
    divergence, agreement = load("measure").mean_divergence(full, bounded, counted)
    assert divergence == pytest.approx((first + 0.5 * math.log(2)) / 2, rel=1e-6)
    assert agreement == 0.5


def test_repetition_by_hand() -> None:
    repetition = load("measure").repetition
    assert repetition([[1, 2, 3, 4, 5, 6]]) == 0
    assert repetition([[7] * 6]) == pytest.approx(2 / 3)  # three 4-grams, one of them new
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repetition([[7] * 6, [1, 2, 3, 4, 5, 6]]) == pytest.approx(2 / 6)


def test_answer_length_by_hand() -> None:
    answers = torch.tensor([[5, 9, 9, 9], [9, 5, 9, 5], [1, 2, 3, 4], [1, 2, 3, 9]])
    assert load("measure").answer_tokens(answers, end=9) == (2 + 1 + 4 + 4) / 4


@pytest.mark.parametrize(("budget", "first"), [(12, 16), (13, 32), (28, 32), (29, 48)])
def test_first_token_after_an_eviction(budget: int, first: int) -> None:
    # chunks of 16; a head that holds budget + 4 after one is cut, and the next chunk feels it
    protocol = small(budgets={512: (budget,)})
    assert protocol.first_bounded(512, budget) == first


def test_a_text_within_the_budget_is_refused() -> None:
    protocol = small(budgets={512: (16, 492, 493, 512)})
    assert protocol.bounding(512) == (16, 492)
    with pytest.raises(ValueError, match="a text longer than budget \\+ buffer = 497, got 512"):
        protocol.first_bounded(512, 493)


def test_generate_leaves_the_cache_as_it_was() -> None:
    generate = load("measure").generate
    model, tokenizer = embedded_model()
    text = make_recall_text(200, seed=FIRST_HELD_OUT_SEED)
    prompt = tokenizer(text.prompt(text.questions[0]), return_tensors="pt").input_ids
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
    stock = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt[:, :-1], past_key_values=stock)
    for _ in range(2):
        answer = generate(model, stock, prompt[:, -1:], 8, end=tokenizer.eos_token_id)
        assert torch.equal(answer, expected[:, prompt.shape[1] :])
    assert generate(model, stock, prompt[:, -1:], 8).shape == (1, 8)
    with tk.patch(model, "h2o", budget=24, buffer=4) as handle, torch.inference_mode():
        bounded = handle.new_cache()
        model(prompt, past_key_values=bounded)
        before = [bounded.positions(layer).clone() for layer in range(2)]
        generate(model, bounded, prompt[:, -1:], 8)
        assert all(torch.equal(bounded.positions(n), before[n]) for n in range(2))


def test_every_policy_is_compared_or_left_out_with_a_reason() -> None:
    module = load("contestants")
    compared, left_out = set(module.contestants()), module.left_out()
    assert {"random", "streaming_llm", "key_norm", "key_norm_large", "key_diff"} <= compared
    assert set(available_policies()) <= compared | set(left_out)
    assert not compared & set(left_out)
    assert all(left_out.values())


@pytest.mark.parametrize("budget", [16, 48, 512])
def test_every_contestant_can_be_made(budget: int) -> None:
    for name, make in load("contestants").contestants().items():
        assert make(budget).is_affine in (True, False), name


def test_age_alone_is_streaming_llm_and_beta_alone_forgets_age() -> None:
    module = load("contestants")
    trimkv = tk.TrimKV(_gates())
    model, tokenizer = embedded_model()
    ids = tokenizer(make_recall_text(200, seed=1).text, return_tensors="pt").input_ids

    def kept(policy: Any, **protection: int) -> torch.Tensor:
        with tk.patch(model, policy, budget=32, buffer=4, **protection) as handle:
            cache = handle.new_cache()
            with torch.inference_mode():
                model(ids, past_key_values=cache)
            return cache.positions(0)[0, 0, :32].sort().values

    protection = {"sinks": 1, "recent": 2}
    streaming = kept("streaming_llm", **protection)
    assert streaming.tolist() == [0, *range(169, 200)]
    assert torch.equal(kept(module.AgeAlone(), **protection), streaming)
    # layer 0 reads the same hidden states whatever was kept
    attention = model.model.layers[0].input_layernorm
    with torch.inference_mode():
        log_beta = trimkv.gates(0, attention(model.model.embed_tokens(ids)))[0, 0]
    best = log_beta.topk(32).indices.sort().values
    assert torch.equal(kept(module.BetaAlone(trimkv), sinks=0, recent=0).long(), best)


def _gates() -> Any:
    from trimkv_kernels.gates import GateConfig, RetentionGates

    torch.manual_seed(0)
    config = GateConfig(
        kind="rg", hidden_size=128, intermediate_size=8, num_layers=2, num_kv_heads=2
    )
    return RetentionGates(config)


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return load("measure").Bench(small())
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_recall_and_bytes_are_those_of_the_public_functions(bench: Any) -> None:
    policy = load("contestants").contestants()["key_diff"](64)
    outcome = bench.run("key_diff", policy, 200, 64)
    texts = [
        make_recall_text(200, seed=FIRST_HELD_OUT_SEED + i, spacing=(20, 28)) for i in range(2)
    ]
    model, tokenizer = embedded_model()
    assert bench.run_full(200).recall == recall(model, tokenizer, texts)
    with tk.patch(model, "key_diff", budget=64, buffer=4, sinks=1, recent=2) as handle:
        # one question token at a time: evictions fall due on the same ones
        expected = recall(model, tokenizer, texts, new_cache=handle.new_cache, context_chunk=16)
    assert outcome.recall == expected
    assert outcome.kv_bytes == 2 * 2 * 2 * (64 + 4) * 32 * 4  # k and v, layers, heads, slots, fp32
    assert outcome.kv_bytes < outcome.state_bytes < 1.1 * outcome.kv_bytes


def test_the_full_cache_diverges_from_itself_by_nothing(bench: Any) -> None:
    full = bench.run_full(200)
    assert full.kl == pytest.approx(0, abs=1e-12)
    assert full.top1 == 1
    assert full.answer_tokens == 3
    policies = load("contestants").contestants()
    small_budget = bench.run("random", policies["random"](24), 200, 24)
    large_budget = bench.run("random", policies["random"](64), 200, 64)
    assert small_budget.kl > large_budget.kl > 1e-3
    assert small_budget.top1 < 1


def test_unequal_bytes_are_found(bench: Any) -> None:
    check = load("run").check_equal_bytes
    full = bench.run_full(200)
    check([full, full])
    more = type(full)(**{**vars(full), "kv_bytes": full.kv_bytes + 4})
    with pytest.raises(RuntimeError, match="of keys and values"):
        check([full, more])


def outcome(name: str, budget: int | None, share: float) -> Any:
    fields = {"kl": 0.0, "top1": 1.0, "answer_tokens": 3.0, "repetition": 0.0}
    sizes = {"kv_bytes": 1, "state_bytes": 1, "recall_by_text": [share]}
    return load("measure").Outcome(name, 512, budget, recall=share, **fields, **sizes)


def test_goals_are_judged() -> None:
    report = load("report")
    protocol = small(budgets={512: (16, 32, 64)})
    rows = [outcome("full", None, 1.0)]
    for budget, own, random, h2o in ((16, 0.5, 0.4, 0.6), (32, 0.9, 0.7, 0.71), (64, 0.96, 0, 0)):
        rows += [
            outcome("trimkv", budget, own),
            outcome("random", budget, random),
            outcome("h2o", budget, h2o),
        ]
    judged = report.goals(report.Results(protocol, rows))
    assert [(goal.budget, goal.met) for goal in judged] == [
        (64, False),
        (32, True),
        (32, False),
        (16, False),
    ]
    assert judged[2].measured == "+19.0 points against h2o (71.0%)"
    assert (
        report.goals(report.Results(protocol, [r for r in rows if r.contestant != "trimkv"])) == []
    )


def test_tables_go_between_the_markers() -> None:
    report = load("report")
    page = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    assert report.insert(page, "new") == f"above\n{report.BEGIN}\n\nnew\n\n{report.END}\nbelow\n"
    with pytest.raises(ValueError, match="page: expected the markers"):
        report.insert("above\n", "new")
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert page.count(report.BEGIN) == page.count(report.END) == 1


def test_a_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["compare", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--policy", "random", "key_diff"])
    load("__main__").main()
    record = json.loads((tmp_path / "compare.json").read_text())
    runs = [("full", 256, None)]
    runs += [(name, 256, budget) for name in ("random", "key_diff") for budget in (16, 32)]
    for part, sinks in (("protected", 1), ("unprotected", 0)):
        outcomes = record[part]["outcomes"]
        assert [(o["contestant"], o["num_tokens"], o["budget"]) for o in outcomes] == runs
        assert record[part]["protocol"]["sinks"] == sinks
    assert record["torch"] == torch.__version__
    tables = (tmp_path / "compare.md").read_text()
    assert "| random |" in tables
    assert "refused" in tables  # 256 tokens never exceed a budget of 256
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_a_run_does_not_touch_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "--quick"])
    with pytest.raises(SystemExit):
        load("__main__").main()
