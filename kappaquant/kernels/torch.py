"""Codebook products in plain torch, on any device: exact in float32, one bounded tile of decoded rows at a time."""

from __future__ import annotations

from functools import cache
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.formats.codebook import Format

NAME = "torch"

# Decoded rows alive at once, bytes: a tile this small stays in a core's cache; a GPU wants few, large launches.
_TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}

# codes decoded by one table look-up, per bit width: 2**(bits * codes) entries of ``codes`` centroids each
_CODES_PER_LOOKUP = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}


def supports(fmt: Format, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel refuses, or None: it takes every format, size and device that has float32."""
    return None if dtype == torch.float32 else f"the rotated input must be float32, got {dtype}"


def linear(x: Tensor, packed: Tensor, norms: Tensor, codebook: Tensor, fmt: Format) -> Tensor:
    """x [m, K] (rotated, float32) times the weight packed [n, bytes], norms [n, G] -> float32 [m, n]."""
    n, k = packed.shape[0], x.shape[1]
    # transposed: each tile fills whole rows, for a product into strided columns takes 20 times as long
    out = x.new_empty(n, x.shape[0])
    table = _lookup_table(codebook, fmt.bits)
    rows = max(1, _TILE_BYTES.get(x.device.type, 1 << 22) // (4 * k))
    for start in range(0, n, rows):
        tile = _decode(packed[start : start + rows], norms[start : start + rows], table, fmt)
        torch.mm(tile, x.t(), out=out[start : start + rows])
    return out.t().contiguous()


def grouped_linear(
    x: Tensor, rows: Tensor, experts: Tensor, packed: Tensor, norms: Tensor, codebook: Tensor, fmt: Format
) -> Tensor:
    """out[i] = weight[experts[i]] @ x[rows[i]] for packed [E, n, bytes], norms [E, n, G] -> float32 [len(rows), n].

    Only experts that occur are decoded, each once.
    """
    out = x.new_empty(rows.shape[0], packed.shape[1])
    for expert in experts.unique().tolist():
        mine = (experts == expert).nonzero().squeeze(1)
        out[mine] = linear(x[rows[mine]], packed[expert], norms[expert], codebook, fmt)
    return out


def _decode(packed: Tensor, norms: Tensor, table: Tensor, fmt: Format) -> Tensor:
    """norm * centroid, still rotated: float32 [rows, K]."""
    weight = F.embedding(_lookups(packed, fmt.bits), table).view(*norms.shape, fmt.group_size)
    return weight.mul_(norms.float().unsqueeze(-1)).view(norms.shape[0], -1)


def _lookups(packed: Tensor, bits: int) -> Tensor:
    """The bitstream cut into table indices, int32 [rows, K / codes per look-up]."""
    width = bits * _CODES_PER_LOOKUP[bits]
    period = lcm(width, 8) // 8
    if period == 1:
        return packed.int()
    stream = packed.view(packed.shape[0], -1, period).int()
    parts = []
    for start in range(0, 8 * period, width):
        byte, shift = divmod(start, 8)
        part = stream[..., byte] >> shift
        for more in range(1, -(-(shift + width) // 8)):
            part = part | stream[..., byte + more] << (8 * more - shift)
        parts.append(part & (2**width - 1))
    return torch.stack(parts, dim=-1).view(packed.shape[0], -1)


def _lookup_table(codebook: Tensor, bits: int) -> Tensor:
    """[2**(bits * codes), codes] centroids: entry i spells the codes that i's bits hold, lowest first."""
    codes = _CODES_PER_LOOKUP[bits]
    if codes == 1:
        return codebook[:, None]
    return codebook.index_select(0, _code_grid(bits, codes, codebook.device)).view(-1, codes)


@cache
def _code_grid(bits: int, codes: int, device: torch.device) -> Tensor:
    index = torch.arange(2 ** (bits * codes), device=device)
    return torch.stack([index >> (bits * i) & (2**bits - 1) for i in range(codes)], dim=1).view(-1)
