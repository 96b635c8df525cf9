"""Documents of a packed batch, for the ops that train retention gates."""

import torch
from torch import Tensor


def document_spans(
    document: Tensor | None, valid: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Say which tokens each token sees, and which see it.

    A document is a run of equal ids. Token ``t`` sees the sources ``start[t] <= j <= t``, and is
    seen by the targets ``t <= i < end[t]``; padding sees nothing and is seen by nothing. Neither
    number decreases along a sequence, so the first and last token of a tile bound all its tokens.

    Args:
        document: ``[batch, seq]`` int32 ids, negative for padding; ``None`` for one document.
        valid: ``[batch, seq]`` bool, False for padding; ``None`` when there is none.

    Returns:
        ``start`` and ``end``, each ``[batch, seq]`` int32; ``None`` twice when everything is one
        document.
    """
    if valid is not None:
        if document is None:
            document = torch.zeros(valid.shape, dtype=torch.int32, device=valid.device)
        document = document.masked_fill(~valid, -1)
    if document is None or document.shape[1] == 0:
        return None, None
    batch, seq = document.shape
    index = torch.arange(seq, dtype=torch.int32, device=document.device).expand(batch, seq)
    edge = torch.ones(batch, 1, dtype=torch.bool, device=document.device)
    change = document[:, 1:] != document[:, :-1]
    start = index.masked_fill(~torch.cat((edge, change), 1), 0).cummax(1).values
    last = index.masked_fill(~torch.cat((change, edge), 1), seq - 1).flip(1).cummin(1).values
    is_pad = document < 0
    return torch.where(is_pad, index + 1, start), torch.where(is_pad, index, last.flip(1) + 1)
