"""The comparisons that tests and policy authors rely on must be able to fail."""

import pytest
import torch

from trimkv_kernels.testing import assert_close


def test_assert_close_bounds_the_largest_and_the_rms_difference() -> None:
    expected = torch.zeros(100)
    assert_close(expected + 1e-6, expected, max_error=2e-6, rms_error=2e-6)
    spike = expected.clone()
    spike[3] = 1e-3
    with pytest.raises(AssertionError, match=r"largest difference 0\.001 \(allowed 0\.0001\)"):
        assert_close(spike, expected, max_error=1e-4, rms_error=1.0)
    with pytest.raises(AssertionError, match=r"rms 0\.0001 \(allowed 1e-05\)"):
        assert_close(spike, expected, max_error=1.0, rms_error=1e-5)
    with pytest.raises(AssertionError, match=r"shapes differ: \[100\] and \[1, 100\]"):
        assert_close(expected, expected[None], max_error=1.0, rms_error=1.0)
    with pytest.raises(AssertionError, match="largest difference nan"):
        assert_close(expected * torch.nan, expected, max_error=1.0, rms_error=1.0)
