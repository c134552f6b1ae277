"""The truth: rotate, encode, decode, pack and unpack in plain torch float32. Every faster path is tested against this.

A group of ``group_size`` weights along the input axis is stored as one norm and one index per weight:

    w = norm * s1 * H(s2 * c[index])

with H the orthonormal Walsh-Hadamard transform in natural order, s1 and s2 fixed signs and c the Lloyd-Max codebook of
a Gaussian with variance 1/group_size. This is the scalar case of HIGGS (Malinovskii et al., NAACL 2025).

The steps, over blocks of groups, are those of ``hadamard`` and ``search``: codes and norms depend neither on the block size nor on the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.errors import NonFiniteError, PlanError
from kappaquant.formats.base import EFFORTS, Effort, Encoded
from kappaquant.formats.codebook import BITS, NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat, GroupedFormat
from kappaquant.formats.hadamard import Rotation
from kappaquant.formats.search import Assignment, Products, Rounding, nearest

T = TypeVar("T")
B = TypeVar("B", bound=Products)
Chosen = Assignment | Rounding
NORMS_TORCH = {"F16": torch.float16, "F32": torch.float32}
CPU_BLOCK = 2048
"""Groups that are encoded together on a CPU: their arrays stay in its cache."""


class CodebookEncoded(Encoded):
    """What ``encode`` made of a weight [..., out, in]."""

    @property
    def packed(self) -> Tensor:
        """uint8 [..., out, G * bytes_per_group], a dense little-endian bitstream per group."""
        return self.parts[PACKED_SUFFIX]

    @property
    def norms(self) -> Tensor:
        """[..., out, G], one scale per group."""
        return self.parts[NORMS_SUFFIX]


def rotate(x: Tensor, group_size: int) -> Tensor:
    """s2 * H(s1 * x) for each group of the last axis: [..., in] -> float32 [..., G * group_size], zero-padded.

    Since H is symmetric and orthonormal, rotate(x) . rotate(w) = x . w: a layer rotates its input once and then
    multiplies by norm * c[index].
    """
    return _over_groups(x, group_size, Rotation.forward)


def unrotate(y: Tensor, group_size: int) -> Tensor:
    """Inverse of ``rotate``: s1 * H(s2 * y), [..., G * group_size] -> float32 of the same shape."""
    return _over_groups(y, group_size, Rotation.inverse)


def encode(weight: Tensor, fmt: GroupedFormat, effort: Effort = "best", *, name: str = "weight") -> CodebookEncoded:
    """Quantize a weight [..., out, in] of any float dtype; rows are zero-padded to whole groups.

    Effort "fast" takes what is closest at the group norm; "best" first searches the scale of each group. Both end
    with the least-squares norm for the chosen centroids, and take the same bytes.

    Args:
        name: what an error calls the weight.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, or a group's norm exceeds the norm dtype.
        PlanError: unknown effort.
    """
    if effort not in EFFORTS:
        raise PlanError(f"effort {effort!r}: must be one of {', '.join(EFFORTS)}")
    count, norm_dtype = math.prod(fmt.norms_shape(tuple(weight.shape))), NORMS_TORCH[fmt.norms]
    packed = torch.empty(count, fmt.bytes_per_group, dtype=torch.uint8, device=weight.device)
    norms = torch.empty(count, dtype=norm_dtype, device=weight.device)
    errors = torch.empty(count, device=weight.device)
    energies = torch.empty(count, device=weight.device)
    for block, y, norm, rounding in _unit_blocks(weight, fmt.group_size, name, fmt.rounding):
        rounding.choose(y if effort == "fast" else y * rounding.best_scale(y))
        stored = _stored_norm(y, rounding, norm, norm_dtype, name)
        if effort == "best":
            # the norm is settled: take the nearest centroids at exactly that norm, which can only help
            ratio = norm / stored.float()
            rounding.choose(y * torch.where(ratio.isfinite(), ratio, 1.0))
        packed[block] = fmt.pack_block(rounding.codes).t()
        norms[block] = stored
        errors[block] = _error(y, rounding, norm, stored)
        energies[block] = norm * norm
    shape = tuple(weight.shape)
    return CodebookEncoded(
        {PACKED_SUFFIX: packed.view(fmt.packed_shape(shape)), NORMS_SUFFIX: norms.view(fmt.norms_shape(shape))},
        errors.sum(dtype=torch.float64).item(),
        energies.sum(dtype=torch.float64).item(),
    )


def squared_errors(
    weight: Tensor, group_size: int, bits: Iterable[int] = BITS, name: str = "weight"
) -> dict[int, float]:
    """Sum of squared errors of effort "fast" at each bit width, from one rotation of the weight [..., out, in]."""
    tables = {b: nearest(CodebookFormat(b, group_size).codebook, weight.device) for b in bits}
    totals = dict.fromkeys(tables, 0.0)
    for _, y, norm, assignment in _unit_blocks(weight, group_size, name, partial(Assignment, group_size)):
        for b, table in tables.items():
            assignment.assign(y, table)
            stored = _stored_norm(y, assignment, norm, torch.float16, name)
            totals[b] += _error(y, assignment, norm, stored).sum(dtype=torch.float64).item()
    return totals


def decode(packed: Tensor, norms: Tensor, fmt: GroupedFormat, in_features: int) -> Tensor:
    """The weight, float32 [..., out, in_features], from packed [..., out, G * bytes_per_group] and norms [..., out, G]."""
    book = centroids(fmt, packed.device)
    lead = packed.shape[:-1]
    rows = packed.reshape(-1, fmt.bytes_per_group)
    scales = norms.reshape(-1).float()
    out = torch.empty(len(scales), fmt.group_size, device=packed.device)
    make = partial(Rotation, fmt.group_size, device=packed.device)
    for block, rotation in _blocks(len(scales), packed.device, make):
        codes = fmt.unpack_block(rows[block].t())
        torch.index_select(book, 0, codes.view(-1).to(torch.int32), out=rotation.input.view(-1))
        out[block] = rotation.inverse().mul_(scales[block]).t()
    return out.view(*lead, -1)[..., :in_features].contiguous()


def decode_rotated(packed: Tensor, norms: Tensor, fmt: GroupedFormat) -> Tensor:
    """norm * c[code], still rotated: float32 [..., out, G * group_size]; its product with ``rotate(x)`` is that of w and x."""
    values = centroids(fmt, packed.device)[indices(packed, fmt).to(torch.int32)].view(*norms.shape, fmt.group_size)
    return values.mul_(norms.float().unsqueeze(-1)).flatten(-2)


def indices(packed: Tensor, fmt: GroupedFormat) -> Tensor:
    """uint8 [..., G * bytes_per_group] -> uint8 indices into the codebook [..., G * group_size]."""
    groups = packed.reshape(-1, fmt.bytes_per_group)
    return fmt.unpack_block(groups.t()).t().reshape(*packed.shape[:-1], -1)


def packed(indices: Tensor, fmt: GroupedFormat) -> Tensor:
    """Inverse of ``indices``."""
    groups = indices.reshape(-1, fmt.group_size)
    return fmt.pack_block(groups.t()).t().reshape(*indices.shape[:-1], -1)


@cache
def centroids(fmt: GroupedFormat, device: torch.device) -> Tensor:
    """The codebook, float32, one-dimensional; made once a device, so that nothing waits for a GPU later."""
    return torch.tensor(fmt.codebook, dtype=torch.float32, device=device)


def norms_refusal(norms: Tensor) -> str | None:
    """Why norms can not be held in float16, or None: none may become infinite, zero, or lose digits as a subnormal."""
    if norms.dtype == torch.float16 or not norms.numel():
        return None
    size = norms.abs()
    most, least = torch.finfo(torch.float16).max, torch.finfo(torch.float16).tiny
    if bool((size > most).any()):
        return f"a norm is {size.max().item():.6g}, float16 holds at most {most:g}"
    if bool(((size > 0) & (size < least)).any()):
        return f"a norm is {size[size > 0].min().item():.6g}, float16 loses digits below {least:.6g}"
    return None


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., 8 * n] -> uint8 [..., n * bits], a dense little-endian stream: code i fills bits [i*bits, (i+1)*bits)."""
    return pack_block(codes.reshape(-1, 8).t(), bits).t().reshape(*codes.shape[:-1], -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of ``pack``: uint8 [..., n * bits] -> uint8 codes [..., 8 * n]."""
    return unpack_block(packed.reshape(-1, bits).t(), bits).t().reshape(*packed.shape[:-1], -1)


def _over_groups(x: Tensor, group_size: int, transform: Callable[[Rotation], Tensor]) -> Tensor:
    padded = _pad(x, group_size)
    groups = padded.reshape(-1, group_size)
    rotation = Rotation(group_size, len(groups), x.device)
    rotation.input.copy_(groups.t())
    return transform(rotation).t().reshape(padded.shape)


def _pad(x: Tensor, group_size: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % group_size)) if x.shape[-1] % group_size else x


def _blocks(count: int, device: torch.device, make: Callable[[int], T]) -> Iterator[tuple[slice, T]]:
    """Blocks of groups, small enough for a CPU's cache and large enough to fill a GPU, each with what ``make(size)`` made.

    It is made once, and anew only for a last block of another size.
    """
    size = min(CPU_BLOCK if device.type == "cpu" else 1 << 18, count)
    buffers = make(size) if count else None
    for start in range(0, count, size or 1):
        stop = min(start + size, count)
        if stop - start < size:
            buffers = make(stop - start)
        assert buffers is not None
        yield slice(start, stop), buffers


def _unit_blocks(
    weight: Tensor, group_size: int, name: str, buffers: Callable[[int, torch.device], B]
) -> Iterator[tuple[slice, Tensor, Tensor, B]]:
    """(which groups, their rotated unit vectors [D, M], their norms [M], buffers for M groups) for a weight [..., in]."""
    groups = _pad(weight, group_size).reshape(-1, group_size)

    def make(count: int) -> tuple[Rotation, B]:
        return Rotation(group_size, count, weight.device), buffers(count, weight.device)

    for block, (rotation, assignment) in _blocks(len(groups), weight.device, make):
        x = rotation.input.copy_(groups[block].t().contiguous())
        # in float64, because torch's float32 root on a CPU can be MKL's, which is one unit off in a fifth of all cases
        norm = assignment.dot(x, x).double().sqrt().float()
        if not bool(norm.isfinite().all()):
            raise NonFiniteError(_non_finite_message(x, name))
        yield block, rotation.forward().div_(torch.where(norm == 0, 1.0, norm)), norm, assignment


def _non_finite_message(x: Tensor, name: str) -> str:
    bad = x[~x.isfinite()]
    if len(bad):
        return f"{name}: holds {bad[0].item()}; a codebook needs finite weights. Repair the source, or keep this tensor at 16 bits"
    return (
        f"{name}: holds {x.abs().max().item():.3g}, too large for float32 sums of squares; keep this tensor at 16 bits"
    )


def _stored_norm(y: Tensor, assignment: Chosen, norm: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The least-squares norm norm * <y, c> / <c, c> in its stored precision, [M]."""
    c = assignment.centroids
    dot = assignment.dot(y, c).clone()
    stored = (norm * (dot / assignment.dot(c, c))).to(dtype)
    if not bool(stored.isfinite().all()):
        raise NonFiniteError(
            f"{name}: a group's norm is {norm.max().item():.6g}, more than {dtype} holds ({torch.finfo(dtype).max:g}); "
            "keep this tensor at 16 bits"
        )
    return stored


def _error(y: Tensor, assignment: Chosen, norm: Tensor, stored: Tensor) -> Tensor:
    """Squared error of each group, [M]; consumes the centroids."""
    difference = assignment.centroids.mul_(stored.float())
    difference -= torch.mul(y, norm, out=assignment.scratch)
    return assignment.dot(difference, difference)


def pack_block(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [D, M] -> bytes [D * bits / 8, M]: eight codes fill ``bits`` bytes."""
    codes = codes.reshape(-1, 8, codes.shape[1])
    out = codes.new_empty(codes.shape[0], bits, codes.shape[2])
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        if shift:
            out[:, byte] |= codes[:, i] << shift
        else:
            out[:, byte] = codes[:, i]
        if shift + bits > 8:
            out[:, byte + 1] = codes[:, i] >> (8 - shift)
    return out.view(-1, codes.shape[2])


def unpack_block(packed: Tensor, bits: int) -> Tensor:
    """Inverse of ``pack_block``: bytes [D * bits / 8, M] -> uint8 codes [D, M]."""
    packed = packed.reshape(-1, bits, packed.shape[1])
    out = torch.empty(packed.shape[0], 8, packed.shape[2], dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = packed[:, byte] >> shift
        if shift + bits > 8:
            code |= packed[:, byte + 1] << (8 - shift)
        out[:, i] = code & (2**bits - 1)
    return out.view(-1, packed.shape[2])
