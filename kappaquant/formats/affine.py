"""MLX's affine format in plain torch: weight = scale * code + bias for each group along the input axis.

The layout is that of ``mlx.core.quantize``: codes as one little-endian bitstream per row, read as uint32, and a scale and a bias
per group in the model's dtype. As in ``codec``, only elementwise IEEE operations decide what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kappaquant.errors import NonFiniteError, PlanError
from kappaquant.formats import codec
from kappaquant.formats.search import Products

Effort = Literal["fast", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "best")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
BLOCK = 2048  # groups at once: the buffers of a block stay in a core's cache

# The grids a search begins from: the shares of a group's range that they span, by bits, and their shifts in steps. Twice as
# many spans gain 0.4 % of the error on Gaussian weights; without the shifts it is 3 % larger.
_SPANS = {2: (0.5, 0.95), 3: (0.6, 1.0), 4: (0.7, 1.0), 5: (0.8, 1.0), 6: (0.9, 1.0), 8: (0.97, 1.0)}
_CANDIDATES = 5
_SHIFTS = (-0.33, 0.0, 0.33)
_STEPS = 6  # of least squares, from the best of them
_FLAT = 1e-7  # the least scale of mlx.core.quantize


@dataclass(frozen=True)
class Quantized:
    """What ``quantize`` made of a weight [..., in].

    Attributes:
        packed: uint8 [..., in * bits / 8]; four bytes are one element of MLX's uint32 array.
        scales: [..., in / group_size], in the dtype asked for.
        biases: the same shape and dtype.
        squared_error: sum of (weight - dequantized)^2.
        energy: sum of weight^2.
    """

    packed: Tensor
    scales: Tensor
    biases: Tensor
    squared_error: float
    energy: float


def check_affine(bits: int, group_size: int, where: str) -> None:
    """Raise PlanError unless MLX has a format of these bits and groups; ``where`` opens the message."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise PlanError(
            f"{where}: {bits} bits in groups of {group_size}; MLX's affine format has {', '.join(map(str, BITS))} bits "
            f"and groups of {', '.join(map(str, GROUP_SIZES))}"
        )


def quantize(
    weight: Tensor, bits: int, group_size: int, dtype: torch.dtype, effort: Effort = "best", name: str = "weight"
) -> Quantized:
    """Quantize a weight [..., in]; ``in`` must be a multiple of the group size.

    Args:
        dtype: of scales and biases. MLX multiplies in it, so it has to be the model's own.
        effort: "best" looks for scale and bias with the least squared error of each group; "fast" spans from its least to its
            largest weight, as ``mlx.core.quantize`` does.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, or values beyond ``dtype``.
        PlanError: no such format, or an input axis that is no multiple of the group.
    """
    check_affine(bits, group_size, name)
    if weight.shape[-1] % group_size:
        raise PlanError(f"{name}: {weight.shape[-1]} inputs are no multiple of the group size {group_size}")
    groups = weight.reshape(-1, group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    scales, biases = torch.empty(len(groups), dtype=dtype), torch.empty(len(groups), dtype=dtype)
    errors, energies = torch.empty(len(groups)), torch.empty(len(groups))
    grid = None
    for start in range(0, len(groups), BLOCK):
        block = slice(start, min(start + BLOCK, len(groups)))
        count = block.stop - start
        if grid is None or grid.count != count:
            grid = _Grid(group_size, count, 2**bits - 1)
        x = groups[block].t().to(torch.float32).contiguous()
        scale, bias = _span(x, grid) if effort == "fast" else _search(x, grid, bits)
        scales[block], biases[block] = _stored(scale, dtype), bias.to(dtype)
        scale, bias = scales[block].float(), biases[block].float()
        if not bool((scale.isfinite() & bias.isfinite()).all()):
            largest = float(x.abs().max())
            raise NonFiniteError(
                f"{name}: holds {largest:.6g}, which scales in {dtype} cannot express; export it in another"
            )
        q = grid.assign(x, scale, bias)
        codes[block] = q.to(torch.uint8).t()
        difference = q.mul_(scale).add_(bias).sub_(x)
        errors[block] = grid.sums.dot(difference, difference)
        energies[block] = grid.sums.dot(x, x)
    packed = codec.pack(codes, bits)
    lead = weight.shape[:-1]
    return Quantized(
        packed.reshape(*lead, -1),
        scales.view(*lead, -1),
        biases.view(*lead, -1),
        errors.sum(dtype=torch.float64).item(),
        energies.sum(dtype=torch.float64).item(),
    )


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, bits: int, group_size: int) -> Tensor:
    """float32 [..., in] from what ``quantize`` stores; scale and bias are applied in float32."""
    codes = codec.unpack(packed, bits)
    grouped = codes.view(*scales.shape, group_size).float()
    values = grouped * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)
    return values.view(*scales.shape[:-1], -1)


class _Grid:
    """Codes of a block [group_size, M], as floats, and sums over them."""

    def __init__(self, group_size: int, count: int, top: int) -> None:
        self.group_size, self.count, self.top = group_size, count, top
        self.sums = Products(group_size, count, torch.device("cpu"))
        self.codes = torch.empty(group_size, count)
        self._one = torch.ones(())

    def assign(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """The nearest codes, in a buffer that the next call overwrites; ties go to the even one."""
        return torch.sub(x, bias, out=self.codes).div_(scale).round_().clamp_(0, self.top)

    def total(self, a: Tensor) -> Tensor:
        """[M] the sums of a block's columns."""
        return self.sums.dot(a, self._one).clone()


def _span(x: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """The grid of ``mlx.core.quantize``: its end of larger magnitude and, nearly, zero are codes."""
    low, high = x.amin(0), x.amax(0)
    negative = low.abs() > high.abs()
    scale = ((high - low) / grid.top).clamp_(min=_FLAT)
    scale = torch.where(negative, scale, -scale)
    edge = torch.where(negative, low, high)
    steps = (edge / scale).round_()
    return torch.where(steps != 0, edge / steps, scale), torch.where(steps != 0, edge, 0.0)


def _search(x: Tensor, grid: _Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of least squared error that least squares reaches from the best of several grids.

    For given codes q the best scale is cov(x, q) / var(q), and the error left is var(x) - cov(x, q)^2 / var(q).
    """
    low, high = x.amin(0), x.amax(0)
    middle, width = (low + high) / 2, high - low
    mean = grid.total(x) / grid.group_size
    centred = x - mean
    best = torch.full_like(width, -1.0)
    scale, bias = torch.ones_like(width), mean.clone()  # of a group of equal weights

    def improve(from_scale: Tensor, from_bias: Tensor) -> None:
        q = grid.assign(x, from_scale, from_bias)
        mean_q = grid.total(q) / grid.group_size
        variance = grid.sums.dot(q, q) - grid.group_size * mean_q * mean_q
        covariance = grid.sums.dot(centred, q)
        found = covariance / variance
        score = covariance * found
        better = (score > best) & (found > 0) & found.isfinite()
        torch.where(better, score, best, out=best)
        torch.where(better, found, scale, out=scale)
        torch.where(better, mean - found * mean_q, bias, out=bias)

    narrow, wide = _SPANS[bits]
    for i in range(_CANDIDATES):
        span = width * (narrow + (wide - narrow) * i / (_CANDIDATES - 1))
        step = _positive(span / grid.top)
        for shift in _SHIFTS:
            improve(step, middle - span / 2 + shift * step)
    for _ in range(_STEPS):
        improve(scale, bias)
    return scale, bias


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale in its stored precision, never zero, which nothing could be divided by."""
    limits = torch.finfo(dtype)
    stored = scale.to(dtype)
    return torch.where(stored == 0, limits.smallest_normal, stored)
