"""Sums over a weight from which its shape statistics follow: κ, spread, and whether it is finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements; their temporaries stay in a core's cache
_DEVICE_BLOCK = 1 << 24  # on a GPU, whose launches and waits for results must pay: half a gigabyte of temporaries


@dataclass
class Moments:
    """Power sums of a weight in float64; sums of parts add up with ``+``.

    Attributes:
        count: number of elements.
        s1, s2, s3, s4: sums of x, x^2, x^3, x^4.
        absmax: largest |x|.
    """

    count: int = 0
    s1: float = 0.0
    s2: float = 0.0
    s3: float = 0.0
    s4: float = 0.0
    absmax: float = 0.0

    @classmethod
    def of(cls, weight: Tensor) -> Moments:
        """Moments of all elements of a float tensor of any shape."""
        total = cls()
        flat = weight.reshape(-1)
        block = _BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK
        for start in range(0, flat.numel(), block):
            part = flat[start : start + block]
            low, high = part.aminmax()
            x = part.double()
            square = x * x
            sums = x.sum(), square.sum(), (square * x).sum(), square.mul_(square).sum()
            absmax = torch.maximum(-low, high).double()  # both are NaN if one element is
            total += cls(x.numel(), *torch.stack([*sums, absmax]).tolist())
        return total

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.s1 + other.s1,
            self.s2 + other.s2,
            self.s3 + other.s3,
            self.s4 + other.s4,
            # max() drops a NaN on its right
            math.nan if math.isnan(self.absmax) or math.isnan(other.absmax) else max(self.absmax, other.absmax),
        )

    @property
    def finite(self) -> bool:
        return math.isfinite(self.absmax)

    @property
    def std(self) -> float:
        """Population standard deviation."""
        mean = self.s1 / self.count if self.count else 0.0
        return math.sqrt(max(self.s2 / self.count - mean * mean, 0.0)) if self.count else 0.0

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis κ = m4 / m2^2 - 3 of the central moments (a Gaussian has 0); 0 for a constant.

        NaN where the powers leave float64, which takes weights beyond 1e75 or below 1e-75.
        """
        if not self.count:
            return 0.0
        mean = self.s1 / self.count
        e2, e3, e4 = (s / self.count for s in (self.s2, self.s3, self.s4))
        if not math.isfinite(e4) or (e2 < 1e-150 and self.absmax > 0):
            return math.nan
        m2 = e2 - mean**2
        if m2 <= 1e-14 * e2:
            return 0.0
        return (e4 - 4 * mean * e3 + 6 * mean**2 * e2 - 3 * mean**4) / m2**2 - 3
