"""The loss ``"attention"``: in each layer, fading must not change the attention output.

The stock model reads the text once, without gradients. In each layer the attention of a few hundred
queries is computed twice from the same queries, keys and values: stock, and with tokens that fade
as their gate says. The loss is the relative difference of the two outputs::

    sum over heads |faded_t - stock_t|^2 / sum over heads |stock_t|^2

averaged over queries and layers. No gradient passes through the model, so a step takes about a
third of the time of a step that compares predictions, and every gate gets the error of its own
layer. The loss ignores what an error means for the model's predictions. To learn this too, continue
the training with ``"fwkl"``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_kernels.gates import RetentionGates
from trimkv_kernels.integrations.protocol import AttentionCache, LayerCall
from trimkv_kernels.training.packing import IGNORED, Packing

_QUERIES = 512  # of a step, at most: a row of logits over the whole text for each


class LocalPass(AttentionCache):
    """One forward of the stock model that measures the error of each layer's gate.

    Args:
        gates: To train.
        packing: The documents.
        target: ``[batch, seq]``, the token that each position predicts. Positions without one do
            not count.
        sinks, recent: Positions that do not fade.

    Attributes:
        log_beta: By layer, ``[batch, num_kv_heads, seq]`` fp32, with gradients.
        errors: By layer, scalars.
    """

    def __init__(
        self, gates: RetentionGates, packing: Packing, target: Tensor, *, sinks: int, recent: int
    ) -> None:
        self.log_beta: dict[int, Tensor] = {}
        self.errors: list[Tensor] = []
        self._gates, self._recent = gates, recent
        counts = target != IGNORED
        where = counts.any(0).nonzero().flatten()
        if len(where) > _QUERIES:
            where = where[torch.randperm(len(where), device=where.device)[:_QUERIES]]
        self._where, self._counts = where, counts[:, where]
        index = torch.arange(target.shape[1], device=target.device)
        self._age = where[:, None] - index
        seen = (self._age >= 0)[None]
        if packing.document is not None:
            seen = seen & (packing.document[:, where, None] == packing.document[:, None])
        self._seen = seen[:, None, None]
        self._stays = (packing.position < sinks)[:, None]

    def attend(self, layer: int, call: LayerCall) -> Tensor:
        """Return the stock attention, and note the error of the layer's gate."""
        with torch.enable_grad():
            log_beta = self._gates(layer, call.hidden_states).masked_fill(self._stays, 0)
            self.log_beta[layer] = log_beta
            self.errors.append(self._error(call, log_beta))
        return call.self_attention()

    def _error(self, call: LayerCall, log_beta: Tensor) -> Tensor:
        query, key, value, scale = call.query, call.key, call.value, call.scale
        num_kv_heads = key.shape[1]
        # [batch, num_kv_heads, group, queries, head_dim]
        queries = query[:, :, self._where].unflatten(1, (num_kv_heads, -1)).float()
        keys, values = key[:, :, None].float(), value[:, :, None].float()
        logits = (queries @ keys.mT * scale).masked_fill(~self._seen, -torch.inf)
        stock = logits.softmax(-1) @ values
        fading = (self._age - self._recent).clamp(min=0) * log_beta[:, :, None]
        faded = (logits + fading[:, :, None]).softmax(-1) @ values
        error, size = (
            t.square().sum((1, 2, 4)) for t in (faded - stock, stock)
        )  # [batch, queries]
        relative = (error / size.clamp(min=1e-12))[self._counts]
        return relative.sum() / max(len(relative), 1)
