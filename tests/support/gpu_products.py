"""Weights and inputs for tests of GPU kernels, and how far their products are off."""

from __future__ import annotations

import pytest
import torch

from kappaquant.formats import codec
from kappaquant.formats.codebook import FORMATS, CodebookFormat
from kappaquant.kernels.cuda import tensor_cores

ALL = sorted(FORMATS.values(), key=lambda f: (f.bits, f.group_size))
gpu = pytest.mark.gpu


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepared(fmt: CodebookFormat, n: int, k: int, seed: int = 0) -> tuple[tensor_cores.Weight, torch.Tensor]:
    """(weight on the GPU, decoded in float64)"""
    encoded = codec.encode(random(n, k, seed=seed).cuda(), fmt, "fast")
    decoded = codec.decode(encoded.packed, encoded.norms, fmt, k).double()
    return tensor_cores.Weight.of(encoded.packed, encoded.norms, fmt, k), decoded


def error(y: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor) -> float:
    """RMS error over the RMS that products of such vectors have; few outputs may by chance all be near 0."""
    expected = x.double() @ decoded.T
    usual = (x.double().norm(dim=1, keepdim=True) * decoded.norm(dim=1)).norm() / decoded.shape[1] ** 0.5
    return float((y.double() - expected).norm() / usual)
