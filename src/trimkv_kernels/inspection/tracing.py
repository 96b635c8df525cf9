"""What a policy keeps of a text, step by step.

A token that was dropped never comes back. So one number per (layer, KV head, token), the step at
which it was dropped, describes every kept set of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.integrations.discovery import ModelParts, find_parts
from trimkv_kernels.integrations.hf_cache import BoundedCache
from trimkv_kernels.integrations.images import Prompt, is_image, token_grids
from trimkv_kernels.patching import PatchHandle, patch
from trimkv_kernels.policies import RetentionPolicy
from trimkv_kernels.policies.base import policy_name
from trimkv_kernels.policies.trimkv import TrimKV
from trimkv_kernels.progress import count_off


@dataclass(frozen=True, eq=False)
class Trace:
    """The kept sets of one text; step ``t`` is the one that reads token ``t``.

    Args:
        policy: Name of the policy.
        budget: Pairs that each head keeps (their mean, with an allocation).
        dropped_at: ``[layers, num_kv_heads, tokens]`` int32, the step after which a token was gone;
            the number of tokens if it stayed to the end.
        log_beta: ``[layers, num_kv_heads, tokens]`` fp32, natural log of TRIM-KV's decay; None for
            policies without one.
        chosen: Numbers of these layers in the model, see :meth:`select`; None if the trace has all
            layers.
        is_image: ``[tokens]`` bool, the image tokens; None for a text-only model.
        grids: Rows and columns of tokens of each image and video frame, in the order of the text;
            empty where they are unknown.
    """

    policy: str
    budget: int
    dropped_at: Tensor
    log_beta: Tensor | None = None
    chosen: tuple[int, ...] | None = None
    is_image: Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens read, which is also the number of steps."""
        return self.dropped_at.shape[2]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers in the model."""
        return tuple(range(self.dropped_at.shape[0])) if self.chosen is None else self.chosen

    def select(self, layers: Sequence[int] | None) -> Trace:
        """The trace of some layers.

        Args:
            layers: Their numbers in the model; None is all.

        Raises:
            ValueError: there is no such layer, or none is named.
        """
        if layers is None:
            return self
        check_layers(layers, self.layers)
        rows = [self.layers.index(layer) for layer in layers]
        log_beta = None if self.log_beta is None else self.log_beta[rows]
        return replace(
            self, dropped_at=self.dropped_at[rows], log_beta=log_beta, chosen=tuple(layers)
        )

    def kept(self, step: int) -> Tensor:
        """``[layers, num_kv_heads, tokens]`` bool: what the slots hold after a step.

        Raises:
            ValueError: there is no such step.
        """
        age = self._age(step)
        return (age >= 0) & (self.dropped_at > step)

    def retention(self, step: int) -> Tensor:
        """``beta_i ** (step - i)`` of every token ``i`` (Bui et al., arXiv 2512.03324).

        Args:
            step: In ``[0, tokens)``.

        Returns:
            ``[layers, num_kv_heads, tokens]`` fp32, 0 where token ``i`` was not read yet.

        Raises:
            ValueError: there is no such step, or the policy has no decay.
        """
        if self.log_beta is None:
            raise ValueError(
                f"only TRIM-KV's gates give a decay beta, this trace is of policy {self.policy!r}: "
                "use kept()"
            )
        age = self._age(step)
        return torch.exp(self.log_beta * age.clamp(min=0)).masked_fill(age < 0, 0.0)

    def _age(self, step: int) -> Tensor:
        if not 0 <= step < self.num_tokens:
            raise ValueError(f"step must be in [0, {self.num_tokens}), got {step}")
        return step - torch.arange(self.num_tokens)


def check_layers(layers: Sequence[int], known: Sequence[int]) -> None:
    """Raise unless ``layers`` are some of the ``known`` ones.

    Raises:
        ValueError: names those that are not.
    """
    unknown = [layer for layer in layers if layer not in known]
    if unknown or not layers:
        raise ValueError(
            f"layers must be some of {known[0]} to {known[-1]}, got {', '.join(map(str, unknown))}"
        )


@torch.no_grad()
def trace(
    model: Any,
    input_ids: Tensor,
    policy: RetentionPolicy | str | None = None,
    *,
    prompt_length: int = 1,
    images: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> Trace:
    """Read a text on a bounded cache, one token at a time, and note what each step drops.

    The model is patched during the call. To see what a generation kept, pass the prompt together
    with the generated tokens.

    Args:
        model: A supported model in eval mode, not patched.
        input_ids: ``[1, tokens]`` int64.
        policy: As for :func:`trimkv_kernels.patch`.
        prompt_length: Tokens that the first call reads at once, as a prompt. Every later token is a
            step of its own.
        images: For a vision-language model, what its processor returned beside ``input_ids``,
            which contain the tokens of these images. None: no images.
        progress: Show a bar if it takes long.
        options: Of :func:`trimkv_kernels.patch`, such as ``budget`` and ``buffer``.

    Returns:
        The trace, on the CPU.

    Raises:
        TypeError: the model is not supported.
        ValueError: ``input_ids`` or ``prompt_length`` are not what they should be, or an option
            does not fit the model.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must have shape [1, tokens], got {list(input_ids.shape)}")
    num_tokens = input_ids.shape[1]
    if not 1 <= prompt_length <= num_tokens:
        raise ValueError(
            f"prompt_length must be in [1, {num_tokens}], the tokens of the text, "
            f"got {prompt_length}"
        )
    parts, input_ids = find_parts(model), input_ids.to(model.device)
    prompt = Prompt.of(parts, input_ids, images)
    with patch(model, policy, **options) as handle, _decay(handle) as decay:
        cache = handle.new_cache(input_ids[:, :prompt_length])
        dropped_at = _read(parts, prompt, cache, prompt_length, progress)
        budget = 0 if cache.slots is None else cache.slots.budget
    log_beta = None
    if decay:
        # finite, so that an overflowed gate's token still has beta ** 0 = 1
        layers = [torch.cat(calls, dim=2)[0] for calls in decay.values()]
        log_beta = torch.stack(layers).clamp(min=torch.finfo(torch.float32).min)
    marked = is_image(input_ids[0], parts.image_ids).cpu() if parts.image_ids else None
    grids = () if images is None else token_grids(parts, input_ids[0], images)
    return Trace(
        policy_name(handle.policy), budget, dropped_at, log_beta, is_image=marked, grids=grids
    )


def split_text(tokenizer: Any, text: str) -> tuple[Tensor, list[str]]:
    """Token ids of a text, and the piece of the text that each of them stands for.

    Args:
        tokenizer: A transformers tokenizer that gives the offsets of its tokens in the text.
        text: Any text.

    Returns:
        ``[1, tokens]`` int64, and as many pieces. Joined they are the text. A token without a piece
        of its own (a special token, or a later part of one character) is shown by its name.

    Raises:
        ValueError: the tokenizer gives no offsets, or the text has no tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer must give offsets (is_fast), got {type(tokenizer).__name__}: pass the "
            "words yourself to draw()"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    if not ids:
        raise ValueError("text must have at least one token, got an empty one")
    names = tokenizer.convert_ids_to_tokens(ids)
    pieces, done = [], 0
    for name, (_, stop) in zip(names, encoded["offset_mapping"], strict=True):
        pieces.append(text[done:stop] or name)
        done = max(done, stop)
    return torch.tensor([ids]), pieces


def _read(
    parts: ModelParts, prompt: Prompt, cache: BoundedCache, prompt_length: int, progress: bool
) -> Tensor:
    """``dropped_at`` of a text that is read on an empty cache."""
    num_tokens = prompt.input_ids.shape[1]
    steps = range(prompt_length - 1, num_tokens)
    dropped_at, held = torch.empty(0), torch.empty(0)
    for step in count_off(steps, "reading", total=len(steps), shown=progress):
        start = 0 if step == prompt_length - 1 else step
        prompt.read(parts, cache, start, step + 1)
        now = torch.stack([_held(cache, layer, num_tokens) for layer in range(len(cache.layers))])
        if step == prompt_length - 1:
            held = torch.zeros_like(now)
            dropped_at = torch.full_like(now, num_tokens, dtype=torch.int32)
        held[..., start : step + 1] = True
        dropped_at[held & ~now] = step
        held = now
    return dropped_at


def _held(cache: BoundedCache, layer: int, num_tokens: int) -> Tensor:
    """``[num_kv_heads, tokens]`` bool: what a layer's slots hold."""
    position = cache.positions(layer)[0].cpu().long()
    held = torch.zeros(position.shape[0], num_tokens + 1, dtype=torch.bool)
    # one more entry takes the empty slots, whose position is -1
    return held.scatter_(1, position % (num_tokens + 1), True)[:, :num_tokens]


@contextmanager
def _decay(handle: PatchHandle) -> Iterator[dict[int, list[Tensor]]]:
    """Record the output of TRIM-KV's gates: per layer, ``[1, num_kv_heads, new]`` per call."""
    noted: dict[int, list[Tensor]] = {}
    if not isinstance(handle.policy, TrimKV):
        yield noted
        return

    def note(gates: Any, inputs: tuple[int, Tensor], log_beta: Tensor) -> None:
        noted.setdefault(inputs[0], []).append(log_beta.float().cpu())

    hook = handle.policy.gates.register_forward_hook(note)
    try:
        yield noted
    finally:
        hook.remove()
