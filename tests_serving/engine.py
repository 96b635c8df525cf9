"""Run vLLM's engine without a server, in a process of its own, and print what it gave.

    python engine.py < asked.json

``asked`` has ``engine``, the arguments of `vllm.LLM`, ``prompts``, lists of token ids, ``new``, how
many tokens to generate for each, and ``held``, whether to look into the rows. A line that
begins with ``RESULT`` is JSON with ``tokens``, a list for each prompt, and ``held``: whenever a
request has ended, for each block of memory that was used, each layer and each head, the positions
that it holds.
"""

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def held(model: Any) -> list[list[list[list[int]]]]:
    """``[block][layer][head]``: positions, sorted."""
    layers = [layer.self_attn.attn._blocks.slots for layer in model.model.layers]
    used = (layers[0].num_valid[0, :, 0] > 0).nonzero().flatten().tolist()
    found = []
    for row in used:
        found.append([])
        for slots in layers:
            heads = zip(slots.position[0, row].tolist(), slots.num_valid[0, row], strict=True)
            found[-1].append([sorted(head[: int(count)]) for head, count in heads])
    return found


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    llm = LLM(**asked["engine"])
    options = [
        SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        for new in asked["new"]
    ]
    engine, tokens, blocks = llm.llm_engine, {}, []
    for number, prompt in enumerate(asked["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, options[number])
    while engine.has_unfinished_requests():
        ended = [output for output in engine.step() if output.finished]
        for output in ended:
            tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        if ended and asked["held"]:
            blocks += llm.apply_model(held)[0]
    result = {"tokens": [tokens[number] for number in sorted(tokens)], "held": blocks}
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
