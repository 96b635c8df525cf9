"""Where the documents of a packed batch lie: shared by the ops that train retention gates."""

import torch
from torch import Tensor

from trimkv_kernels.kernels._dispatch import check_tensor


def document_spans(
    document: Tensor | None,
    valid: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Say which tokens each token sees, and which see it.

    A document is a run of equal ids. Token ``t`` sees the sources ``first[t] <= j <= t``, and is
    seen by the targets ``t <= i < end[t]``; padding sees nothing and is seen by nothing. Neither
    number ever falls along a sequence, so the first and last token of a tile bound all of it.

    Args:
        document: ``[batch, seq]`` int32 ids, negative for padding; ``None`` for one document.
        valid: ``[batch, seq]`` bool, False for padding; ``None`` when there is none.
        shape: What ``[batch, seq]`` has to be.
        device: Where both have to be.

    Returns:
        ``first`` and ``end``, each ``[batch, seq]`` int32; ``None`` twice when everything is one
        document.

    Raises:
        ValueError: A shape, dtype or device disagrees.
    """
    if document is not None:
        check_tensor("document", document, shape, (torch.int32,), device)
    if valid is not None:
        check_tensor("valid", valid, shape, (torch.bool,), device)
        if document is None:
            document = torch.zeros(shape, dtype=torch.int32, device=device)
        document = document.masked_fill(~valid, -1)
    if document is None or shape[1] == 0:
        return None, None
    batch, seq = shape
    index = torch.arange(seq, dtype=torch.int32, device=device).expand(batch, seq)
    edge = torch.ones(batch, 1, dtype=torch.bool, device=device)
    change = document[:, 1:] != document[:, :-1]
    first = index.masked_fill(~torch.cat((edge, change), 1), 0).cummax(1).values
    last = index.masked_fill(~torch.cat((change, edge), 1), seq - 1).flip(1).cummin(1).values
    is_pad = document < 0
    return torch.where(is_pad, index + 1, first), torch.where(is_pad, index, last.flip(1) + 1)
