"""``vllm serve`` on bounded rows, and what clients do to it."""

import importlib
import threading
import time
from typing import Any

import openai
import pytest
import torch
from vllm.config import CompilationConfig
from vllm.engine.arg_utils import EngineArgs

from conftest import Server, overrides, run_alone
from trimkv_kernels import TrimKV
from trimkv_kernels.embedded import EMBEDDED_MODEL
from trimkv_kernels.integrations.vllm.plugin import OP, register

ROWS = 8  # of the server


def client_of(server: Server) -> openai.OpenAI:
    address = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=address, api_key="none", timeout=300, max_retries=0)


def prompt(number: int, length: int) -> list[int]:
    return [5 + (7 * number + 3 * index + index * index // 5) % 55 for index in range(length)]


def ask(server: Server, number: int, length: int, new: int, **options: Any) -> Any:
    return client_of(server).completions.create(
        model="embedded", prompt=prompt(number, length), max_tokens=new, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True}, **options,
    )  # fmt: skip


def stream(server: Server, number: int, length: int, new: int) -> list[int]:
    """The tokens of a request that is streamed."""
    tokens = []
    for chunk in ask(server, number, length, new, stream=True):
        tokens += chunk.choices[0].model_extra["token_ids"]
    return tokens


def streams(server: Server, sizes: list[tuple[int, int]]) -> list[list[int]]:
    """The tokens of requests ``(length, new)`` that are streamed at once."""
    found: list[Any] = [None] * len(sizes)

    def run(number: int) -> None:
        found[number] = stream(server, number, *sizes[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def check(embedded: Any, sizes: list[tuple[int, int]], found: list[list[int]]) -> None:
    own = TrimKV.from_pretrained(EMBEDDED_MODEL / "retention_gates")
    for number, ((length, new), tokens) in enumerate(zip(sizes, found, strict=True)):
        alone = run_alone(embedded, prompt(number, length), new, own, budget=48, buffer=16)
        alone.check(tokens)


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") or server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_streams_at_once(server: Server, embedded: Any) -> None:
    sizes = [(20 + 30 * number, 120 - 10 * number) for number in range(ROWS)]
    check(embedded, sizes, streams(server, sizes))


def test_more_requests_than_rows(server: Server, embedded: Any) -> None:
    sizes = [(5 + 17 * (number % 7), 30 + 9 * (number % 5)) for number in range(3 * ROWS)]
    check(embedded, sizes, streams(server, sizes))
    wait_until_idle(server)
    assert server.metric("vllm:num_preemptions_total") == 0  # a row never needs more memory


def test_a_client_hangs_up(server: Server, embedded: Any) -> None:
    answers = [ask(server, number, 60, 900, stream=True) for number in range(ROWS)]
    for answer in answers:
        next(iter(answer))
        answer.close()
    sizes = [(90, 40), (33, 60)]
    check(embedded, sizes, streams(server, sizes))
    wait_until_idle(server)


def test_bad_requests(server: Server, embedded: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(server, 0, 2000, 10)
    with pytest.raises(openai.BadRequestError):
        ask(server, 0, 10, -1)
    with pytest.raises(openai.NotFoundError):
        client_of(server).completions.create(model="other", prompt="a")
    check(embedded, [(50, 30)], streams(server, [(50, 30)]))


def test_text_in_and_out(server: Server) -> None:
    answer = client_of(server).completions.create(
        model="embedded", prompt="the code of", max_tokens=8, temperature=0
    )
    assert answer.usage.completion_tokens <= 8
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_killed_and_started_again(server: Server, embedded: Any) -> None:
    answer = ask(server, 0, 60, 900, stream=True)
    next(iter(answer))
    server.kill()
    with pytest.raises(Exception, match=r".*"):  # httpx's or openai's, as it finds the connection
        list(answer)
    server.start()
    check(embedded, [(70, 60)], streams(server, [(70, 60)]))


def test_the_log_tells_of_rows(server: Server) -> None:
    assert "trimkv: policy trimkv, budget 48, buffer 16" in server.log


REFUSED = {
    "prefix caching": {"enable_prefix_caching": True},
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}
    },
    "LoRA": {"enable_lora": True},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "another dtype of the cache": {"kv_cache_dtype": "fp8"},
    "multiple of buffer=16, got 40": {"trimkv": {"budget": 40, "buffer": 16}},
    "unknown policy 'h3o'.*Did you mean 'h2o'": {"trimkv": {"policy": "h3o"}},
    "needs the attention that each pair receives": {"trimkv": {"policy": "h2o"}},
    "got 'bugdet'. Did you mean 'budget'": {"trimkv": {"bugdet": 48}},
    "options of policy 'random' do not fit": {
        "trimkv": {"policy": "random", "options": {"sed": 1}}
    },
    "has no gates": {"trimkv": {"policy": "key_norm", "gates": "folder"}},
    "policy must be a registered name, got 3": {"trimkv": {"policy": 3}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_is_refused_in_words(message: str) -> None:
    options = dict(REFUSED[message])
    trimkv = options.pop("trimkv", {"policy": "key_norm"})
    arguments = EngineArgs(
        model=str(EMBEDDED_MODEL), dtype="float32", hf_overrides=overrides("Qwen3", **trimkv),
        **options,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        arguments.create_engine_config()


def test_stock_models_are_untouched() -> None:
    config = EngineArgs(model=str(EMBEDDED_MODEL), dtype="float32").create_engine_config()
    assert config.model_config.architecture == "Qwen3ForCausalLM"
    assert not config.model_config.is_attention_free


def test_graphs_are_split_at_the_layers() -> None:
    register()
    register()
    importlib.import_module("trimkv_kernels.integrations.vllm.layer")
    assert CompilationConfig._attention_ops.count(OP) == 1
    namespace, name = OP.split("::")
    assert hasattr(getattr(torch.ops, namespace), name)
