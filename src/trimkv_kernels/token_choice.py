"""The choice of the next token in a decode step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.checks import check_positive


@dataclass(frozen=True)
class TokenChoice:
    """Chooses the next token, with the options and draws of transformers' ``generate``."""

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def check(self, device: torch.device) -> None:
        """Check the options for a model on ``device``.

        Raises:
            ValueError: one of them is out of range, or has no effect.
        """
        given = (self.top_k, self.top_p, self.generator)
        if not self.do_sample and (self.temperature != 1.0 or any(x is not None for x in given)):
            raise ValueError(
                "do_sample must be True if temperature, top_k, top_p or generator is given, "
                "got False, which takes the likeliest token"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; do_sample=False is greedy"
            )
        if self.top_k is not None:
            check_positive("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.generator is not None and self.generator.device.type != device.type:
            raise ValueError(
                f"generator must be on {device}, got {self.generator.device}: "
                f"torch.Generator({str(device)!r})"
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """``[batch]`` int64 from ``logits`` ``[batch, vocabulary]``."""
        scores = logits.float()
        if not self.do_sample:
            return scores.argmax(dim=-1)
        scores = scores / self.temperature
        best = None
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            best = scores.topk(self.top_k, dim=-1)
            scores = scores.masked_fill(scores < best.values[:, -1:], -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered = scores.sort(dim=-1, descending=True) if best is None else best
            outside = _outside(scores, ordered.values, ordered.indices, self.top_p)
            scores = scores.masked_fill(outside, -torch.inf)
        chances = scores.softmax(dim=-1)
        # argmax(p / Exp(1)) draws from p as torch.multinomial does, but without a read-back
        noise = torch.empty_like(chances).exponential_(generator=self.generator)
        return (chances / noise).argmax(dim=-1)


def _outside(scores: Tensor, ordered: Tensor, order: Tensor, top_p: float) -> Tensor:
    """The tokens outside the fewest likeliest ones that reach a probability of ``top_p``.

    Args:
        scores: ``[batch, vocabulary]``, -inf for tokens that cannot be drawn.
        ordered: The highest of them, descending. Tokens that are not among these and can be drawn
            are as likely as the last of these.
        order: Their tokens.
        top_p: The probability to reach.
    """
    chances = (ordered - scores.logsumexp(dim=-1, keepdim=True)).exp()
    likelier = chances.cumsum(dim=-1) - chances  # the probability of all tokens before
    others = chances.sum(dim=-1, keepdim=True) >= top_p
    return others.expand_as(scores).scatter(-1, order, likelier >= top_p)
