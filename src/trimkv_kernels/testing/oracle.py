"""The oracle of the bounded cache: the full cache, masked to what the bounded one kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn


@torch.no_grad()
def masked_reference(
    model: Any,
    stock: Any,
    input_ids: Tensor,
    *,
    calls: Sequence[int],
    cache: Any,
    attention_mask: Tensor | None = None,
    inputs: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a patched model, and a stock model on a full cache that is masked to the kept pairs.

    Before each call the slots' positions are read. The stock model attends to exactly these, and
    causally to the call itself. Layers with a sliding window run unchanged in both models. The
    stock model uses no kernel, cache or policy of this package.

    Args:
        model: The patched model.
        stock: An unpatched model with the same weights.
        input_ids: ``[batch, total]`` int64.
        calls: How many tokens each forward reads; sums to ``total``.
        cache: An empty cache of the patched model.
        attention_mask: ``[batch, total]``, 0 for left padding; None when there is none.
        inputs: For each call what else both models are given, such as ``pixel_values``;
            ``position_ids`` replace those that count the tokens. None: nothing.

    Returns:
        Logits of the patched and of the masked stock model, each ``[batch, total, vocab_size]``,
        zero at padding. They must agree.

    Raises:
        ValueError: ``calls`` do not sum to ``total``, or ``inputs`` are not one for each call.
    """
    batch, total = input_ids.shape
    if sum(calls) != total:
        raise ValueError(f"calls must sum to {total} (the tokens of input_ids), got {sum(calls)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = mask.bool()
    position = real.long().cumsum(dim=1) - 1  # [batch, total]
    layers = _bounded_layers(stock)
    text = stock.config.get_text_config()
    group = text.num_attention_heads // text.num_key_value_heads
    bounded, reference = [], []
    full: Any = None
    start = 0
    for new, more in zip(calls, inputs or [{}] * len(calls), strict=True):
        stop = start + new
        call = {
            "input_ids": input_ids[:, start:stop],
            "position_ids": position[:, start:stop].clamp(min=0),
            "use_cache": True,
            **more,
        }
        visible = [
            _visible(cache.positions(index) if start else None, position, real, start, stop)
            for index in layers
        ]
        call["attention_mask"] = mask[:, :stop]
        bounded.append(model(**call, past_key_values=cache).logits)
        masks = [_additive(v, group, stock.dtype, batch) for v in visible]
        with _masks(list(layers.values()), masks):
            output = stock(**call, past_key_values=full)
        full = output.past_key_values
        reference.append(output.logits)
        start = stop
    keep = real[..., None]
    return torch.cat(bounded, 1) * keep, torch.cat(reference, 1) * keep


def _bounded_layers(stock: Any) -> dict[int, nn.Module]:
    """Attention layers by their index, without those that have a sliding window."""
    layers = [m for m in stock.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    types = getattr(stock.config.get_text_config(), "layer_types", None)
    return {
        layer.layer_idx: layer
        for layer in layers
        if types is None or types[layer.layer_idx] == "full_attention"
    }


def _visible(kept: Tensor | None, position: Tensor, real: Tensor, start: int, stop: int) -> Tensor:
    """What each token of a call may see: ``[batch, num_kv_heads or 1, new, stop]`` bool."""
    batch, new = position.shape[0], stop - start
    own = torch.ones(new, new, dtype=torch.bool, device=position.device).tril()
    own = own & real[:, None, None, start:stop]
    if kept is None:
        return own
    heads = kept.shape[1]
    # one more entry is for empty slots, whose position is -1
    held = torch.zeros(batch, heads, stop + 1, dtype=torch.bool, device=position.device)
    held.scatter_(2, kept.long().masked_fill(kept < 0, stop), True)
    past = position[:, None, :start].clamp(min=0).expand(-1, heads, -1)
    old = held.gather(2, past) & real[:, None, :start]
    return torch.cat((old[:, :, None].expand(-1, -1, new, -1), own.expand(-1, heads, -1, -1)), 3)


def _additive(visible: Tensor, group: int, dtype: torch.dtype, batch: int) -> Tensor:
    heads = repeat(visible, "b h q k -> b (h g) q k", g=group if visible.shape[1] > 1 else 1)
    mask = torch.zeros(heads.shape, dtype=dtype, device=heads.device)
    # not -inf: the row of a pad, which sees nothing, must stay finite
    return mask.masked_fill(~heads, torch.finfo(dtype).min).expand(batch, -1, -1, -1)


@contextmanager
def _masks(layers: Sequence[nn.Module], masks: Sequence[Tensor]) -> Iterator[None]:
    """Give each attention layer its own mask for one forward."""

    def hook(mask: Tensor) -> Any:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    handles = [
        layer.register_forward_pre_hook(hook(mask), with_kwargs=True)
        for layer, mask in zip(layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
