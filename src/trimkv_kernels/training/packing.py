"""Which tokens of a batch belong together: padding and packed documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.kernels.documents import document_spans


@dataclass(frozen=True)
class Packing:
    """The documents of a batch.

    Attributes:
        document: ``[batch, seq]`` int32, negative for padding; None when every row is one document
            without padding.
        position: ``[batch, seq]`` int64, tokens of the same document before this one; 0 for
            padding.
    """

    document: Tensor | None
    position: Tensor

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        *,
        position_ids: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Packing:
        """Find the documents.

        Args:
            shape: ``(batch, seq)``.
            device: Where the batch is.
            position_ids: ``[batch, seq]`` integers; a document starts where they do not grow by
                one. None means that a row is one document.
            valid: ``[batch, seq]``, false or 0 for padding on either side; None when there is none.

        Raises:
            ValueError: a shape or a device disagrees.
        """
        for name, tensor in (("position_ids", position_ids), ("valid", valid)):
            if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != device):
                raise ValueError(
                    f"{name} must have shape {list(shape)} on {device}, "
                    f"got {list(tensor.shape)} on {tensor.device}"
                )
        index = torch.arange(shape[1], device=device)
        begins = torch.zeros(shape, dtype=torch.bool, device=device)
        if position_ids is not None:
            begins[:, 1:] |= position_ids.diff(dim=1) != 1
        if valid is not None:
            begins[:, 1:] |= valid.bool().diff(dim=1)
        document = begins.cumsum(1, dtype=torch.int32)
        if valid is not None:
            document.masked_fill_(~valid.bool(), -1)
        if not document.any():
            return cls(None, index.expand(shape))
        start, _ = document_spans(document)
        position = index if start is None else index - start
        return cls(document, position.expand(shape).clamp(min=0))

    @property
    def valid(self) -> Tensor:
        """``[batch, seq]`` bool, False for padding."""
        if self.document is None:
            return torch.ones_like(self.position, dtype=torch.bool)
        return self.document >= 0

    def targets(self, labels: Tensor) -> Tensor:
        """The token that every position has to predict.

        Args:
            labels: ``[batch, seq]`` int64, the token *at* each position, -100 where it does not
                count, as transformers has them.

        Returns:
            ``[batch, seq]`` int64: the label of the next token of the same document, else -100.
        """
        target = torch.full_like(labels, IGNORED)
        target[:, :-1] = labels[:, 1:]
        if self.document is not None:
            target[:, :-1].masked_fill_(self.document[:, 1:] != self.document[:, :-1], IGNORED)
            target.masked_fill_(self.document < 0, IGNORED)
        return target


def documents_before(document: Tensor | None, steps: int) -> Tensor | None:
    """Documents of length ``seq - steps``, for attention to tokens at least ``steps`` back.

    As a query, token ``i`` stands for token ``i + steps``; as a key, for itself. The last tokens of
    a document have no query that far ahead, and count as padding.

    Args:
        document: ``[batch, seq]`` int32, negative for padding; None is one document.
        steps: Less than ``seq``.

    Returns:
        ``[batch, seq - steps]`` int32, or None.
    """
    if document is None:
        return None
    seen = document[:, :-steps]
    return seen.masked_fill(seen != document[:, steps:], -1)


IGNORED = -100
