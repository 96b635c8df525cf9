"""Perplexity, divergence and the lm-eval adapter against a token at a time, and by hand."""

import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import lm_eval_stub
import trimkv_kernels as tk
from trimkv_kernels.embedded import (
    EMBEDDED_MODEL,
    FIRST_HELD_OUT_SEED,
    embedded_model,
    make_recall_text,
)
from trimkv_kernels.evaluation import compare_logits, kl, perplexity
from trimkv_kernels.gates.checkpoint import download_wandb

OPTIONS: dict[str, Any] = {"budget": 12, "buffer": 4, "sinks": 2, "recent": 2}


def text(tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def one_by_one(model: Qwen3ForCausalLM, input_ids: Tensor, policy: str) -> Tensor:
    """Logits of a text that is read a token at a time, float64 ``[tokens, vocab]``."""
    with tk.patch(model, policy, **OPTIONS) as handle:
        cache = handle.new_cache()
        logits = [
            model(input_ids=input_ids[:, i : i + 1], past_key_values=cache).logits[0]
            for i in range(input_ids.shape[1])
        ]
    return torch.cat(logits).double()


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    picked = logits[torch.arange(len(targets)), targets]
    return logits.exp().sum(-1).log() - picked


@pytest.mark.parametrize("policy", ["streaming_llm", "key_norm", "h2o"])
def test_perplexity_is_that_of_a_token_at_a_time(qwen3: Qwen3ForCausalLM, policy: str) -> None:
    input_ids = text(70)
    loss = nll(one_by_one(qwen3, input_ids[:, :-1], policy), input_ids[0, 1:])
    result = perplexity(qwen3, input_ids, policy, **OPTIONS)
    assert (result.policy, result.budget, result.buffer) == (policy, 12, 4)
    assert (result.tokens, result.bounded_tokens) == (70, 69 - 16)
    assert result.loss == pytest.approx(loss.mean().item(), abs=1e-5)
    assert result.bounded_loss == pytest.approx(loss[16:].mean().item(), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)


@pytest.mark.parametrize("policy", ["streaming_llm", "random"])
def test_divergence_is_the_formula_over_the_predictions_after_an_eviction(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM, policy: str
) -> None:
    input_ids = text(150)  # blocks of logits are shorter than the calls
    with torch.no_grad():
        full = stock(input_ids=input_ids[:, :-1], use_cache=False).logits[0].double()
    bounded = one_by_one(qwen3, input_ids[:, :-1], policy)
    p, q = full.softmax(-1), bounded.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[16:]
    result = kl(qwen3, input_ids, policy, **OPTIONS)
    assert result.bounded_tokens == 149 - 16
    assert result.kl == pytest.approx(expected.mean().item(), abs=1e-5)
    assert result.largest_kl == pytest.approx(expected.max().item(), abs=1e-4)
    assert result.kl > 0.1
    assert result.top1 == (p.argmax(-1) == q.argmax(-1))[16:].double().mean().item()
    targets = input_ids[0, 1:]
    assert result.full_loss == pytest.approx(nll(full, targets)[16:].mean().item(), abs=1e-5)
    assert result.bounded_loss == pytest.approx(nll(bounded, targets)[16:].mean().item(), abs=1e-5)


@pytest.mark.parametrize("measure", [perplexity, kl])
def test_a_chunk_of_the_buffer_evicts_as_single_tokens_do(
    qwen3: Qwen3ForCausalLM, measure: Callable[..., Any]
) -> None:
    input_ids = text(100)
    single, chunked = (
        vars(measure(qwen3, input_ids, "key_norm", chunk=chunk, **OPTIONS)) for chunk in (1, 4)
    )
    assert (single.pop("chunk"), chunked.pop("chunk")) == (1, 4)
    assert chunked == pytest.approx(single, abs=1e-4)
    coarse = measure(qwen3, input_ids, "key_norm", chunk=24, **OPTIONS)
    assert coarse.bounded_tokens == 99 - 24  # the first eviction follows a whole chunk


def test_before_the_first_eviction_nothing_differs(
    qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    input_ids = text(18)
    result = perplexity(qwen3, input_ids, "streaming_llm", **OPTIONS)
    with torch.no_grad():
        loss = nll(stock(input_ids=input_ids[:, :-1]).logits[0].double(), input_ids[0, 1:])
    assert result.bounded_tokens == 1
    unbounded = (17 * result.loss - result.bounded_loss) / 16
    assert unbounded == pytest.approx(loss[:16].mean().item(), abs=1e-5)


@pytest.mark.parametrize("measure", [perplexity, kl])
@pytest.mark.parametrize(("tokens", "chunk", "least"), [(17, 1, 18), (25, 24, 26)])
def test_a_text_within_the_budget_is_refused(
    qwen3: Qwen3ForCausalLM, measure: Callable[..., Any], tokens: int, chunk: int, least: int
) -> None:
    message = f"at least {least} tokens at budget=12, buffer=4, chunk={chunk}, got {tokens};"
    with pytest.raises(ValueError, match=message):
        measure(qwen3, text(tokens), "streaming_llm", chunk=chunk, **OPTIONS)
    longer = measure(qwen3, text(tokens + 1), "streaming_llm", chunk=chunk, **OPTIONS)
    assert longer.bounded_tokens == 1
    assert "forward" not in vars(qwen3.model.layers[0].self_attn)  # unpatched, both times


def test_bad_arguments_are_named(qwen3: Qwen3ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"input_ids must have shape .* got \[2, 50\]"):
        perplexity(qwen3, text(50).repeat(2, 1), **OPTIONS)
    with pytest.raises(ValueError, match="chunk must be an int of at least 1, got 0"):
        kl(qwen3, text(50), "random", chunk=0, **OPTIONS)
    with pytest.raises(TypeError, match="must have a language-model head"):
        kl(qwen3.model, text(50), "random", **OPTIONS)
    with pytest.raises(ValueError, match="must have one shape"):
        compare_logits(torch.zeros(2, 3), torch.zeros(2, 4))


def test_compare_logits_by_hand() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]), torch.tensor([[0.5, 0.3, 0.2]] * 2)
    divergence, same = compare_logits(p.double().log(), 3 + q.double().log())
    # sum p ln(p / q); a token without probability adds nothing
    worked = [0.085123, 0.5 * math.log(1.0) + 0.5 * math.log(0.5 / 0.3)]
    assert divergence.tolist() == pytest.approx(worked, abs=1e-6)
    assert same.tolist() == [True, True]
    assert compare_logits(p[:1].log(), -p[:1].log())[1].tolist() == [False]


def test_compare_logits_where_tokens_are_ruled_out() -> None:
    full = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, -800.0], [0.0, 0.0, 0.0]])
    bounded = torch.tensor([[0.0, 0.0, -torch.inf]] * 3)
    # ruled out by both; by one, whose probability elsewhere is below the smallest float64; by one
    assert compare_logits(full, bounded)[0].tolist() == [0.0, 0.0, math.inf]


@pytest.fixture(scope="module")
def model_class() -> Any:
    """The adapter on lm-eval itself where that is installed, else on what it takes from it."""
    if importlib.util.find_spec("lm_eval") is None:
        lm_eval_stub.install()
    from trimkv_kernels.evaluation.lm_eval import TrimKVLM

    return TrimKVLM


def request(*args: Any, task: str = "recall") -> Any:
    return SimpleNamespace(args=args, task_name=task)


def words(tokens: int, seed: int = 0) -> str:
    return make_recall_text(tokens, seed=FIRST_HELD_OUT_SEED + seed).text


def bounded_model(model_class: Any, **options: Any) -> Any:
    model, tokenizer = embedded_model()
    settings = {"policy": "streaming_llm", "budget": 24, "buffer": 8, **options}
    return model_class(pretrained=model, tokenizer=tokenizer, **settings)


@torch.no_grad()
def expected_score(lm: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The context but its last token as a prompt, all else a token at a time."""
    cache, ids = lm.handle.new_cache(), torch.tensor([context + continuation])
    if len(context) > 1:
        for part in ids[:, : len(context) - 1].split(lm.prefill_chunk or len(context), dim=1):
            lm.model(input_ids=part, past_key_values=cache)
    total, is_greedy = 0.0, True
    for i in range(len(context) - 1, ids.shape[1] - 1):
        logits = lm.model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[ids[0, i + 1]])
        is_greedy &= int(logits.argmax()) == int(ids[0, i + 1])
    return total, is_greedy


@pytest.mark.parametrize("prefill_chunk", [None, 16])
@pytest.mark.parametrize("policy", ["streaming_llm", "h2o"])
def test_loglikelihood_is_that_of_a_token_at_a_time(
    model_class: Any, policy: str, prefill_chunk: int | None
) -> None:
    lm = bounded_model(model_class, policy=policy, prefill_chunk=prefill_chunk, batch_size=2)
    long, short = words(200), words(26, seed=1)
    answers = [" amber", " copper", " the baker saw the mill . " + words(40, seed=2)]
    requests = [request(long, answer) for answer in answers]
    requests += [request(short, " gold ."), request(short, " " + words(60, seed=3))]
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(
        (request.args for request in requests), scores, strict=True
    ):
        ids = lm.tok_encode(context)
        rest = lm.tok_encode(context + continuation)[len(ids) :]
        expected, expected_greedy = expected_score(lm, ids, rest)
        assert score == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert is_greedy == expected_greedy


def test_loglikelihood_depends_on_what_was_evicted(model_class: Any) -> None:
    source = make_recall_text(300, seed=FIRST_HELD_OUT_SEED)
    requests = [
        request(source.prompt(question), f" {question.answer}") for question in source.questions
    ]
    bounded = bounded_model(model_class).loglikelihood(requests, disable_tqdm=True)
    model, tokenizer = embedded_model()
    for request_, (score, _) in zip(requests, bounded, strict=True):
        ids = tokenizer(request_.args[0] + request_.args[1], return_tensors="pt").input_ids
        with torch.no_grad():
            full = model(input_ids=ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item()
        assert full > -0.1  # known with the full cache, and one token long
        assert score < full
    assert sum(is_greedy for _, is_greedy in bounded) < len(bounded) / 2


def test_rolling_loglikelihood_is_the_sum_over_a_text(model_class: Any) -> None:
    lm = bounded_model(model_class, batch_size=2)
    texts = [words(120), words(33, seed=1)]
    scores = lm.loglikelihood_rolling([request(text) for text in texts], disable_tqdm=True)
    for text_, score in zip(texts, scores, strict=True):
        expected, _ = expected_score(lm, [lm.prefix_token_id], lm.tok_encode(text_))
        assert score == pytest.approx(expected, rel=1e-5)


def test_long_requests_lose_their_beginning(model_class: Any) -> None:
    lm = bounded_model(model_class, max_length=64)
    context, continuation = words(150), " gold ."
    ((score, _),) = lm.loglikelihood([request(context, continuation)], disable_tqdm=True)
    ids = lm.tok_encode(context + continuation)[-65:]
    assert score == pytest.approx(expected_score(lm, ids[:-2], ids[-2:])[0], rel=1e-5)


def test_tasks_that_never_exceed_the_budget_are_refused(model_class: Any) -> None:
    lm = bounded_model(model_class)
    long, short = words(60), words(31, seed=1)  # budget + buffer = 32
    message = r"task 'short' .* longest request reads 32 tokens, budget \+ buffer = 24 \+ 8;"
    with pytest.raises(ValueError, match=message):
        lm.loglikelihood(
            [request(long, " gold ."), request(short, " gold .", task="short")], disable_tqdm=True
        )
    lm.loglikelihood([request(short, " gold", task="long"), request(long, " gold", task="long")])
    with pytest.raises(ValueError, match="reads 32 tokens"):
        lm.loglikelihood_rolling([request(words(32))], disable_tqdm=True)
    with pytest.raises(ValueError, match="reads 32 tokens"):
        lm.generate_until([request(short, {"max_new_tokens": 2, "until": []})], disable_tqdm=True)


def test_generation_is_that_of_the_patched_model(
    model_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lm = bounded_model(model_class)
    prompt = words(80)
    options = {"max_gen_toks": 12, "until": [], "do_sample": False}
    (generated,) = lm.generate_until([request(prompt, options)], disable_tqdm=True)
    inputs = lm.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        expected = lm.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    continued = expected[0, inputs.input_ids.shape[1] :]
    assert generated.split() == lm.tokenizer.decode(continued, skip_special_tokens=True).split()
    assert "evicted" not in caplog.text
    with caplog.at_level(logging.WARNING):  # the first word ends it
        lm.model.generation_config.eos_token_id = list(range(3, lm.model.config.vocab_size))
        lm.generate_until([request(words(16), {"max_gen_toks": 40})], disable_tqdm=True)
    assert "ended before anything was evicted" in caplog.text


def test_options_of_the_adapter(model_class: Any) -> None:
    with pytest.raises(ValueError, match="batch_size must be a number, got 'auto'"):
        bounded_model(model_class, batch_size="auto")
    with pytest.raises(ValueError, match="gates are for policy 'trimkv', got policy 'h2o'"):
        bounded_model(model_class, policy="h2o", gates=EMBEDDED_MODEL)
    from lm_eval.api.registry import get_model

    assert get_model("trimkv") is model_class


def test_importing_the_adapter_without_lm_eval_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("lm_eval", "lm_eval.api.registry", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)  # importing them now fails
    monkeypatch.delitem(sys.modules, "trimkv_kernels.evaluation.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'trimkv-kernels\[eval\]'"):
        importlib.import_module("trimkv_kernels.evaluation.lm_eval")


class FakeWandb:
    """The two calls of wandb that fetch an artifact."""

    def __init__(self, artifacts: dict[str, Path]) -> None:
        self.artifacts = artifacts
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def Api(self) -> Any:
        return SimpleNamespace(artifact=self._artifact)

    def _artifact(self, name: str) -> Any:
        if name not in self.artifacts:
            raise self.errors.Error(f"artifact {name} not found")
        return SimpleNamespace(download=lambda root: root or str(self.artifacts[name]))


def test_gates_from_a_wandb_artifact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = EMBEDDED_MODEL / "retention_gates"
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb({"me/gates/small:v3": folder}))
    policy = tk.TrimKV.from_pretrained(download_wandb("me/gates/small:v3"))
    expected = tk.TrimKV.from_pretrained(folder)
    for ours, theirs in zip(policy.gates.parameters(), expected.gates.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert download_wandb("me/gates/small:v3", tmp_path) == tmp_path
    with pytest.raises(ValueError, match="got 'me/gates/none:v1': artifact .* not found"):
        download_wandb("me/gates/none:v1")


def test_wandb_is_imported_when_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails
    with pytest.raises(ImportError, match=r"pip install 'trimkv-kernels\[wandb\]'"):
        download_wandb("me/gates/small:v3")
