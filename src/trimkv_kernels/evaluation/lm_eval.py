"""lm-eval on a bounded cache: the model ``trimkv``. It needs the extra ``eval``.

::

    python -m trimkv_kernels.evaluation.lm_eval run --model trimkv --tasks ... --model_args \
        pretrained=Qwen/Qwen3-4B,policy=streaming_llm,budget=512,prefill_chunk=512

lm-eval's own ``hf`` scores a continuation in one forward over context and continuation. On a
bounded cache this measures nothing, because a prompt attends to all of itself before anything is
evicted. Here the context without its last token is read first, as a prompt, and evicted. Then the
last token and the continuation are read as if they were generated.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"evaluating with lm-eval needs the extra 'eval': pip install 'trimkv-kernels[eval]' "
        f"({error})"
    ) from error

from trimkv_kernels.checks import check_positive
from trimkv_kernels.patching import patch
from trimkv_kernels.policies import RetentionPolicy
from trimkv_kernels.policies.trimkv import policy_of

logger = logging.getLogger("trimkv_kernels")

# ((context, continuation) or None, the context's tokens, the continuation's tokens)
_Request = tuple[Any, list[int], list[int]]
# Names that tasks use for the number of tokens to generate; lm-eval takes the first it finds.
_MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("trimkv")
class TrimKVLM(HFLM):
    """lm-eval's Hugging Face model, patched: all of its requests go through a bounded cache.

    Args:
        pretrained: Folder, hub id or model, as for ``hf``.
        policy: A registered name or, from Python, a policy; as for :func:`trimkv_kernels.patch`.
        budget, buffer: Of the cache; None is the gates' own, else 512 and 128.
        gates: Folder or hub id of retention gates, for TRIM-KV.
        prefill_chunk: Contexts and prompts are read in chunks of this many tokens, with evictions
            in between. None reads them whole.
        batch_size: Continuations of one context, or prompts to generate from, at a time.
        options: Of ``hf``.

    Raises:
        ValueError: ``batch_size`` is ``"auto"``, ``gates`` are for another policy, or what
            :func:`trimkv_kernels.patch` raises.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        policy: RetentionPolicy | str | None = None,
        budget: int | None = None,
        buffer: int | None = None,
        gates: str | Path | None = None,
        prefill_chunk: int | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdigit():
            raise ValueError(
                f"batch_size must be a number, got {batch_size!r}: the automatic search runs "
                "forwards in which nothing is evicted"
            )
        check_positive("batch_size", int(batch_size))
        chosen = policy_of(policy, gates)
        super().__init__(pretrained=pretrained, batch_size=int(batch_size), **options)
        self.handle = patch(
            self.model, chosen, budget=budget, buffer=buffer, prefill_chunk=prefill_chunk
        )
        self.prefill_chunk = prefill_chunk
        self._has_evicted = False

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        Raises:
            ValueError: no request of a task exceeds the budget.
        """

        def tokens_read(context: str, continuation: str) -> int:
            return len(self.tok_encode(context + continuation)) - bool(context)

        self._check_lengths(requests, tokens_read)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text. Texts longer than the model's context are cut into windows.

        Raises:
            ValueError: no request of a task exceeds the budget.
        """
        self._check_lengths(requests, lambda text: len(self.tok_encode(text)))
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the patched model generates after each prompt.

        Raises:
            ValueError: no request of a task could exceed the budget, generated tokens included.
        """

        def tokens_read(prompt: str, options: dict[str, Any]) -> int:
            limits = [options[name] for name in _MAX_NEW if options.get(name) is not None]
            return len(self.tok_encode(prompt)) + int([*limits, self.max_gen_toks][0]) - 1

        self._check_lengths(requests, tokens_read)
        self._has_evicted = False
        texts = super().generate_until(requests, disable_tqdm=disable_tqdm)
        if not self._has_evicted:
            logger.warning(
                "all generations ended before anything was evicted: they measure nothing"
            )
        return texts

    def _model_generate(self, *args: Any, **options: Any) -> Tensor:
        cache = self.handle.new_cache()
        output: Tensor = super()._model_generate(*args, past_key_values=cache, **options)
        self._has_evicted |= cache.stats().budget_reached
        return output

    def _check_lengths(self, requests: Iterable[Any], tokens_read: Callable[..., int]) -> None:
        """Check that each task has a request that is still read after an eviction."""
        longest: dict[str, int] = defaultdict(int)
        for request in requests:
            tokens = min(tokens_read(*request.args), self.max_length)
            longest[request.task_name] = max(tokens, longest[request.task_name])
        budget, buffer = self.handle.options.budget, self.handle.options.buffer
        for task, tokens in longest.items():
            if tokens <= budget + buffer:
                raise ValueError(
                    f"task {task!r} never exceeds the budget, so it measures nothing: its longest "
                    f"request reads {tokens:,} tokens, budget + buffer = {budget} + {buffer}; take "
                    "a smaller budget or a task with longer contexts"
                )

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations. Continuations of the same context share its cache."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        tails: list[list[int]] = []
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError("a continuation must have at least one token, got an empty one")
            tokens = (context + continuation)[-(self.max_length + 1) :]
            scored = len(tokens) - min(len(continuation), len(tokens) - 1)
            by_context[tuple(tokens[: scored - 1])].append(index)
            tails.append(tokens[scored - 1 :])
        answers: dict[int, tuple[float, bool]] = {}
        for prefix, indices in by_context.items():
            cache = self._read_prefix(prefix)
            for first in range(0, len(indices), self.batch_size):
                batch = indices[first : first + self.batch_size]
                scores = self._score([tails[index] for index in batch], cache)
                answers.update(zip(batch, scores, strict=True))
                for index in batch:
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial(
                            "loglikelihood", requests[index][0], answers[index]
                        )
        return [answers[index] for index in range(len(requests))]

    def _read_prefix(self, prefix: Sequence[int]) -> Any:
        """A cache that has read ``prefix`` as a prompt, or None if ``prefix`` is empty."""
        if not prefix:
            return None
        cache = self.handle.new_cache()
        tokens = torch.tensor([prefix], device=self.device)
        for part in tokens.split(self.prefill_chunk or len(prefix), dim=1):
            self._forward(part, cache, logits_to_keep=1)
        return cache

    def _score(self, tails: list[list[int]], cache: Any) -> list[tuple[float, bool]]:
        """Read all tokens of each tail except the last, and score all except the first.

        Padding is at the end, where nothing is scored. The tails are read in pieces. A piece ends
        at each token after which reading single tokens would evict.
        """
        rows = [torch.tensor(tail) for tail in tails]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        counted = torch.arange(1, tokens.shape[1]) < torch.tensor([[len(t)] for t in tails])
        budget, buffer = self.handle.options.budget, self.handle.options.buffer
        room = budget + buffer
        if cache is not None:
            room = max(1, room - int(cache.stats().slots_used.max()))
        cache = self.handle.new_cache() if cache is None else cache.fork(len(tails))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        log_p, greedy, start = [], [], 0
        while start < inputs.shape[1]:
            span = slice(start, start + (room if start == 0 else buffer))
            logits = self._forward(inputs[:, span], cache)
            normalised = logits.log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
            log_p.append(normalised.gather(-1, targets[:, span, None])[..., 0].cpu())
            greedy.append((logits.argmax(-1) == targets[:, span]).cpu())
            start = span.stop
        sums = torch.cat(log_p, dim=1).double().masked_fill(~counted, 0.0).sum(dim=1)
        is_greedy = (torch.cat(greedy, dim=1) | ~counted).all(dim=1)
        return list(zip(sums.tolist(), is_greedy.tolist(), strict=True))

    @torch.no_grad()
    def _forward(self, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **options)
        return output.logits


def main() -> None:
    """Run lm-eval's own command line, with ``--model trimkv`` added."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
