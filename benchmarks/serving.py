"""vLLM with a full cache against vLLM on bounded rows, at the same bytes for caches.

    VENV/bin/python benchmarks/serving.py [--out results.json] [--clients 32] [--prompt 1536] ...
    python benchmarks/serving.py --table results.json

Each contestant is a server of its own on SmolLM2-135M-Instruct in fp32, one after the other. As
many clients as are asked for send one request each at the same time, with a prompt of random words,
and stream the answer. The caches of every server have one GiB.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CACHE_GIB = 1
GiB = 2**30
POLICY = "trimkv"  # with the gates that ship for this model
CONTESTANTS: dict[str, dict[str, int] | None] = {
    "full cache": None,
    "256 + 64": {"budget": 256, "buffer": 64},
    "512 + 256": {"budget": 512, "buffer": 256},
}


@dataclass
class Answer:
    """One client's request: when it was sent, and when each token came."""

    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent

    @property
    def per_token(self) -> float:
        """Mean seconds from one token to the next."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)


@dataclass(frozen=True)
class Look:
    """One look at a server at work."""

    written: int  # tokens of all answers so far
    running: int  # requests at once
    resident: int  # bytes of its processes
    in_use: float  # share of the room for caches


class Server:
    """A server on its own, in a group of processes."""

    def __init__(self, folder: str, sizes: dict[str, int] | None, longest: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", folder),
            *("--served-model-name", "smollm2", "--port", str(self.port), "--dtype", "float32"),
            *("--host", "127.0.0.1", "--max-model-len", str(longest), "--enforce-eager"),
            *("--no-enable-prefix-caching", "--max-num-seqs", "128"),
        ]
        if sizes is not None:
            trimkv = {"policy": POLICY, "allocation": "uniform", **sizes}
            changes = {"architectures": ["TrimKVLlamaForCausalLM"], "trimkv": trimkv}
            command += ["--hf-overrides", json.dumps(changes)]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 600
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{self.log[-4000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            time.sleep(1)

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text("utf-8", errors="replace")

    def metric(self, name: str) -> float:
        """One number of its metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(name + "{"))

    def resident(self) -> int:
        """Bytes of memory that its processes hold; what they share counts once for each."""
        total = 0
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, ProcessLookupError):
                if entry.name.isdigit() and os.getpgid(int(entry.name)) == self._process.pid:
                    pages = int((entry / "statm").read_text().split()[1])
                    total += pages * os.sysconf("SC_PAGE_SIZE")
        return total

    def stop(self) -> None:
        """End it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=60)


def ask(client: Any, prompt: list[int], new: int, answer: Answer) -> None:
    """Stream one answer into ``answer``."""
    answer.sent = time.monotonic()
    chunks = client.completions.create(
        model="smollm2", prompt=prompt, max_tokens=new, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    for chunk in chunks:
        answer.tokens += [time.monotonic()] * len(chunk.choices[0].model_extra["token_ids"])


def look(server: Server, answers: list[Answer]) -> Look:
    """What the server does now."""
    return Look(
        written=sum(len(x.tokens) for x in answers),
        running=int(server.metric("vllm:num_requests_running")),
        resident=server.resident(),
        in_use=server.metric("vllm:kv_cache_usage_perc"),
    )


def over_length(looks: list[Look], total: int, parts: int = 8) -> list[dict[str, float]]:
    """Memory as the answers grow: the first look after each eighth of all tokens."""
    marks = [total * part // parts for part in range(1, parts)]
    found = [next(x for x in looks if x.written >= mark) for mark in marks]
    return [
        {"written": x.written, "resident_gib": round(x.resident / GiB, 2), "in_use": x.in_use}
        for x in found
    ]


def contest(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """All clients at once, and the figures of it."""
    import httpx
    import openai

    # one client for all threads: to make one takes a second of this process
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=7200, max_retries=0,
        http_client=httpx.Client(limits=httpx.Limits(max_connections=args.clients)),
    )  # fmt: skip
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 40000) for _ in range(args.prompt)] for _ in range(args.clients)]
    ask(client, prompts[0][:50], 8, Answer())  # whatever is made at first use
    at_rest = server.resident()
    answers = [Answer() for _ in prompts]
    threads = [
        threading.Thread(target=ask, args=(client, prompt, args.new, answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    begin, looks = time.monotonic(), []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        looks.append(look(server, answers))
        time.sleep(1)
    looks.append(look(server, answers))
    failed = sum(len(x.tokens) < args.new for x in answers)
    if failed:
        raise RuntimeError(f"{failed} requests failed:\n{server.log[-4000:]}")
    seconds = max(answer.tokens[-1] for answer in answers) - begin
    first, per_token = [x.first for x in answers], [x.per_token for x in answers]
    return {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(args.clients * args.new / seconds, 1),
        "running_most": max(x.running for x in looks),
        "running_mean": round(statistics.mean(x.running for x in looks), 1),
        "preemptions": int(server.metric("vllm:num_preemptions_total")),
        "first_token_s": spread(first, 1),
        "per_token_ms": spread([1000 * x for x in per_token], 0),
        "resident_at_rest_gib": round(at_rest / GiB, 2),
        "resident_most_gib": round(max(x.resident for x in looks) / GiB, 2),
        "over_length": over_length(looks, args.clients * args.new),
        "concurrency": _concurrency(server.log),
    }


def spread(numbers: list[float], digits: int) -> dict[str, float]:
    """Median and 95th percentile."""
    ordered = sorted(numbers)
    p95 = ordered[round(0.95 * (len(ordered) - 1))]
    return {"median": round(statistics.median(ordered), digits), "p95": round(p95, digits)}


def _options(args: argparse.Namespace) -> str:
    """What was asked for, but for where to write."""
    kept = {"clients": 32, "prompt": 1536, "new": 512}
    changed = {name: getattr(args, name) for name, usual in kept.items()}
    return " ".join(f"--{name} {x}" for name, x in changed.items() if x != kept[name])


def _concurrency(log: str) -> float:
    """How many requests of full length vLLM says that it can hold."""
    (said,) = [line for line in log.splitlines() if "Maximum concurrency" in line][:1]
    return float(said.rsplit(" ", 1)[1].rstrip("x"))


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    head = (
        "| cache | fit | ran at once, most (mean) | preemptions | tokens/s | "
        "first token, s (p95) | per token, ms (p95) | resident at rest, most, GiB |"
    )
    rows = [head, "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, found in results["contestants"].items():
        first, each = (
            f"{found[kind]['median']:.0f} ({found[kind]['p95']:.0f})"
            for kind in ("first_token_s", "per_token_ms")
        )
        rows.append(
            f"| {name} | {found['concurrency']:.1f} | {found['running_most']} "
            f"({found['running_mean']}) | {found['preemptions']} | {found['tokens_per_second']} | "
            f"{first} | {each} | "
            f"{found['resident_at_rest_gib']}, {found['resident_most_gib']} |"
        )
    return "\n".join([*rows, "", *memory_table(results)])


def memory_table(results: dict[str, Any]) -> list[str]:
    """Memory as the answers grow, in Markdown."""
    first = next(iter(results["contestants"].values()))["over_length"]
    marks = [part / (len(first) + 1) for part in range(1, len(first) + 1)]
    rows = ["| cache | " + " | ".join(f"{mark:.1%}" for mark in marks) + " |"]
    rows.append("|---|" + "---:|" * len(marks))
    for name, found in results["contestants"].items():
        looks = (f"{x['resident_gib']:.2f} ({x['in_use']:.0%})" for x in found["over_length"])
        rows.append(f"| {name} | " + " | ".join(looks) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of these results, and end")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1536, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--only", choices=CONTESTANTS, action="append")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    import torch
    import transformers
    import vllm

    from trimkv_kernels.smollm2 import smollm2_folder

    folder = str(smollm2_folder())
    results: dict[str, Any] = {
        "benchmark": "serving",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": f"python benchmarks/serving.py {_options(args)}".rstrip(),
        "versions": {x.__name__: x.__version__ for x in (vllm, torch, transformers)},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "policy": POLICY,
        "clients": args.clients,
        "prompt": args.prompt,
        "new": args.new,
        "cache_gib": CACHE_GIB,
        "contestants": {},
    }
    for name in args.only or CONTESTANTS:
        with tempfile.TemporaryDirectory() as temporary:
            longest = args.prompt + args.new
            server = Server(folder, CONTESTANTS[name], longest, Path(temporary, "log.txt"))
            try:
                results["contestants"][name] = contest(server, args)
            finally:
                server.stop()
        print(name, json.dumps(results["contestants"][name]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
