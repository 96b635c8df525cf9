"""Which policy a user means: a policy, a name, or nothing."""

from __future__ import annotations

import logging

from trimkv_kernels.gates.published import PUBLISHED, find_gates
from trimkv_kernels.policies import RetentionPolicy, make_policy
from trimkv_kernels.policies.streaming_llm import StreamingLLM
from trimkv_kernels.policies.trimkv import TrimKV

logger = logging.getLogger("trimkv_kernels")

DEFAULT_BUDGET = 512
DEFAULT_BUFFER = 128


def choose_policy(policy: RetentionPolicy | str | None, base: str) -> RetentionPolicy:
    """The policy that a user means who says ``policy`` for a model named ``base``.

    Raises:
        TypeError: it is neither a policy nor a name.
        ValueError: the name is unknown, or no gates are known for TRIM-KV.
    """
    if isinstance(policy, RetentionPolicy):
        return policy
    if policy == TrimKV.name:
        checkpoint = find_gates(base) or PUBLISHED.get(base)
        if checkpoint is None:
            raise ValueError(
                f"policy='trimkv' needs retention gates, and none are known for {base!r}; pass "
                f"TrimKV.from_pretrained(folder). Gates are published for {', '.join(PUBLISHED)}"
            )
        return TrimKV.from_pretrained(checkpoint)
    if isinstance(policy, str):
        return make_policy(policy)
    if policy is not None:
        raise TypeError(f"policy must be a RetentionPolicy, a name or None, got {type(policy)}")
    checkpoint = find_gates(base)
    if checkpoint is not None:
        logger.warning("policy: TRIM-KV with the gates in %s", checkpoint)
        return TrimKV.from_pretrained(checkpoint)
    published = PUBLISHED.get(base)
    hint = f"policy='trimkv' downloads {published}" if published else "none are published for it"
    logger.warning(
        "policy: StreamingLLM (no TRIM-KV gates found for %s; %s)", base or "this model", hint
    )
    return StreamingLLM()


def gates_sizes(policy: RetentionPolicy) -> tuple[int | None, int | None]:
    """Budget and buffer that a policy's gates were trained for, where they say so."""
    if isinstance(policy, TrimKV):
        return policy.gates.config.budget, policy.gates.config.buffer
    return None, None
