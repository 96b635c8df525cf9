"""`RowBatch` against each request alone: by `decode_loop`, and by `generate` where it samples."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, Qwen3ForCausalLM, StoppingCriteriaList

import trimkv_kernels as tk
from test_decode_loop import Tape, fake_graphs
from test_models import make
from test_patch import BUDGET, batch, trimkv
from test_rows import alone, kept, patched

LENGTHS = (11, 40, 7, 23, 30, 5)
NEW = (40, 12, 25, 9, 18, 31)


def prompt(number: int) -> Tensor:
    return batch((0,), LENGTHS[number], seed=number)[0]


def serve(rows: tk.RowBatch, requests: list[dict[str, Any]]) -> list[tuple[tk.Request, Any]]:
    """Admit requests as rows get free; each with what it kept at its end."""
    waiting, done = list(enumerate(requests)), {}
    while waiting or rows.is_running:
        while waiting and rows.num_free:
            number, options = waiting.pop(0)
            request = rows.admit(prompt(number), **options)
            assert request.number == number
        for request in rows.step():
            if request.is_finished:
                done[request.number] = request, kept(rows.cache, request.row)
    return [done[number] for number in sorted(done)]


def check_alone(
    model: Qwen3ForCausalLM, handle: tk.PatchHandle, served: list[tuple[tk.Request, Any]]
) -> None:
    assert len(served) == len(NEW)
    for number, (request, positions) in enumerate(served):
        assert (request.tokens, positions) == alone(model, handle, prompt(number), NEW[number])
        assert (request.finish_reason, request.error) == ("length", None)


def memory(rows: tk.RowBatch) -> tuple[int, list[int]]:
    """Bytes of the rows, and the address of every tensor that holds their state."""
    storages = rows.cache.slots.storages
    state = [tensor for storage in storages for _, tensor in storage.named_state()]
    return rows.stats().bytes_held, [tensor.data_ptr() for tensor in state]


GREEDY = [{"max_new_tokens": new, "do_sample": False, "eos_token_id": None} for new in NEW]


@pytest.mark.parametrize("name", ["trimkv", "h2o", "snap_kv", "key_norm", "shared"])
def test_requests_over_two_rows_are_what_each_is_alone(name: str, qwen3: Qwen3ForCausalLM) -> None:
    handle = patched(name, qwen3)
    rows = tk.RowBatch(qwen3, rows=2)
    held = memory(rows)
    served = serve(rows, GREEDY)
    assert memory(rows) == held
    check_alone(qwen3, handle, served)


@pytest.mark.parametrize("name", ["trimkv", "key_norm", "h2o"])
def test_a_captured_step_serves_requests(
    name: str, qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = patched(name, qwen3)
    with monkeypatch.context() as device:
        tapes: list[Tape] = fake_graphs(device)
        served = serve(tk.RowBatch(qwen3, rows=2), GREEDY)
        assert len(tapes) == 1
        assert tapes[0].replays > 50
    check_alone(qwen3, handle, served)


def test_prompts_in_chunks_and_pins(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find(self, input_ids: Tensor, valid: Any, seen: Any) -> list[list[tuple[int, int]]]:
            first = int(input_ids[0, 0])  # another number of spans in each request
            return [[(2 + 3 * i, 3 + 3 * i) for i in range(first % 3)] if seen == [0] else []]

    handle = tk.patch(qwen3, trimkv(qwen3), prefill_chunk=16, **BUDGET)
    object.__setattr__(handle.options, "finders", (Finder(),))
    with monkeypatch.context() as device:
        tapes = fake_graphs(device)
        served = serve(tk.RowBatch(qwen3, rows=2), GREEDY)
        assert 1 <= len(tapes) <= 3  # again when the table of pins grew
    check_alone(qwen3, handle, served)


SAMPLING: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 1.7, "top_k": 0, "seed": 3},
    {"do_sample": False, "repetition_penalty": 1.5},
    {"do_sample": True, "top_k": 5, "top_p": 0.8, "seed": 4},
    {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 8},
    {"do_sample": True, "top_k": 0, "typical_p": 0.9, "seed": 3},
    {"do_sample": False},
]


def test_each_row_samples_and_ends_by_its_own_options(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    expected = []
    for number, (options, new) in enumerate(zip(SAMPLING, NEW, strict=True)):
        free = generate(qwen3, number, options, {"max_new_tokens": new, "eos_token_id": None})
        options["eos_token_id"] = [free[len(free) // 2], 95]
        options["max_new_tokens"] = new
        expected.append(generate(qwen3, number, options))
    served = serve(tk.RowBatch(qwen3, rows=3), SAMPLING)
    assert [request.tokens for request, _ in served] == expected
    for request, _ in served:
        has_eos = request.tokens[-1] in SAMPLING[request.number]["eos_token_id"]
        assert request.finish_reason == ("eos" if has_eos else "length")
    assert {request.finish_reason for request, _ in served} >= {"eos"}


def generate(model: Qwen3ForCausalLM, number: int, *options: dict[str, Any]) -> list[int]:
    """What ``generate`` makes of a prompt that has the model to itself."""
    given = {key: value for part in options for key, value in part.items()}
    torch.manual_seed(given.pop("seed", 0))
    ids = prompt(number)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    return out[0, ids.shape[1] :].tolist()


def test_a_request_can_fail_stop_or_be_cancelled_alone(qwen3: Qwen3ForCausalLM) -> None:
    handle = patched("trimkv", qwen3)
    rows = tk.RowBatch(qwen3, rows=4)

    def failing(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > LENGTHS[1] + 3:
            raise ZeroDivisionError("its own")
        return scores

    def stopping(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor([ids.shape[1] >= LENGTHS[2] + 6])

    requests = [
        rows.admit(prompt(0), **GREEDY[0]),
        rows.admit(prompt(1), logits_processor=LogitsProcessorList([failing]), **GREEDY[1]),
        rows.admit(prompt(2), stopping_criteria=StoppingCriteriaList([stopping]), **GREEDY[2]),
        rows.admit(prompt(4), **GREEDY[4]),
    ]
    assert [rows.num_free, rows.running] == [0, requests]
    for count in range(NEW[0]):
        if count == 5:
            rows.cancel(requests[3])
            rows.cancel(requests[3])
        rows.step()
    assert not rows.is_running
    assert rows.step() == []
    reasons = [request.finish_reason for request in requests]
    assert reasons == ["length", "error", "criteria", "cancelled"]
    assert isinstance(requests[1].error, ZeroDivisionError)
    for request, number, made in zip(requests, (0, 1, 2, 4), (40, 4, 6, 6), strict=True):
        assert request.tokens == alone(qwen3, handle, prompt(number), made)[0]
    with pytest.raises(ValueError, match="request must be one of this batch's"):
        rows.cancel(tk.RowBatch(qwen3, rows=1).admit(prompt(0), max_new_tokens=2))


def test_run_yields_requests_as_they_finish(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    options = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None}
    prompts = [prompt(number)[0].tolist() for number in range(6)]
    served = list(tk.RowBatch(qwen3, rows=4).run(iter(prompts), seed=5, **options))
    assert sorted(request.number for request in served) == list(range(6))
    for request in served:
        seeded = {**options, "seed": 5 + request.number}
        assert request.tokens == generate(qwen3, request.number, seeded)
    with torch.inference_mode():
        single = tk.RowBatch(qwen3, rows=1)
        assert len(next(single.run(prompts, max_new_tokens=3, eos_token_id=None)).tokens) == 3
    assert len(next(single.run(prompts, max_new_tokens=3, eos_token_id=None)).tokens) == 3
    single = tk.RowBatch(qwen3, rows=1).run(prompts, max_new_tokens=1)
    assert [request.number for request in single] == list(range(6))


def test_a_step_that_broke_off_is_noticed(qwen3: Qwen3ForCausalLM) -> None:
    handle = patched("trimkv", qwen3)
    rows = tk.RowBatch(qwen3, rows=2)
    request = rows.admit(prompt(0), **GREEDY[0])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = qwen3.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        rows.step()
    hook.remove()
    with pytest.raises(ValueError, match=r"the call before broke off.*reset\(\)"):
        rows.step()
    rows.reset()
    assert request.finish_reason == "cancelled"
    again = rows.admit(prompt(1), **GREEDY[1])
    while rows.is_running:
        rows.step()
    assert again.tokens == alone(qwen3, handle, prompt(1), NEW[1])[0]


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "Phi-3"])
def test_other_families(name: str) -> None:
    model = make(name)
    handle = tk.patch(model, "streaming_llm", **{**BUDGET, "recent": None})
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    served = list(tk.RowBatch(model, rows=2).run([prompt(i) for i in range(3)], **options))
    for request in served:
        tokens = tk.decode_loop(
            model, prompt(request.number), max_new_tokens=30, eos_token_id=(),
            past_key_values=handle.new_cache(),
        )  # fmt: skip
        assert request.tokens == [int(token) for token in tokens]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_new_tokens must be given, got None"),
        ({"max_new_tokens": 4, "num_beams": 2}, "greedy decoding or sampling, got beam_search"),
        ({"max_new_tokens": 4, "prompt_lookup_num_tokens": 2}, "got assisted_generation"),
        ({"max_new_tokens": 4, "guidance_scale": 2.0}, "guidance_scale must be 1 in a batch"),
        ({"max_new_tokens": 4, "attention_mask": 1, "b": 2}, "got attention_mask, b"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, qwen3: Qwen3ForCausalLM) -> None:
    patched("trimkv", qwen3)
    rows = tk.RowBatch(qwen3, rows=1)
    with pytest.raises(ValueError, match=message):
        rows.admit(prompt(0), **options)
    assert rows.num_free == 1


def test_bad_prompts_rows_and_models(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    with pytest.raises(ValueError, match="model must be patched"):
        tk.RowBatch(stock, rows=2)
    handle = tk.patch(qwen3, "full", budget=32)
    rows = tk.RowBatch(qwen3, rows=1)
    for bad in (torch.zeros(2, 5, dtype=torch.int64), [], torch.zeros(3), torch.tensor(4)):
        with pytest.raises(ValueError, match=r"prompt must be int64 \[length >= 1\]"):
            rows.admit(bad, max_new_tokens=3)
    with pytest.raises(ValueError, match="it holds budget=32 tokens, got 4, which needs 33"):
        rows.admit(prompt(4), max_new_tokens=4)
    rows.admit(prompt(4), max_new_tokens=3, eos_token_id=None)
    with pytest.raises(ValueError, match="all 1 rows are taken"):
        rows.admit(prompt(0), max_new_tokens=3)
    assert handle.stats().tokens_seen == [30]
    qwen3.train()
    with pytest.raises(ValueError, match=r"must be in eval mode"):
        tk.RowBatch(qwen3, rows=1)
