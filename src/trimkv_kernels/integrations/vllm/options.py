"""What a user says in ``--hf-overrides '{"trimkv": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimkv_kernels.chosen_policy import (
    DEFAULT_BUDGET,
    DEFAULT_BUFFER,
    choose_policy,
    gates_sizes,
)
from trimkv_kernels.integrations.vllm.grid import Grid
from trimkv_kernels.integrations.vllm.rows import check_servable
from trimkv_kernels.policies.allocation import Allocation, Uniform
from trimkv_kernels.policies.base import RetentionPolicy, policy_name
from trimkv_kernels.policies.registry import make_policy, policy_class
from trimkv_kernels.suggestions import did_you_mean

KEYS = ("policy", "gates", "options", "budget", "buffer", "sinks", "recent", "allocation")


@dataclass(frozen=True)
class ServingOptions:
    """How a server bounds its rows.

    Attributes:
        policy: Scores the slots; not yet bound to the model.
        grid: Budget and buffer.
        sinks, recent: First and last positions that are never evicted; None is the policy's own.
        allocation: `Uniform` where the user says so; None is the policy's own way.
    """

    policy: RetentionPolicy
    grid: Grid
    sinks: int | None
    recent: int | None
    allocation: Allocation | None = None

    @classmethod
    def parse(cls, given: object, base: str) -> ServingOptions:
        """Read the options.

        Args:
            given: ``policy``, a registered name; ``gates``, folder or hub id of a checkpoint for a
                policy that has gates; ``options``, the policy's own; ``budget``, ``buffer``,
                ``sinks``, ``recent``; ``allocation``, ``"uniform"`` where heads would share.
                None is no option at all.
            base: Name of the model, for the gates that are known for it.

        Raises:
            ValueError: an option is unknown or of the wrong kind, or the policy cannot be served.
        """
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f"trimkv must be an object such as {_EXAMPLE}, got {given!r}")
        for key in given:
            if key not in KEYS:
                raise ValueError(
                    f"trimkv knows the options {', '.join(KEYS)}, got {key!r}."
                    f"{did_you_mean(str(key), KEYS)}"
                )
        policy = _make(given.get("policy"), given.get("gates"), given.get("options"), base)
        chosen = given.get("allocation")
        if chosen not in (None, "uniform"):
            raise ValueError(f"allocation must be 'uniform' or be left out, got {chosen!r}")
        allocation = None if chosen is None else Uniform()
        check_servable(policy, allocation)
        own_budget, own_buffer = gates_sizes(policy)
        sizes = {"budget": own_budget or DEFAULT_BUDGET, "buffer": own_buffer or DEFAULT_BUFFER}
        sizes |= {name: given[name] for name in sizes if given.get(name) is not None}
        return cls(policy, Grid(**sizes), given.get("sinks"), given.get("recent"), allocation)

    def __str__(self) -> str:
        return (
            f"policy {policy_name(self.policy)}, budget {self.grid.budget}, "
            f"buffer {self.grid.buffer}"
        )


_EXAMPLE = '{"policy": "streaming_llm", "budget": 512, "buffer": 128}'


def _make(name: Any, gates: Any, options: Any, base: str) -> RetentionPolicy:
    if name is not None and not isinstance(name, str):
        raise ValueError(f"policy must be a registered name, got {name!r}")
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options must be an object of the policy's arguments, got {options!r}")
    if gates is None and not options:
        return choose_policy(name, base)
    kind = policy_class(name or "trimkv")
    make: Any = kind
    if gates is not None:
        make = getattr(kind, "from_pretrained", None)
        if make is None:
            raise ValueError(f"policy {name!r} has no gates: leave gates out")
    arguments = () if gates is None else (gates,)
    options = dict(options or {})
    if isinstance(options.get("base"), str):  # of a policy that refines another one
        options["base"] = make_policy(options["base"])
    try:
        return make(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"options of policy {kind.name!r} do not fit: {error}") from error
