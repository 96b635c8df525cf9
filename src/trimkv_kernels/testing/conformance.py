"""The conformance suite: what every retention policy must do, rule by rule.

Each rule runs the policy in a small :class:`~trimkv_kernels.cache.BoundedKVCache` on random tokens:
two layers, three rows, two KV heads of two query heads. No model is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimkv_kernels.cache import BoundedKVCache
from trimkv_kernels.policies.allocation import Uniform
from trimkv_kernels.policies.base import (
    FieldSpec,
    ModelShape,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    policy_name,
)
from trimkv_kernels.testing.tokens import Tokens, example_shape

_BATCH = 3
_CALLS = (20, 1, 1, 1, 1, 1, 1, 7, 1, 1, 1, 1, 1, 1, 1)
_TOTAL = sum(_CALLS)
_BUDGET, _BUFFER = 12, 3
_RTOL, _ATOL = 1e-4, 1e-5  # of float32 sums taken in another order


class PolicyError(AssertionError):
    """A policy breaks a rule.

    Attributes:
        rule: The rule's name, one of :data:`RULES`.
    """

    def __init__(self, policy: str, rule: str, message: str) -> None:
        super().__init__(f"policy {policy!r} breaks the rule {rule!r}: {message}")
        self.rule = rule


def check_policy(
    policy: RetentionPolicy,
    *,
    rules: Iterable[str] | None = None,
    impl: str = "auto",
    device: torch.device | str = "cpu",
) -> None:
    """Run the conformance suite on a policy; it stops at the first broken rule.

    Args:
        policy: Of any kind; one with parameters must fit :func:`example_shape`.
        rules: Names of the rules to run, see :data:`RULES`; None runs all, in their order.
        impl: Backend of the cache.
        device: Where the cache and its tokens are; a policy's parameters are moved there.

    Raises:
        PolicyError: names the first broken rule and says how it is broken.
        ValueError: there is no such rule.
    """
    wanted = list(RULES) if rules is None else list(rules)
    unknown = sorted(set(wanted) - set(RULES))
    if unknown:
        raise ValueError(f"rules must be some of {', '.join(RULES)}, got {unknown}")
    shape = example_shape(device)
    bench = _Bench(policy.bind(shape), shape, impl)
    for rule in wanted:
        try:
            RULES[rule](bench)
        except _BrokenError as broken:
            raise PolicyError(policy_name(policy), rule, str(broken)) from broken
        except (ValueError, AttributeError, TypeError, RuntimeError, IndexError) as error:
            message = f"{type(error).__name__}: {error}"
            raise PolicyError(policy_name(policy), rule, message) from error


class _BrokenError(Exception):
    """A rule is broken; the message says how."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _BrokenError(message)


class _Bench:
    """Runs a policy, and records the views it gets."""

    def __init__(self, policy: RetentionPolicy, shape: ModelShape, impl: str) -> None:
        self.policy, self.impl, self.shape = policy, impl, shape
        self.tokens = Tokens.random(self.shape, _TOTAL, (0, 6, 2))

    def cache(self, policy: RetentionPolicy | None = None, **changes: Any) -> BoundedKVCache:
        policy = self.policy if policy is None else policy
        options = {
            "num_layers": self.shape.num_layers,
            "num_heads": self.shape.num_heads,
            "num_kv_heads": self.shape.num_kv_heads,
            "head_dim": self.shape.head_dim,
            "batch_size": _BATCH,
            "budget": _TOTAL if policy.capacity_only else _BUDGET,
            "buffer": _BUFFER,
            "sinks": 1,
            "recent": 1,
            "dtype": self.shape.dtype,
            "device": self.shape.device,
            "impl": self.impl,
            **changes,
        }
        return BoundedKVCache(policy, **options)

    def feed(
        self, cache: BoundedKVCache, tokens: Tokens, calls: Sequence[int] = _CALLS, start: int = 0
    ) -> list[Tensor]:
        """Feed ``calls`` from column ``start`` on; returns each call's output of all layers."""
        edges = pairwise(accumulate((start, *calls)))
        return [tokens.feed(cache, first, last) for first, last in edges]

    def kept(self, cache: BoundedKVCache, rows: Sequence[int] | None = None) -> list[list[int]]:
        """What each layer, row and head holds, sorted."""
        return [
            sorted(p for p in head if p >= 0)
            for layer in range(self.shape.num_layers)
            for row in (range(cache.batch_size) if rows is None else rows)
            for head in cache.positions(layer)[row].tolist()
        ]

    def record(self) -> _Spy:
        """The views that the policy gets in a run."""
        spy = _Spy(self.policy)
        self.feed(self.cache(spy), self.tokens)
        return spy


class _Spy(RetentionPolicy):
    """Passes every call to a policy, and keeps copies of the views."""

    def __init__(self, policy: RetentionPolicy) -> None:
        self.policy = policy
        self.needs, self.fields = policy.needs, policy.fields
        self.allocation, self.capacity_only = policy.allocation, policy.capacity_only
        self.scores_content = policy.scores_content
        self.slots: list[SlotView] = []
        self.tokens: list[TokenView] = []

    @property
    def is_affine(self) -> bool:
        return self.policy.is_affine

    def on_insert(self, tokens: TokenView) -> dict[str, Tensor]:
        return self.policy.on_insert(tokens)

    def observe(self, seen: ObservationView) -> None:
        self.policy.observe(seen)

    def score(self, slots: SlotView) -> Tensor:
        self.slots.append(_copy(slots))
        return self.policy.score(slots)

    def affine(self, tokens: TokenView) -> tuple[Tensor, Tensor] | None:
        self.tokens.append(_copy(tokens))
        return self.policy.affine(tokens)


def _copy(view: Any, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """A view with every tensor changed."""
    return replace(
        view,
        t=change(view.t),
        position=change(view.position),
        valid=change(view.valid),
        fields={name: change(x) for name, x in view.fields.items()},
        given={name: change(x) for name, x in view.given.items()},
    )


def _tensors(view: Any) -> list[Tensor]:
    return [view.t, view.position, view.valid, *view.fields.values(), *view.given.values()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of float32 sums; infinities and NaN must be at the same places."""
    return torch.allclose(a, b, rtol=_RTOL, atol=_ATOL, equal_nan=True)


def _results(policy: RetentionPolicy, view: Any) -> list[Tensor]:
    """Scores of slots, or slopes and offsets of tokens, at full size."""
    if isinstance(view, SlotView):
        return [policy.score(view)]
    shape = (view.position.shape[0], view.num_kv_heads, view.position.shape[1])
    return [term.expand(shape) for term in policy.affine(view) or ()]


def _shape_and_dtype(bench: _Bench) -> None:
    policy = bench.policy
    _require(isinstance(policy.needs, Needs), f"needs must be Needs, got {policy.needs!r}")
    for name, spec in policy.fields.items():
        _require(isinstance(spec, FieldSpec), f"field {name!r} must be a FieldSpec, got {spec!r}")
    spy = bench.record()
    for view in (*spy.slots, *spy.tokens):
        for result in _results(policy, view):
            _require(result.dtype == torch.float32, f"scores must be float32, got {result.dtype}")
    for slots in spy.slots:
        scores, shape = policy.score(slots), slots.valid.shape
        _require(
            scores.shape == shape,
            f"scores must have shape {list(shape)}, got {list(scores.shape)}",
        )
    _require(
        bool(spy.slots or spy.tokens or policy.capacity_only),
        "neither score nor affine was ever called",
    )


def _purity(bench: _Bench) -> None:
    spy = bench.record()
    for view in (*spy.slots, *spy.tokens):
        before = _copy(view)
        first, second = _results(bench.policy, view), _results(bench.policy, view)
        _require(
            all(_equal(a, b) for a, b in zip(first, second, strict=True)),
            "two calls on the same slots give different scores",
        )
        _require(
            all(_equal(a, b) for a, b in zip(_tensors(before), _tensors(view), strict=True)),
            "scoring changes what it was given",
        )


def _determinism(bench: _Bench) -> None:
    caches = [bench.cache(), bench.cache()]
    for cache in caches:
        bench.feed(cache, bench.tokens)
    _require(
        bench.kept(caches[0]) == bench.kept(caches[1]), "two equal runs keep different positions"
    )


def _slot_permutation(bench: _Bench) -> None:
    if bench.policy.needs.chronological:
        return
    for view in bench.record().slots:
        order = torch.randperm(view.valid.shape[2], generator=torch.Generator().manual_seed(0))
        order = order.to(view.valid.device)
        at_slots = {"position", "valid", *view.fields, "key", "value"}
        moved = replace(
            view,
            position=view.position[:, :, order],
            valid=view.valid[:, :, order],
            fields={name: x[:, :, order] for name, x in view.fields.items()},
            given={n: x[:, :, order] if n in at_slots else x for n, x in view.given.items()},
        )
        valid = moved.valid
        _require(
            _same(bench.policy.score(view)[:, :, order][valid], bench.policy.score(moved)[valid]),
            "scores depend on the order of the slots",
        )


def _batch_invariance(bench: _Bench) -> None:
    spy = bench.record()
    for view in (*spy.slots, *spy.tokens):
        together = _results(bench.policy, view)
        for row in range(_BATCH):
            one = slice(row, row + 1)
            alone = _results(bench.policy, _copy(view, itemgetter(one)))
            valid = view.valid[one]
            valid = valid if valid.dim() == 3 else valid[:, None].expand_as(alone[0])
            _require(
                all(_same(a[one][valid], b[valid]) for a, b in zip(together, alone, strict=True)),
                f"row {row} scores differently in a batch and alone",
            )


def _padding(bench: _Bench) -> None:
    cache = bench.cache()
    bench.feed(cache, bench.tokens)
    for row in range(_BATCH):
        alone = bench.cache(batch_size=1)
        tokens = bench.tokens.without_padding(row)
        pad = _TOTAL - tokens.real.shape[1]
        bench.feed(alone, tokens, (_CALLS[0] - pad, *_CALLS[1:]))
        _require(
            bench.kept(cache, [row]) == bench.kept(alone),
            f"a row with {pad} pads on the left keeps other positions than alone",
        )


def _ties(bench: _Bench) -> None:
    tokens = Tokens.repeated(bench.shape, _TOTAL, (0, 6, 2))
    cache = bench.cache()
    bench.feed(cache, tokens)
    for row in range(_BATCH):
        alone = bench.cache(batch_size=1)
        one = tokens.without_padding(row)
        pad = _TOTAL - one.real.shape[1]
        bench.feed(alone, one.with_noise(1e-7), (_CALLS[0] - pad, *_CALLS[1:]))
        _require(
            bench.kept(cache, [row]) == bench.kept(alone),
            "of equal tokens, rounding decides which ones stay; a policy that is affine and "
            "scores what a token is must say scores_content = True",
        )


def _nan(bench: _Bench) -> None:
    for view in bench.record().slots:
        scores = bench.policy.score(view)
        _require(
            not bool(scores[view.valid].isnan().any()), "a score is NaN where a slot is filled"
        )
        if view.valid.all():
            continue
        spoilt = _spoil(view)
        _require(
            _same(bench.policy.score(spoilt)[view.valid], scores[view.valid]),
            "the contents of empty slots change the scores of filled slots",
        )
    flat = replace(
        bench.tokens, inputs={name: torch.zeros_like(x) for name, x in bench.tokens.inputs.items()}
    )
    cache = bench.cache()
    bench.feed(cache, flat)
    _require(not cache.stats().nan_layers, "tokens that are all zero give NaN scores")


def _spoil(view: SlotView) -> SlotView:
    """Put other finite numbers into the empty slots, as an eviction may leave them there."""

    def change(name: str, x: Tensor) -> Tensor:
        if x.shape[:3] != view.valid.shape or name not in {*view.fields, "key", "value"}:
            return x
        empty = ~view.valid.reshape(*view.valid.shape, *(1,) * (x.dim() - 3))
        return torch.where(empty, torch.full_like(x, 7), x)

    return replace(
        view,
        fields={name: change(name, x) for name, x in view.fields.items()},
        given={name: change(name, x) for name, x in view.given.items()},
    )


def _monotone_budget(bench: _Bench) -> None:
    if bench.policy.capacity_only:
        return
    kept = []
    for budget in (8, 13, 20):
        cache = bench.cache(budget=budget)
        bench.feed(cache, bench.tokens, (34,))
        kept.append(bench.kept(cache))
    for small, large in pairwise(kept):
        _require(
            all(set(a) <= set(b) for a, b in zip(small, large, strict=True)),
            "of the same prompt, a larger budget drops a token that a smaller one keeps",
        )


def _full_budget(bench: _Bench) -> None:
    tokens = bench.tokens
    cache = bench.cache(budget=_TOTAL, allocation=Uniform())
    output = torch.cat(bench.feed(cache, tokens), dim=3)
    _require(not cache.stats().budget_reached, "something is evicted though all tokens fit")
    query, key, value = (tokens.inputs[name].double() for name in ("query", "key", "value"))
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    causal = torch.ones(_TOTAL, _TOTAL, dtype=torch.bool, device=query.device).tril()
    visible = causal & tokens.real[:, None, None]
    scores = (query @ key.mT * bench.shape.head_dim**-0.5).masked_fill(~visible, -torch.inf)
    expected = scores.softmax(-1).nan_to_num() @ value
    real = tokens.real[:, None, :, None]
    _require(
        _same((output * real).double(), expected * real),
        "with a budget for all tokens the output is not that of the full cache",
    )


def _decay(bench: _Bench) -> None:
    for view in bench.record().tokens:
        if view.position.shape[1] > 1:
            continue
        decay = bench.policy.decay(view)
        if decay is not None:
            terms = [term[..., 0] for term in _results(bench.policy, view)]
            _require(
                all(_same(a, b) for a, b in zip(decay.terms(), terms, strict=True)),
                "decay does not say what affine says",
            )


def _field_reuse(bench: _Bench) -> None:
    fresh, used = bench.cache(), bench.cache()
    bench.feed(fresh, bench.tokens)
    bench.feed(used, Tokens.random(bench.shape, _TOTAL, seed=9))
    used.reset()
    bench.feed(used, bench.tokens)
    _require(
        bench.kept(fresh) == bench.kept(used),
        "a cache that was used before and reset keeps other positions than a new one",
    )


def _reorder(bench: _Bench) -> None:
    tokens = Tokens.random(bench.shape, _TOTAL, seed=4)
    index, head, rest = [2, 0, 0], _CALLS[:6], _CALLS[6:]
    moved, straight = bench.cache(), bench.cache()
    bench.feed(moved, tokens, head)
    moved.reorder(index)
    later = tokens.rows(index)
    bench.feed(moved, later, rest, sum(head))
    bench.feed(straight, later)
    _require(
        bench.kept(moved) == bench.kept(straight),
        "rows that were reordered between calls keep other positions than rows that were not",
    )


def _save_load(bench: _Bench) -> None:
    half, rest = _CALLS[:6], _CALLS[6:]
    straight, saved, loaded = bench.cache(), bench.cache(), bench.cache()
    bench.feed(straight, bench.tokens)
    bench.feed(saved, bench.tokens, half)
    with tempfile.TemporaryDirectory() as folder:
        saved.save(Path(folder) / "slots")
        bench.feed(saved, Tokens.random(bench.shape, _TOTAL, seed=5), rest, sum(half))
        loaded.load(Path(folder) / "slots")
    bench.feed(loaded, bench.tokens, rest, sum(half))
    _require(
        bench.kept(loaded) == bench.kept(straight),
        "a cache that was saved and loaded between calls keeps other positions",
    )


Rule = Callable[[_Bench], None]

RULES: Mapping[str, Rule] = {
    "shape_and_dtype": _shape_and_dtype,
    "purity": _purity,
    "determinism": _determinism,
    "slot_permutation": _slot_permutation,
    "batch_invariance": _batch_invariance,
    "nan": _nan,
    "field_reuse": _field_reuse,
    "reorder": _reorder,
    "save_load": _save_load,
    "padding": _padding,
    "ties": _ties,
    "monotone_budget": _monotone_budget,
    "full_budget": _full_budget,
    "decay": _decay,
}
"""The rules by name, in the order in which :func:`check_policy` runs them."""
