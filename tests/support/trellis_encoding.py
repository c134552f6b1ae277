"""What encoders of trellis codes are compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from hard_weights import hard
from torch import Tensor

from kappaquant.errors import NonFiniteError
from kappaquant.formats import codec
from kappaquant.formats.base import Effort
from kappaquant.formats.trellis import TRELLIS_FORMATS, TrellisFormat

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMLESS = (torch.nan, -torch.inf, 3e38, 7e5)
"""What no weight may hold: not finite, or too large for a norm."""
FAR_AND_EQUAL = (
    (-3e20, -1.0, -1e-9, -1e-12, 1e-12, 1e-9, 1.0, 3e20),
    (-0.1, -0.1, -0.1, -0.1, 0.1, 0.1, 0.1, 0.1),
)
"""Levels so far apart that squares are infinite, and levels that are equal."""


def variants() -> Iterator[TrellisFormat]:
    """Every format with norms of both dtypes."""
    for fmt in TRELLIS_FORMATS.values():
        yield fmt
        yield fmt.variant(fmt.codebook, "F32")


@cache
def expected(fmt: TrellisFormat, effort: Effort, dtype: torch.dtype) -> tuple[Tensor, codec.CodebookEncoded]:
    weight = hard(fmt).to(dtype)
    return weight, codec.encode(weight, fmt, effort)


def same_bytes(found: codec.CodebookEncoded, known: codec.CodebookEncoded) -> bool:
    return torch.equal(found.packed.cpu(), known.packed) and torch.equal(
        found.norms.cpu().view(torch.uint8), known.norms.view(torch.uint8)
    )


def refused(run: Callable[[], object]) -> str:
    """Why a weight has no norm."""
    with pytest.raises(NonFiniteError) as caught:
        run()
    return str(caught.value)
