"""Inputs for the policies that follow attention: the shared worked example, and ragged slots."""

import math

import torch

from trimkv_kernels.policies import ObservationView, SlotView

# Attention of two query heads that share a KV head: row i is what query i gives slots 0 to i.
HEAD0 = [[1.0], [0.6, 0.4], [0.5, 0.2, 0.3], [0.4, 0.1, 0.1, 0.4], [0.3, 0.1, 0.2, 0.1, 0.3]]
HEAD1 = [[1.0], [0.2, 0.8], [0.1, 0.6, 0.3], [0.1, 0.5, 0.2, 0.2], [0.1, 0.4, 0.1, 0.2, 0.2]]


def attention_rows(rows: list[list[float]]) -> torch.Tensor:
    """``[queries, slots]``, zero above the diagonal."""
    width = len(rows[-1])
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def slots(
    fields: dict[str, torch.Tensor],
    *,
    t: list[int] | None = None,
    position: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    budget: int = 0,
) -> SlotView:
    """Fields ``[batch, num_kv_heads, num_slots, ...]`` of a row's first tokens, unless told."""
    shape = next(iter(fields.values())).shape[:3]
    position = torch.arange(shape[2]).expand(shape) if position is None else position
    return SlotView(
        "test",
        0,
        torch.tensor([shape[2]] * shape[0] if t is None else t, dtype=torch.int32),
        position.int(),
        torch.ones(shape, dtype=torch.bool) if valid is None else valid,
        fields,
        budget=budget,
    )


def seen(
    fields: dict[str, torch.Tensor],
    attention: torch.Tensor,
    *,
    t: list[int],
    num_queries: list[int],
    position: torch.Tensor | None = None,
) -> ObservationView:
    """What ``observe`` gets; ``attention`` ``[batch, num_kv_heads, num_slots]``."""
    shape = attention.shape
    position = torch.arange(shape[2]).expand(shape) if position is None else position
    now = torch.tensor(t, dtype=torch.int32)
    return ObservationView(
        "test",
        0,
        now,
        position.int(),
        position < now[:, None, None],
        fields,
        {"attention": attention, "num_queries": torch.tensor(num_queries, dtype=torch.int32)},
    )


def window_slots(
    key: torch.Tensor,
    queries: torch.Tensor,
    *,
    t: torch.Tensor,
    position: torch.Tensor,
    valid: torch.Tensor,
    query_position: torch.Tensor,
) -> SlotView:
    """What policies with a window of queries get."""
    return SlotView(
        "test",
        0,
        t.int(),
        position.int(),
        valid,
        given={"key": key, "queries": queries, "query_position": query_position.int()},
    )


def worked_window(heads: list[list[list[float]]]) -> SlotView:
    """One KV head whose last queries attend as told: ``[group][window][slots seen]``."""
    num_slots, window = len(heads[0][-1]), len(heads[0])
    # unit keys, so that a query's entries are its logits; 7 where it must not look
    queries = torch.full((1, len(heads), window, num_slots), 7.0)
    for head, rows in enumerate(heads):
        for i, row in enumerate(rows):
            logits = [math.log(p) if p else -1e4 for p in row]
            queries[0, head, i, : len(row)] = torch.tensor(logits)
    position = torch.arange(num_slots)[None, None]
    return window_slots(
        torch.eye(num_slots)[None, None],
        queries * math.sqrt(num_slots),
        t=torch.tensor([num_slots]),
        position=position,
        valid=position >= 0,
        query_position=torch.arange(num_slots - window, num_slots)[None],
    )


def ragged_window(
    *, window: int, num_slots: int = 40, group: int = 3, dtype: torch.dtype = torch.float32
) -> SlotView:
    """Rows that have seen 300, 41 and 3 tokens, heads with 0 to ``num_slots`` of them left.

    What is not valid, and queries that a row does not have, are NaN. Queries stand in no order.
    """
    torch.manual_seed(0)
    counts = [[40, 17, 33], [29, 40, 1], [3, 2, 0]]
    t = torch.tensor([300, 41, 3])
    position = torch.zeros(3, 3, num_slots, dtype=torch.long)
    for row in range(3):
        for head, n in enumerate(counts[row]):
            position[row, head, :n] = torch.randperm(int(t[row]))[:n].sort().values
    valid = torch.arange(num_slots) < torch.tensor(counts)[..., None]
    key = torch.randn(3, 3, num_slots, 8).to(dtype).masked_fill(~valid[..., None], math.nan)
    query_position = torch.stack(
        [torch.arange(int(n) - window, int(n))[torch.randperm(window)] for n in t]
    ).clamp(min=-1)
    queries = 2 * torch.randn(3, 3 * group, window, 8).to(dtype)
    queries = queries.masked_fill((query_position < 0)[:, None, :, None], math.nan)
    return window_slots(
        key, queries, t=t, position=position, valid=valid, query_position=query_position
    )


def rows_of(view: SlotView, rows: slice, *, num_slots: int) -> SlotView:
    """The same with some rows and so many slots, more of them empty or fewer."""

    def cut(tensor: torch.Tensor, fill: float) -> torch.Tensor:
        tensor = tensor[rows, :, :num_slots]
        more = num_slots - tensor.shape[2]
        padding = tensor.new_full((*tensor.shape[:2], more, *tensor.shape[3:]), fill)
        return torch.cat((tensor, padding), dim=2)

    return window_slots(
        cut(view.key, math.nan),
        view.queries[rows],
        t=view.t[rows],
        position=cut(view.position, 0),
        valid=cut(view.valid, False),
        query_position=view.query_position[rows],
    )
