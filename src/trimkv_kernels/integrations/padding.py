"""Padding masks: what they say about a call's tokens, and about those that a cache has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Padding:
    """Which tokens of a text are padding.

    The cache's clock counts the real tokens of each row. The mask of the first columns, the
    prompt's, is kept too. A later mask must agree with both, because a bounded cache can neither
    hide a token that it holds nor bring back one that was padding.

    Attributes:
        order: ``[batch, q_len]`` int64, the order of the latest call's columns that puts padding
            on the left; None if it is there already.
        unfed: ``[batch]`` bool, rows whose last token counted as padding, because ``decode_loop``
            chose an eos there. None if there are none.
    """

    def __init__(self) -> None:
        self.unfed: Tensor | None = None
        self.order: Tensor | None = None
        self._known: Tensor | None = None  # [batch, first columns] bool

    def of_call(
        self,
        mask: Tensor,
        q_len: int,
        *,
        seen: int,
        t: Tensor | None,
        is_whole: bool,
        may_be_empty: bool,
        may_move: bool,
    ) -> Tensor | None:
        """Check a mask, and return the part for the call. Reads back.

        Args:
            mask: ``[batch, columns]``, 0 for padding, with a column for each token of the text so
                far, or of the call.
            q_len: Tokens of the call.
            seen: Tokens before the call, padding included.
            t: ``[batch]``, real tokens before the call; None if there are none.
            is_whole: The mask must have a column for each token so far.
            may_be_empty: A row may have no real token yet.
            may_move: Padding between real tokens may be moved to the left, see :attr:`order`.

        Returns:
            ``[batch, q_len]`` bool, padding on the left; None where every token is real.

        Raises:
            ValueError: the length is wrong, tokens of earlier calls are hidden or brought back,
                padding follows a real token of the call, or a row has no real token.
        """
        columns = mask.shape[1]
        if columns != seen + q_len and (is_whole or columns != q_len):
            raise ValueError(
                f"attention_mask must have {seen + q_len} columns, one for each of {seen} tokens "
                f"so far and {q_len} new ones, got {columns}"
            )
        whole = mask.bool()
        if seen > 0 and t is not None and columns > q_len:
            self.check_seen(whole[:, :seen], t)
        if q_len > 1 and columns == seen + q_len:
            self._known = whole.clone()
        valid = whole[:, -q_len:]
        if valid.all():
            return None
        started = torch.zeros_like(valid[:, 0]) if t is None else (t > 0).to(valid.device)
        late = (valid[:, :-1] & ~valid[:, 1:]).any(dim=1)
        # between turns: a row's last token, which was not read yet, then padding, then new tokens
        if late.any() and may_move and bool((~late | (started & valid[:, -1])).all()):
            self.order = valid.int().argsort(dim=1, stable=True)
            valid, late = valid.gather(1, self.order), torch.zeros_like(late)
        if late.any():
            raise ValueError(
                "attention_mask must be padded on the left only, got padding after a real token "
                f"of the call in rows {_rows(late)}; set tokenizer.padding_side='left'. (PEFT's "
                "virtual tokens come before the padding: pass prompts of one length, or one)"
            )
        check_rows(valid.any(dim=1) | started | may_be_empty)
        return valid

    def check_seen(self, seen: Tensor, t: Tensor) -> None:
        """Check that a mask agrees about the tokens that were seen.

        Args:
            seen: ``[batch, tokens seen]`` bool.
            t: ``[batch]``, how many of them were real.

        Raises:
            ValueError: it does not; names the rows.
        """
        real, held = seen.sum(dim=1), t.to(seen.device)
        differs = real != held
        if self._known is not None and self._known.shape[0] == seen.shape[0]:
            known = self._known[:, : seen.shape[1]].to(seen.device)
            differs = differs | (known != seen[:, : known.shape[1]]).any(dim=1)
        if differs.any():
            raise ValueError(
                f"attention_mask must be the same as before for the {seen.shape[1]} tokens that "
                f"the cache has seen, got another in rows {_rows(differs)}: it says that "
                f"{real.tolist()} of each row were real, and the cache has {held.tolist()}. A "
                "bounded cache cannot hide tokens that it holds, nor bring back padding (a row "
                "that has ended is padding from then on); read the text again with new_cache()"
            )

    def crop(self, seen: int) -> None:
        """Keep only the first ``seen`` columns."""
        if self._known is not None:
            self._known = self._known[:, :seen]

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Restart all rows, or some. Their earlier tokens count as padding."""
        if rows is None:
            self._known = self.unfed = None
            return
        for name in ("_known", "unfed"):
            table = getattr(self, name)
            if table is not None:
                table = table.clone()
                table[torch.as_tensor(rows, device=table.device)] = False
                setattr(self, name, table)

    def select(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was."""
        for name in ("_known", "unfed"):
            table = getattr(self, name)
            if table is not None:
                setattr(self, name, table.index_select(0, index.to(table.device)))


def move_columns(inputs: dict[str, Any], order: Tensor, seen: int) -> None:
    """Put the columns of a decoder stack's ``inputs`` in ``order`` ``[batch, q_len]``.

    A token keeps its position id; if none are given, its column's. Features of images stay, because
    the order of real tokens does not change.
    """
    position = inputs.get("position_ids")
    if position is None:
        position = seen + torch.arange(order.shape[1], device=order.device)[None]
    inputs["position_ids"] = move_positions(position, order)
    for name in ("input_ids", "inputs_embeds", "visual_pos_masks"):
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = in_order(inputs[name], order)


def move_positions(position: Tensor, order: Tensor) -> Tensor:
    """Position ids ``[..., batch or 1, q_len]`` in ``order`` ``[batch, q_len]``."""
    axes = position.shape[:-2]
    return position.expand(*axes, *order.shape).gather(
        -1, order.to(position.device).expand(*axes, *order.shape)
    )


def move_back(output: Any, order: Tensor) -> Any:
    """A decoder stack's output, with the columns as they were before :func:`move_columns`."""
    back = order.argsort(dim=1)
    if isinstance(output, tuple):
        return (in_order(output[0], back), *output[1:])
    output.last_hidden_state = in_order(output.last_hidden_state, back)
    if output.hidden_states is not None:
        output.hidden_states = tuple(in_order(x, back) for x in output.hidden_states)
    return output


def in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """``tensor`` ``[batch, q_len, ...]`` in ``order``."""
    order = order.to(tensor.device)
    return tensor.gather(
        1, order.reshape(*order.shape, *(1,) * (tensor.dim() - 2)).expand_as(tensor)
    )


def is_right_padded(mask: Tensor) -> bool:
    """Whether a row of ``mask`` ``[batch, length]`` has padding after a real token; reads back."""
    valid = mask.bool()
    return bool((valid[:, :-1] & ~valid[:, 1:]).any())


def check_shape(mask: Tensor, batch: int, q_len: int) -> None:
    """Raise unless ``mask`` is ``[batch, columns]`` with at least ``q_len`` columns.

    Raises:
        ValueError: it has another shape.
    """
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < q_len:
        raise ValueError(
            f"attention_mask must have shape [{batch}, at least {q_len}], "
            f"got {list(mask.shape)}; custom 4-D masks do not work on a bounded cache"
        )


def check_whole_mask(mask: Tensor | None, total: int, was_padded: bool) -> None:
    """Check that layers with a sliding window, which keep padding, get a mask that shows it.

    Args:
        mask: ``[batch, columns]``, or None.
        total: Tokens so far, the call's included.
        was_padded: An earlier call had padding.

    Raises:
        ValueError: the mask is missing, or does not have ``total`` columns.
    """
    if mask is None and was_padded:
        raise ValueError(
            f"attention_mask must be given, with {total} columns: earlier calls were padded, "
            "and layers with a sliding window keep padding"
        )
    if mask is not None and mask.dim() == 2 and mask.shape[1] != total:
        raise ValueError(
            f"attention_mask must have {total} columns, one for each token so far, got "
            f"{mask.shape[1]}: this model has layers with a sliding window"
        )


def check_rows(has_token: Tensor) -> None:
    """Check that every row of ``has_token`` ``[batch]`` bool is True.

    Raises:
        ValueError: some are not; names the rows.
    """
    if not has_token.all():
        raise ValueError(
            "attention_mask must have a real token in every row, got only padding in rows "
            f"{_rows(~has_token)}"
        )


def _rows(chosen: Tensor) -> list[int]:
    rows: list[int] = chosen.nonzero().flatten().tolist()
    return rows


class RowEnds:
    """Which rows of a running ``generate`` have ended, and get padding since then.

    Args:
        is_tracked: Rows end one by one. With beams they do not.

    Attributes:
        has_begun: The prompt was read, so the next calls are steps.
        is_assisted: Drafts are verified.
    """

    def __init__(self, *, is_tracked: bool = False, is_assisted: bool = False) -> None:
        self._is_tracked, self.is_assisted = is_tracked, is_assisted
        self.has_begun = False
        self._ended: Tensor | None = None  # [batch] bool, with the token that was chosen last
        self._closed: Tensor | None = None  # the rows in which that token is padding
        self._closed_rows: list[bool] = []

    def note(self, done: Tensor) -> None:
        """Take the result of the stopping criteria after a token, ``[batch]`` bool.

        It is read back. That costs nothing extra, because ``generate`` waits for it too.
        """
        if not self._is_tracked or done.shape[0] == 1:
            return
        if self._ended is None or self._closed is None:
            self._ended, self._closed = done.clone(), torch.zeros_like(done)
        else:
            self._closed.copy_(self._ended)  # in place: a compiled step knows the address
            self._ended |= done
        self._closed_rows = self._closed.tolist()

    def of_step(self) -> Tensor | None:
        """``[batch, 1]`` bool, False in rows that get padding; None if there are none."""
        if torch.compiler.is_compiling():
            return None if self._closed is None else ~self._closed[:, None]
        if not any(self._closed_rows):
            return None
        return ~torch.tensor(self._closed_rows)[:, None]
