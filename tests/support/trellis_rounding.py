"""Groups to be rounded to trellis codes, and what a kernel that does it is held to beside ``quantizing.rounding.rings``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hard_weights import numbers
from torch import Tensor

from kappaquant.formats.trellis import TrellisFormat

SCALES = (1.0, 0.94, 1.06)
MORE = 0.005  # of what is lost that roundings may add
Parts = tuple[Tensor, Tensor, Tensor]


@cache
def problem(size: int, rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The middle one of three groups of inputs of two matrices, of which some inputs count more: views into larger tensors; a row is 0."""
    some = slice(size, 2 * size)
    x = numbers(2, 4 * size, 3 * size, seed=size) * torch.arange(1, 3 * size + 1).float() ** -0.5
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(x.mT @ x))
    upper = torch.linalg.cholesky(inverse, upper=True).to(device)[:, some, some]
    block = numbers(2, 3 * size, rows, seed=rows).to(device)[:, some]
    block[1, :, 0] = 0
    return block, upper


def check_losses(found: Parts, known: Parts, block: Tensor, upper: Tensor, fmt: TrellisFormat) -> None:
    """Codes, norms and errors that were found lie on rings, belong together, and lose what those that are known do."""
    codes, norms, errors = found
    flat = codes.transpose(0, 1).flatten(1)
    assert torch.equal(fmt.unpack_block(fmt.pack_block(flat)), flat)
    mine = _left_by(block, upper, codes, norms, fmt)
    torch.testing.assert_close(errors.double(), mine, rtol=1e-3, atol=1e-3 * float(mine.abs().mean()))
    lost = _left_by(block, upper, *known[:2], fmt).square().sum()
    assert float(mine.square().sum()) == pytest.approx(float(lost), rel=MORE)
    assert (codes == known[0]).float().mean() > 0.97


def _left_by(block: Tensor, upper: Tensor, codes: Tensor, norms: Tensor, fmt: TrellisFormat) -> Tensor:
    """Errors over the factor's diagonal, float64 [B, size, N]."""
    values = torch.tensor(fmt.codebook, device=codes.device).double()[codes.int()] * norms[:, None].double()
    return torch.linalg.solve_triangular(upper.double().mT, block.double() - values, upper=False)


def check_that_it_stays_in_its_row(value: float, choose: Callable[[Tensor], Parts], block: Tensor, levels: int) -> None:
    """A number that is none changes nothing in other rows of a block, and gives codes of levels that there are."""
    fine, hurt = choose(block), block.clone()
    hurt[0, 5, 7] = value
    codes, norms, errors = choose(hurt)
    others = torch.ones_like(norms, dtype=torch.bool)
    others[0, 7] = False
    assert int(codes.max()) < levels
    assert torch.equal(norms[others], fine[1][others])
    each = others[:, None].expand_as(codes)
    assert torch.equal(codes[each], fine[0][each])
    assert torch.equal(errors[each], fine[2][each])
