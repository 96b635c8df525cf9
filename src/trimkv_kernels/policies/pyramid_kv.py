"""PyramidKV: SnapKV's scores, with more slots in low layers than in high ones."""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_kernels.policies.allocation import Allocation, Pyramid
from trimkv_kernels.policies.registry import register_policy
from trimkv_kernels.policies.snap_kv import SnapKV


@register_policy("pyramid_kv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV (Cai et al., arXiv 2406.02069): :class:`SnapKV` scores, :class:`Pyramid` budgets.

    Args:
        beta: The last layer gets about ``1 / beta`` of the mean budget outside the window. The
            other options are SnapKV's.

    Raises:
        TypeError, ValueError: see :class:`SnapKV`, :class:`Pyramid`.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        Pyramid(beta=self.beta, window=self.window)  # refuses a bad beta now

    @property
    def allocation(self) -> Allocation:  # type: ignore[override]
        return Pyramid(beta=self.beta, window=self.window)
