"""Who takes part: our ops, and everything else on the machine that computes the same.

A contestant is one function that builds a `Run` for a case. What cannot take part is recorded as
absent with a reason, what fails with its error; neither stops the run.
"""

from __future__ import annotations

from . import attention_rivals, slot_rivals, training_rivals  # noqa: F401 (they register)
from .case import Case
from .contestants import CONTESTANTS, Contestant
from .outcome import OURS


def contestants_of(case: Case, slow: bool = False) -> list[Contestant]:
    """Everybody who computes a case, ours first; or ours and those that take long to compile."""
    able = [x for x in CONTESTANTS if type(case) is x.case and x.when(case)]
    if not slow:
        return [x for x in able if not x.slow]
    return [x for x in able if x.slow or x.name in OURS] if any(x.slow for x in able) else []
