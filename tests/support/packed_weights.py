"""Packed weights for tests, and what they decode to."""

from __future__ import annotations

import torch

from kappaquant.formats.base import Format
from kappaquant.kernels.base import Use
from kappaquant.runtime.packed import PackedWeight


def held(weight: torch.Tensor, fmt: Format, *uses: Use, device: str = "cpu") -> tuple[PackedWeight, torch.Tensor]:
    """(a filled module that serves the first of ``uses``, by default products; what it decodes to)"""
    encoded = fmt.encode(weight, "fast")
    module = PackedWeight(fmt, weight.shape, device, uses or ("linear",))
    module.fill((), encoded.parts)
    module.finish()
    return module, fmt.decode(encoded.parts, weight.shape[-1])
