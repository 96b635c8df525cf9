"""Continuous batching: requests come and go in the rows of one bounded cache.

A prompt is read alone, into a cache of one row, and put into a free row of the batch. Then all rows
that run take a token at a time, each with the options of its own request. What a request computes
does not depend on those beside it, and memory does not depend on how many there were or how long
they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from trimkv_kernels.cache import CacheStats
from trimkv_kernels.capture import Steps
from trimkv_kernels.checks import check_positive
from trimkv_kernels.decoding import check_capacity, handle_of, last_logits
from trimkv_kernels.integrations import compat

FinishReason = Literal["eos", "length", "criteria", "cancelled", "error"]
Prompt = Tensor | Sequence[int]

_SEEDS = 2**62


@dataclass(eq=False)
class Request:
    """A prompt and what became of it.

    Attributes:
        number: How many requests the batch was given before.
        row: The row that it has, or had.
        prompt: ``[length]`` int64.
        tokens: What was generated so far, an eos included.
        finish_reason: ``"eos"``, ``"length"`` (its ``max_new_tokens``), ``"criteria"`` (a stopping
            criterion or stop string), ``"cancelled"``, ``"error"``; None while it runs.
        error: What one of its own processors or criteria raised.
    """

    number: int
    row: int
    prompt: Tensor
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


class RowBatch:
    """Serves requests over the rows of one cache of fixed size.

    >>> batch = tk.RowBatch(model, rows=4)                                # doctest: +SKIP
    >>> batch.admit(ids, max_new_tokens=64, do_sample=True, seed=1)       # doctest: +SKIP
    >>> while batch.is_running:                                           # doctest: +SKIP
    ...     for request in batch.step():
    ...         print(request.number, request.tokens[-1], request.finish_reason)

    On a GPU a step is one CUDA graph. The tokens are read back after each step, because a request
    can end with any of them. The object is for one thread.

    Args:
        model: A patched model that generates, in eval mode.
        rows: Requests that run at the same time. One row more is held to read prompts in.

    Attributes:
        cache: The rows.

    Raises:
        ValueError: the model is not patched or in training, or its rows cannot come and go, see
            :meth:`PatchHandle.new_cache`.
        TypeError: ``model`` is not a transformers model that generates.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self._handle = handle_of(model)
        if model.training:
            raise ValueError("model must be in eval mode, got one in training: call model.eval()")
        if self._handle.parts.generator is None:
            raise TypeError("model must generate, got a decoder stack without an output head")
        self._model, self._generator = model, self._handle.parts.generator
        self._device = self._handle.shape.device
        self._reader = self._handle.new_cache()
        self.cache = self._handle.new_cache(rows=rows)
        self._requests: list[_Running | None] = [None] * rows
        self._count = 0
        self._token = self._zeros(rows, 1)
        self._real = self._zeros(rows, 1, dtype=torch.bool)
        self._likeliest = self._zeros(rows)
        self._logits: Tensor | None = None  # [rows, vocabulary]
        self._advance: Steps | None = None

    @property
    def running(self) -> list[Request]:
        """The requests that have not finished, by row."""
        return [running.request for running in self._unfinished()]

    @property
    def is_running(self) -> bool:
        """Whether a request has not finished."""
        return bool(self._unfinished())

    @property
    def num_free(self) -> int:
        """Rows that a request can have now."""
        return len(self._requests) - len(self._unfinished())

    def stats(self) -> CacheStats:
        """What the rows hold and have dropped, see :class:`CacheStats`."""
        return self.cache.stats()

    @torch.no_grad()
    def admit(
        self,
        prompt: Prompt,
        *,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: Any = None,
        seed: int | None = None,
        **options: Any,
    ) -> Request:
        """Read a prompt into a free row and choose its first token.

        Args:
            prompt: ``[length]`` or ``[1, length]`` int64, or a list of ints.
            generation_config: Of this request; None is the model's. Sampling, penalties, eos and
                stop strings are transformers' own, as in ``generate``.
            logits_processor, stopping_criteria: More of them, of this request alone.
            tokenizer: For stop strings.
            seed: Of this request's draws, which are those of ``generate`` after
                ``torch.manual_seed(seed)`` on a CPU; None takes one from torch's generator.
            options: Of a ``GenerationConfig``, such as ``max_new_tokens=64``, which must be given
                here or in ``generation_config``.

        Returns:
            The request, which has its first token, and may have finished with it.

        Raises:
            ValueError: no row is free, the prompt is empty or not of ints, or an option is not one
                of greedy decoding or sampling. The batch is as it was.
        """
        ids = _as_ids(prompt, self._device)
        if self.num_free == 0:
            raise ValueError(
                f"all {len(self._requests)} rows are taken: call step() until one has finished"
            )
        config = self._config(ids.shape[1], generation_config, options)
        processors = self._generator._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=ids.shape[1],
            encoder_input_ids=ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=logits_processor or LogitsProcessorList(),
            device=self._device,
            model_kwargs={},
        )
        given = {} if tokenizer is None else {"tokenizer": tokenizer}
        criteria = self._generator._get_stopping_criteria(
            generation_config=config,
            stopping_criteria=stopping_criteria or StoppingCriteriaList(),
            **given,
        )
        logits = self._read(ids)
        row = self._free_row()
        self.cache.put(row, self._reader)
        running = _Running(
            Request(self._count, row, ids[0]), config, processors, criteria, self._seeded(seed)
        )
        self._count += 1
        self._requests[row] = running
        running.take(logits, None)
        self._tell_rows()
        return running.request

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One more token for every request that runs.

        Returns:
            Those requests, by row. The rows of requests that have finished with this step are free
            for others; until then, or the next step, their slots can be looked at in :attr:`cache`.
        """
        self._free_finished()
        unfinished = self._unfinished()
        if not unfinished:
            return []
        if self._logits is None or self._advance is None:
            raise RuntimeError("a request was admitted without its prompt being read")
        added = [0] * len(self._requests)
        for running in unfinished:
            added[running.request.row] = 1
        self._advance(added)
        likeliest: list[int] = self._likeliest.tolist()
        for running in unfinished:
            row = running.request.row
            running.take(self._logits[row : row + 1], likeliest[row])
        self._tell_rows()
        return [running.request for running in unfinished]

    def run(self, prompts: Iterable[Prompt], **options: Any) -> Iterator[Request]:
        """Serve prompts, each as soon as a row is free, and yield them as they finish.

        Args:
            prompts: They are taken from it one by one.
            options: As for :meth:`admit`, the same for all. A ``seed`` is that of the first, and
                the next ones count on from it.
        """
        waiting = enumerate(prompts)
        seed, is_open = options.pop("seed", None), True
        while is_open or self.is_running:
            while is_open and self.num_free:
                number, prompt = next(waiting, (0, None))
                is_open = prompt is not None
                if prompt is not None:
                    own = None if seed is None else seed + number
                    request = self.admit(prompt, seed=own, **options)
                    if request.is_finished:
                        yield request
            yield from (request for request in self.step() if request.is_finished)

    def cancel(self, request: Request) -> None:
        """End a request; its row is free. Nothing happens if it has finished.

        Raises:
            ValueError: it is not one of this batch's.
        """
        if request.is_finished:
            return
        if all(running.request is not request for running in self._unfinished()):
            raise ValueError("request must be one of this batch's, got another")
        request.finish_reason = "cancelled"
        self._tell_rows()

    def reset(self) -> None:
        """Cancel all requests and free all rows, also after a step that broke off."""
        for running in self._unfinished():
            running.request.finish_reason = "cancelled"
        self._requests = [None] * len(self._requests)
        self.cache.reset()
        self._tell_rows()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A buffer of the step. It can be written to inside and outside of inference mode."""
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype, device=self._device)

    def _unfinished(self) -> list[_Running]:
        return [x for x in self._requests if x is not None and not x.request.is_finished]

    def _free_finished(self) -> None:
        rows = [
            row for row, x in enumerate(self._requests) if x is not None and x.request.is_finished
        ]
        if rows:
            self.cache.reset(rows)
            for row in rows:
                self._requests[row] = None

    def _free_row(self) -> int:
        self._free_finished()
        return self._requests.index(None)

    def _config(
        self, length: int, given: GenerationConfig | None, options: dict[str, Any]
    ) -> GenerationConfig:
        """The options of a request, checked, with what transformers' processors want to know."""
        config: GenerationConfig
        config, unknown = self._generator._prepare_generation_config(given, **options)
        if unknown:
            raise ValueError(
                f"options must be those of a GenerationConfig, got {', '.join(sorted(unknown))}"
            )
        mode = compat.generation_mode(config.get_generation_mode())
        if mode not in ("greedy_search", "sample"):
            raise ValueError(
                f"generation_config must ask for greedy decoding or sampling, got {mode}: call "
                "generate()"
            )
        for name, plain in (("num_return_sequences", 1), ("guidance_scale", 1)):
            got = getattr(config, name, None)
            if got not in (None, plain):
                raise ValueError(f"{name} must be {plain} in a batch of rows, got {got}")
        if config.max_new_tokens is None:
            raise ValueError("max_new_tokens must be given, got None")
        check_positive("max_new_tokens", config.max_new_tokens)
        if self.cache.slots is not None:
            check_capacity(self.cache.slots, length, config.max_new_tokens)
        config.max_length = length + config.max_new_tokens
        self._generator._prepare_special_tokens(config, True, device=self._device)
        return config

    def _seeded(self, seed: int | None) -> torch.Generator:
        if seed is None:
            seed = int(torch.randint(_SEEDS, ()))
        return torch.Generator(self._device).manual_seed(seed)

    def _read(self, ids: Tensor) -> Tensor:
        """The logits ``[1, vocabulary]`` after a prompt, read into the cache of one row."""
        length, chunk = ids.shape[1], self._handle.options.prefill_chunk
        self._reader.reset()
        for start in range(0, length, chunk or length):
            part = ids[:, start : start + (chunk or length)]
            position = torch.arange(start, start + part.shape[1], device=self._device)[None]
            logits = last_logits(self._model, self._reader, part, None, position_ids=position)
        if self._logits is None:
            shape = (len(self._requests), logits.shape[1])
            self._logits = self._zeros(*shape, dtype=logits.dtype)
            self._advance = Steps(self._step, self.cache, self._device)
        return logits.to(self._device)

    def _step(self) -> None:
        """Feed every row its latest token."""
        slots = self.cache.slots
        if slots is None or self._logits is None:
            raise RuntimeError("the rows have no slots")
        logits = last_logits(
            self._model,
            self.cache,
            self._token,
            self._real,
            position_ids=slots.t[:, None].long(),
            cache_position=slots.seen[None],  # transformers up to 5.0 reads back to make its own
        )
        self._logits.copy_(logits)
        self._likeliest.copy_(self._logits.float().argmax(dim=-1))

    def _tell_rows(self) -> None:
        """Bring the latest tokens to the device, and which rows run."""
        token, real = [0] * len(self._requests), [False] * len(self._requests)
        for running in self._unfinished():
            row = running.request.row
            token[row], real[row] = running.request.tokens[-1], True
        self._token.copy_(torch.tensor(token)[:, None])
        self._real.copy_(torch.tensor(real)[:, None])


class _Running:
    """A request in its row: chooses its tokens, and finds its end."""

    def __init__(
        self,
        request: Request,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generator: torch.Generator,
    ) -> None:
        self.request = request
        self._most, self._samples = config.max_new_tokens, bool(config.do_sample)
        self._eos = compat.end_tokens(config.eos_token_id)
        self._processors, self._generator = processors, generator
        own = (MaxLengthCriteria, EosTokenCriteria)  # found without asking the device
        self._criteria = StoppingCriteriaList(x for x in criteria if not isinstance(x, own))
        length = len(request.prompt)
        self._ids = request.prompt.new_zeros(1, length + self._most)
        self._ids[0, :length] = request.prompt
        self._length = length

    def take(self, logits: Tensor, likeliest: int | None) -> None:
        """Choose a token from ``logits`` ``[1, vocabulary]``, and see whether the request ends.

        What its own processors and criteria raise ends the request, and no other one.
        """
        request = self.request
        try:
            token = self._choose(logits, likeliest)
            self._ids[0, self._length] = token
            self._length += 1
            request.tokens.append(token)
            request.finish_reason = self._end(token, logits)
        except Exception as error:
            request.finish_reason, request.error = "error", error

    def _choose(self, logits: Tensor, likeliest: int | None) -> int:
        if likeliest is not None and not (self._processors or self._samples):
            return likeliest
        scores = self._processors(self._ids[:, : self._length], logits.float())
        if not self._samples:
            return int(scores.argmax(dim=-1))
        chances = scores.softmax(dim=-1)
        return int(torch.multinomial(chances, num_samples=1, generator=self._generator))

    def _end(self, token: int, logits: Tensor) -> FinishReason | None:
        if token in self._eos:
            return "eos"
        if len(self.request.tokens) >= self._most:
            return "length"
        if self._criteria and bool(self._criteria(self._ids[:, : self._length], logits).any()):
            return "criteria"
        return None


def _as_ids(prompt: Prompt, device: torch.device) -> Tensor:
    """``[1, length]`` int64."""
    ids = torch.as_tensor(prompt)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.dtype != torch.int64:
        raise ValueError(
            f"prompt must be int64 [length >= 1] or [1, length], got {ids.dtype} {list(ids.shape)}"
        )
    return ids.to(device)
