"""For tests, benchmarks and policy authors: oracles, comparisons, the model that ships with us."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_kernels.embedded import embedded_model
from trimkv_kernels.testing.conformance import PolicyError, check_policy
from trimkv_kernels.testing.oracle import masked_reference
from trimkv_kernels.testing.tokens import Tokens, example_shape

__all__ = [
    "PolicyError",
    "Tokens",
    "assert_close",
    "check_policy",
    "embedded_model",
    "example_shape",
    "masked_reference",
]


def assert_close(actual: Tensor, expected: Tensor, *, max_error: float, rms_error: float) -> None:
    """Bound both the largest and the root-mean-square difference.

    Args:
        actual, expected: Tensors of one shape, any float dtype; compared in float64.
        max_error: Bound on the largest absolute difference.
        rms_error: Bound on the root of the mean square difference.

    Raises:
        AssertionError: a shape differs, a value is not finite, or a bound is exceeded.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    difference = (actual.double() - expected.double()).abs()
    largest, rms = difference.max().item(), difference.square().mean().sqrt().item()
    if not (largest <= max_error and rms <= rms_error):  # NaN fails too
        raise AssertionError(
            f"largest difference {largest:.3g} (allowed {max_error:.3g}), "
            f"rms {rms:.3g} (allowed {rms_error:.3g})"
        )
    if not torch.isfinite(actual).all():
        raise AssertionError("a value is not finite")
