"""The truth: rotate, encode, decode, pack and unpack in plain torch float32. Every faster path is tested against this.

A group of ``group_size`` weights along the input axis is stored as one norm and one index per weight:

    w = norm * s1 * H(s2 * c[index])

with H the orthonormal Walsh-Hadamard transform in natural order, s1 and s2 fixed signs and c the Lloyd-Max codebook of
a Gaussian with variance 1/group_size. This is the scalar case of HIGGS (Malinovskii et al., NAACL 2025).

Inside, blocks lie as [group_size, M], the coordinate first and M groups side by side: butterflies, sums and packing are
then elementwise over long rows, and only elementwise IEEE operations occur, so that codes and norms depend neither on
the block size nor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.errors import NonFiniteError, PlanError
from kappaquant.format import BITS, Format, signs

Effort = Literal["fast", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "best")

# The scales tried by effort "best", relative to the group norm. On Gaussian weights the best scale has a mean of
# 1.0 (3 bits) to 1.19 (8 bits) and a deviation of 0.1; twice as many steps gain 0.1 % of the error at 3 bits, 0.4 % at 5.
_SCALES = tuple(0.72 + 0.04 * i for i in range(17))


@dataclass(frozen=True)
class Encoded:
    """What ``encode`` made of a weight [..., out, in].

    Attributes:
        packed: uint8 [..., out, G * bytes_per_group], a dense little-endian bitstream per group.
        norms: [..., out, G], float16 (float32 on request); one scale per group.
        squared_error: sum of (w - decoded)^2, over the zero-padded groups.
        energy: sum of w^2.
    """

    packed: Tensor
    norms: Tensor
    squared_error: float
    energy: float

    @property
    def relative_mse(self) -> float:
        return self.squared_error / self.energy if self.energy else 0.0


def rotate(x: Tensor, group_size: int) -> Tensor:
    """s2 * H(s1 * x) for each group of the last axis: [..., in] -> float32 [..., G * group_size], zero-padded.

    Since H is symmetric and orthonormal, rotate(x) . rotate(w) = x . w: a layer rotates its input once and then
    multiplies by norm * c[index].
    """
    return _over_groups(x, group_size, _rotate_block)


def unrotate(y: Tensor, group_size: int) -> Tensor:
    """Inverse of ``rotate``: s1 * H(s2 * y), [..., G * group_size] -> float32 of the same shape."""
    return _over_groups(y, group_size, _unrotate_block)


def encode(
    weight: Tensor,
    fmt: Format,
    effort: Effort = "best",
    *,
    codebook: Sequence[float] | None = None,
    norm_dtype: torch.dtype = torch.float16,
    name: str = "weight",
) -> Encoded:
    """Quantize a weight [..., out, in] of any float dtype; rows are zero-padded to whole groups.

    Effort "fast" takes the nearest centroid at the group norm; "best" first searches the scale of each group. Both end
    with the least-squares norm for the chosen centroids, and take the same bytes.

    Args:
        codebook: 2**bits ascending centroids, symmetric about 0; default the format's own.
        norm_dtype: float16, or float32 for tq3_native.
        name: what an error calls the weight.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, or a group's norm exceeds the norm dtype.
        PlanError: unknown effort.
    """
    if effort not in EFFORTS:
        raise PlanError(f"effort {effort!r}: must be one of {', '.join(EFFORTS)}")
    nearest = _nearest(tuple(codebook or fmt.codebook), weight.device)
    count = math.prod(fmt.norms_shape(tuple(weight.shape)))
    packed = torch.empty(count, fmt.bytes_per_group, dtype=torch.uint8, device=weight.device)
    norms = torch.empty(count, dtype=norm_dtype, device=weight.device)
    errors = torch.empty(count, device=weight.device)
    energies = torch.empty(count, device=weight.device)
    for block, y, norm in _unit_blocks(weight, fmt.group_size, name):
        scale = torch.ones_like(norm) if effort == "fast" else nearest.search_scale(y)
        codes, centroids = nearest.assign(y if effort == "fast" else y * scale)
        stored = _stored_norm(y, centroids, norm, norm_dtype, name)
        if (
            effort == "best"
        ):  # the norm is settled: take the nearest centroids at exactly that norm, which can only help
            ratio = norm / stored.float()
            codes, centroids = nearest.assign(y * torch.where(ratio.isfinite(), ratio, 1.0))
        packed[block] = _pack_block(codes, fmt.bits).t()
        norms[block] = stored
        errors[block] = _error(y, centroids, norm, stored.float())
        energies[block] = norm * norm
    shape = tuple(weight.shape)
    return Encoded(
        packed.view(fmt.packed_shape(shape)),
        norms.view(fmt.norms_shape(shape)),
        errors.sum(dtype=torch.float64).item(),
        energies.sum(dtype=torch.float64).item(),
    )


def squared_errors(
    weight: Tensor, group_size: int, bits: Iterable[int] = BITS, name: str = "weight"
) -> dict[int, float]:
    """Sum of squared errors of effort "fast" at each bit width, from one rotation of the weight [..., out, in]."""
    tables = {b: _nearest(Format(b, group_size).codebook, weight.device) for b in bits}
    totals = dict.fromkeys(tables, 0.0)
    for _, y, norm in _unit_blocks(weight, group_size, name):
        for b, nearest in tables.items():
            _, centroids = nearest.assign(y)
            stored = _stored_norm(y, centroids, norm, torch.float16, name)
            totals[b] += _error(y, centroids, norm, stored.float()).sum(dtype=torch.float64).item()
    return totals


def decode(
    packed: Tensor, norms: Tensor, fmt: Format, in_features: int, codebook: Sequence[float] | None = None
) -> Tensor:
    """The weight, float32 [..., out, in_features], from packed [..., out, G * bytes_per_group] and norms [..., out, G]."""
    book = torch.tensor(tuple(codebook or fmt.codebook), dtype=torch.float32, device=packed.device)
    lead = packed.shape[:-1]
    rows = packed.reshape(-1, fmt.bytes_per_group)
    scales = norms.reshape(-1).float()
    out = torch.empty(len(scales), fmt.group_size, device=packed.device)
    for block in _blocks(len(scales), packed.device):
        codes = _unpack_block(rows[block].t(), fmt.bits)
        y = torch.index_select(book, 0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
        out[block] = (_unrotate_block(y) * scales[block]).t()
    return out.view(*lead, -1)[..., :in_features].contiguous()


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """uint8 codes [..., G * group_size] -> uint8 [..., G * bytes_per_group]; code i fills bits [i*bits, (i+1)*bits)."""
    block = codes.reshape(-1, fmt.group_size).t()
    return _pack_block(block, fmt.bits).t().reshape(*codes.shape[:-1], -1)


def unpack(packed: Tensor, fmt: Format) -> Tensor:
    """Inverse of ``pack``: uint8 [..., G * bytes_per_group] -> uint8 codes [..., G * group_size]."""
    block = packed.reshape(-1, fmt.bytes_per_group).t()
    return _unpack_block(block, fmt.bits).t().reshape(*packed.shape[:-1], -1)


class _Nearest:
    """Nearest centroid by table: a uniform grid so fine that no cell holds two decision thresholds.

    A look-up and one comparison then replace a binary search: 2 ns against 12-27 ns a weight on one core.
    A tie takes the lower index.
    """

    def __init__(self, codebook: tuple[float, ...], device: torch.device) -> None:
        self.centroids = torch.tensor(codebook, dtype=torch.float32)
        thresholds = (self.centroids[1:] + self.centroids[:-1]) / 2
        cells = 128
        while True:
            cells *= 2
            self.last, self.scale = cells - 1, cells / (2.1 * float(thresholds.abs().max()))
            occupied = self._cell(thresholds)
            if len(occupied.unique()) == len(occupied):
                break
        self.lower = torch.searchsorted(occupied, torch.arange(cells, dtype=torch.int32)).to(torch.uint8)
        self.threshold = torch.full((cells,), math.inf)
        self.threshold[occupied.long()] = thresholds
        # for the search: magnitudes of scaled unit vectors, which no coordinate exceeds, to the centroid at a cell's middle
        self.fineness = 4096 / _SCALES[-1]
        middles = (torch.arange(4098) + 0.5) / self.fineness
        self.magnitude = self.centroids[torch.bucketize(middles, thresholds)]
        for table in ("centroids", "lower", "threshold", "magnitude"):
            setattr(self, table, getattr(self, table).to(device))

    def _cell(self, y: Tensor) -> Tensor:
        return (y * self.scale).add_((self.last + 1) / 2).clamp_(0, self.last).to(torch.int32)

    def assign(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(uint8 codes, float32 centroids), both shaped like y."""
        cell = self._cell(y).view(-1)
        codes = torch.index_select(self.lower, 0, cell).view(y.shape)
        codes += (y > torch.index_select(self.threshold, 0, cell).view(y.shape)).view(torch.uint8)
        centroids = torch.index_select(self.centroids, 0, codes.view(-1).to(torch.int32))
        return codes, centroids.view(y.shape)

    def search_scale(self, y: Tensor) -> Tensor:
        """[M] the scale of each group whose centroids explain most of y's energy, <y, c>^2 / <c, c>.

        Ranking may take a cell's middle for its members; the codes themselves are assigned exactly.
        """
        best = y.new_full(y.shape[1:], -1.0)
        scale = torch.ones_like(best)
        # groups whose squares all but vanish in float32 are no unit vectors
        magnitude, centroids, product = y.abs().clamp_(max=1.0), torch.empty_like(y), torch.empty_like(y)
        cell = torch.empty(y.shape, dtype=torch.int32, device=y.device)
        for candidate in _SCALES:  # in buffers made once: allocating them anew would double the time
            cell.copy_(torch.mul(magnitude, candidate * self.fineness, out=product))
            torch.index_select(self.magnitude, 0, cell.view(-1), out=centroids.view(-1))
            dot = _sum0(torch.mul(magnitude, centroids, out=product)).clone()
            score = dot * dot / _sum0(torch.mul(centroids, centroids, out=product))
            better = score > best
            best = torch.where(better, score, best)
            scale.masked_fill_(better, candidate)
        return scale


@cache
def _nearest(codebook: tuple[float, ...], device: torch.device) -> _Nearest:
    return _Nearest(codebook, device)


@cache
def _sign_columns(group_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    s1, s2 = (torch.tensor(s, dtype=torch.float32, device=device)[:, None] for s in signs(group_size))
    return s1, s2


def _sum0(x: Tensor) -> Tensor:
    """Sum over the first axis (a power of two) in a fixed tree order; overwrites x."""
    half = x.shape[0]
    while half > 1:
        half //= 2
        torch.add(x[:half], x[half : 2 * half], out=x[:half])
    return x[0]


def _wht(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the first axis of [D, M], natural order; overwrites x."""
    size = x.shape[0]
    other = torch.empty_like(x)
    h = 1
    while h < size:
        a, b = x.view(size // (2 * h), 2, -1), other.view(size // (2 * h), 2, -1)
        torch.add(a[:, 0], a[:, 1], out=b[:, 0])
        torch.sub(a[:, 0], a[:, 1], out=b[:, 1])
        x, other = other, x
        h *= 2
    # a tensor, not a number: CUDA divides by a host scalar as a multiplication by its reciprocal
    return x.div_(torch.tensor(math.sqrt(size), dtype=torch.float32, device=x.device))


def _rotate_block(x: Tensor) -> Tensor:
    s1, s2 = _sign_columns(x.shape[0], x.device)
    return _wht(x * s1).mul_(s2)


def _unrotate_block(y: Tensor) -> Tensor:
    s1, s2 = _sign_columns(y.shape[0], y.device)
    return _wht(y * s2).mul_(s1)


def _over_groups(x: Tensor, group_size: int, transform) -> Tensor:  # type: ignore[no-untyped-def]
    padded = _pad(x, group_size)
    block = padded.reshape(-1, group_size).t().float().contiguous()
    return transform(block).t().reshape(padded.shape)


def _pad(x: Tensor, group_size: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % group_size)) if x.shape[-1] % group_size else x


def _blocks(count: int, device: torch.device) -> Iterator[slice]:
    """Blocks of groups: small enough for a CPU's cache, large enough to fill a GPU."""
    size = 2048 if device.type == "cpu" else 1 << 18
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _unit_blocks(weight: Tensor, group_size: int, name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which groups, their rotated unit vectors [D, M], their norms [M]) for a weight [..., in]."""
    groups = _pad(weight, group_size).reshape(-1, group_size)
    for block in _blocks(len(groups), weight.device):
        x = groups[block].t().contiguous().float()
        norm = _sum0(x * x).sqrt_()
        if not bool(norm.isfinite().all()):
            raise NonFiniteError(_non_finite_message(x, name))
        yield block, _rotate_block(x / torch.where(norm == 0, 1.0, norm)), norm


def _non_finite_message(x: Tensor, name: str) -> str:
    bad = x[~x.isfinite()]
    if len(bad):
        return f"{name}: holds {bad[0].item()}; a codebook needs finite weights. Repair the source, or keep this tensor at 16 bits"
    return (
        f"{name}: holds {x.abs().max().item():.3g}, too large for float32 sums of squares; keep this tensor at 16 bits"
    )


def _stored_norm(y: Tensor, centroids: Tensor, norm: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The least-squares norm norm * <y, c> / <c, c> in its stored precision, [M]."""
    stored = (norm * (_sum0(y * centroids) / _sum0(centroids * centroids))).to(dtype)
    if not bool(stored.isfinite().all()):
        raise NonFiniteError(
            f"{name}: a group's norm is {norm.max().item():.6g}, more than {dtype} holds ({torch.finfo(dtype).max:g}); "
            "keep this tensor at 16 bits"
        )
    return stored


def _error(y: Tensor, centroids: Tensor, norm: Tensor, stored: Tensor) -> Tensor:
    """Squared error of each group, [M]."""
    difference = y * norm - centroids * stored
    return _sum0(difference.mul_(difference))


def _pack_block(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [D, M] -> bytes [D * bits / 8, M]: eight codes fill ``bits`` bytes."""
    codes = codes.reshape(-1, 8, codes.shape[1])
    out = torch.zeros(codes.shape[0], bits, codes.shape[2], dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[:, byte] |= codes[:, i] << shift
        if shift + bits > 8:
            out[:, byte + 1] |= codes[:, i] >> (8 - shift)
    return out.view(-1, codes.shape[2])


def _unpack_block(packed: Tensor, bits: int) -> Tensor:
    """Inverse of ``_pack_block``: bytes [D * bits / 8, M] -> uint8 codes [D, M]."""
    packed = packed.reshape(-1, bits, packed.shape[1])
    out = torch.empty(packed.shape[0], 8, packed.shape[2], dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = packed[:, byte] >> shift
        if shift + bits > 8:
            code |= packed[:, byte + 1] << (8 - shift)
        out[:, i] = code & (2**bits - 1)
    return out.view(-1, packed.shape[2])
