"""The kernels' own tests with exponentials as inexact as a GPU's: no tolerance may need more.

NVIDIA's ``ex2.approx`` is off by up to 2**-22 of its result, and logarithms of base 2 by about as
much. The interpreter's are off by 2**-24.
"""

from collections.abc import Callable

import numpy as np
import oracle
import packing
import pytest
import test_attention_mass
import test_column_mass
import test_decode_attention
import test_extend_attention
import test_ragged_attention
import test_retention_attention
import test_retention_sum
import test_step
import torch
from triton.runtime.interpreter import InterpreterBuilder

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own are measured there"),
]

Function = Callable[[np.ndarray], np.ndarray]


def rounded(exact: np.ndarray, error: float) -> np.ndarray:
    """To the nearest number with so few digits that the relative error is at most this."""
    digits, exponent = np.frexp(exact)
    return np.ldexp(np.rint(digits / error) * error, exponent).astype(exact.dtype)


def enlarged(exact: np.ndarray, error: float) -> np.ndarray:
    """Larger by the whole error, but for ``exp2(0)``, which is exact on a GPU."""
    return np.where(exact == 1, exact, exact * exact.dtype.type(1 + error))


def use(
    monkeypatch: pytest.MonkeyPatch,
    changed: Callable[[np.ndarray, float], np.ndarray],
    error: float = 2.0**-22,
) -> None:
    """Let interpreted kernels compute exponentials and logarithms like this."""
    for name in ("exp", "exp2", "log", "log2"):
        exact: Function = getattr(np, name)

        def inexact(values: np.ndarray, exact: Function = exact) -> np.ndarray:
            return changed(np.asarray(exact(values)), error)

        monkeypatch.setattr(
            InterpreterBuilder,
            f"create_{name}",
            lambda self, values, inexact=inexact: self.unary_op(values, inexact),
        )


def check_sum(kind: str, seq: int) -> None:
    document, places = packing.pack(packing.layout(kind, seq))
    log_beta = test_retention_sum.make_log_beta(2, 1, seq, "cpu")
    test_retention_sum.check("triton", log_beta, document, places)


F32, F16 = torch.float32, torch.float16
TRITON = {"impl": "triton", "device": "cpu"}
# A sum is off the most where all errors have the same sign.
SUMS: dict[str, Callable[[], None]] = {
    "short": lambda: check_sum("short", 90),
    "packed": lambda: check_sum("packed", 40),
    "worked numbers": lambda: test_retention_sum.test_worked_numbers(**TRITON),
    "extremes": lambda: test_retention_sum.test_extreme_log_betas(**TRITON),
}
# In a softmax such errors cancel out.
ATTENTION: dict[str, Callable[[], None]] = {
    "whole steps": lambda: test_step.test_steps_follow_the_oracle(4, 1, 0, 0, F32, **TRITON),
    "decode": lambda: test_decode_attention.test_decode_matches_float64(
        test_decode_attention.SHAPES[0], F32, **TRITON
    ),
    "append": lambda: test_decode_attention.test_append_matches_float64(
        test_decode_attention.SHAPES[0], F32, padded=True, **TRITON
    ),
    "append in half": lambda: test_decode_attention.test_append_matches_float64(
        test_decode_attention.SHAPES[1], F16, padded=False, **TRITON
    ),
    "mass of a step": lambda: test_attention_mass.test_append_matches_float64(
        test_attention_mass.SHAPES[1], accumulate=False, **TRITON
    ),
    "prompt behind slots": lambda: test_extend_attention.test_matches_float64(
        oracle.CALL_SHAPES[0], F32, **TRITON
    ),
    "prompt": lambda: test_extend_attention.test_matches_float64(
        oracle.CALL_SHAPES[4], F32, **TRITON
    ),
    "column mass": lambda: test_column_mass.test_matches_float64(
        oracle.CALL_SHAPES[0], F32, padded=True, **TRITON
    ),
    "pages": lambda: test_ragged_attention.test_matches_float64("skewed", True, F32, **TRITON),
    "training": lambda: test_retention_attention.test_matches_float64(
        shape=test_retention_attention.SHAPES[2], dtype=F32, **TRITON
    ),
    "training in half": lambda: test_retention_attention.test_matches_float64(
        shape=test_retention_attention.SHAPES[1], dtype=F16, **TRITON
    ),
}


@pytest.mark.parametrize("case", SUMS)
def test_triton_sums(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, enlarged)
    SUMS[case]()


@pytest.mark.parametrize("case", ATTENTION)
def test_triton_attention(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, rounded)
    ATTENTION[case]()


@pytest.mark.parametrize("run", [SUMS["packed"], ATTENTION["decode"]])
def test_triton_sees_a_larger_error(
    run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, rounded, 2.0**-12)
    with pytest.raises(AssertionError):
        run()
