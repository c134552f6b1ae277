"""Products in plain torch, on any device: exact in float32, one bounded tile of decoded rows at a time.

``AnyFormat`` takes every format there is, by its own ``decode_rotated``; ``Lookups`` decodes several codes of a codebook format at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat
from kappaquant.kernels.base import Arranged, Kernel, Use

# Decoded rows alive at once, bytes: a tile this small stays in a core's cache; a GPU wants few, large launches.
_TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}

# codes decoded by one table look-up, per bit width: 2**(bits * codes) entries of ``codes`` centroids each
_CODES_PER_LOOKUP = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}


class AnyFormat(Kernel):
    """Decodes rows by the format itself: slow, and always there."""

    name = "any format"
    uses: frozenset[Use] = frozenset({"linear", "grouped", "rows"})
    waits_for_host: frozenset[Use] = frozenset({"grouped"})

    def refusal(self, fmt: Format, parts: Mapping[str, Tensor]) -> str | None:
        return None

    def input_kind(
        self, fmt: Format, tokens: int, rows: int, activations: str, device: torch.device
    ) -> Hashable | None:
        return ("rotated", fmt.rotation) if fmt.rotation else None

    def prepare(self, x: Tensor, fmt: Format, kind: Hashable) -> list[Tensor]:
        return [fmt.rotate(x)]

    def linear(
        self, x: Tensor, prepared: Sequence[Tensor], kind: Hashable | None, weight: Arranged, bias: Tensor | None
    ) -> Tensor:
        y = self._product(_rotated(x, prepared), weight).to(x.dtype)
        return y if bias is None else y + bias

    def grouped_linear(self, x: Tensor, index: Tensor, weight: Arranged) -> Tensor:
        """Only experts that occur are decoded, each once."""
        source = weight.fmt.rotate(x) if weight.fmt.rotation else x.float()
        out = source.new_zeros(*index.shape, weight.shape[-2])
        for expert in index.unique().tolist():
            if 0 <= expert < weight.shape[0]:
                mine = (index == expert).nonzero(as_tuple=True)
                one = Arranged(weight.fmt, weight.shape[1:], tuple(part[expert] for part in weight.tensors))
                out[mine] = self._product(source[mine[0]], one)
        return out

    def _product(self, x: Tensor, weight: Arranged) -> Tensor:
        """Rotated x [m, K] in float32 times a weight [n, in] -> float32 [m, n]."""
        n, k = weight.shape[-2], x.shape[1]
        # transposed: each tile fills whole rows, for a product into strided columns takes 20 times as long
        out = x.new_empty(n, x.shape[0])
        rows = max(1, _TILE_BYTES.get(x.device.type, 1 << 22) // (4 * k))
        for start in range(0, n, rows):
            parts = {suffix: part[start : start + rows] for suffix, part in weight.parts.items()}
            torch.mm(self._decode(parts, weight), x.t(), out=out[start : start + rows])
        return out.t().contiguous()

    def _decode(self, parts: Mapping[str, Tensor], weight: Arranged) -> Tensor:
        """Still rotated: float32 [rows, K]."""
        return weight.fmt.decode_rotated(parts, weight.shape[-1])


class Lookups(AnyFormat):
    """Codebook formats, by tables of several codes each."""

    name = "torch"

    def refusal(self, fmt: Format, parts: Mapping[str, Tensor]) -> str | None:
        return None if isinstance(fmt, CodebookFormat) else f"takes codebook formats, not {fmt.id}"

    def _decode(self, parts: Mapping[str, Tensor], weight: Arranged) -> Tensor:
        fmt, norms = weight.fmt, parts[NORMS_SUFFIX]
        assert isinstance(fmt, CodebookFormat)
        table = _lookup_table(fmt, norms.device)
        values = F.embedding(_lookups(parts[PACKED_SUFFIX], fmt.bits), table).view(*norms.shape, fmt.group_size)
        return values.mul_(norms.float().unsqueeze(-1)).view(norms.shape[0], -1)


def _rotated(x: Tensor, prepared: Sequence[Tensor]) -> Tensor:
    return prepared[0] if prepared else x.float()


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


@cache
def _lookup_table(fmt: CodebookFormat, device: torch.device) -> Tensor:
    """[2**(bits * codes), codes] centroids: entry i spells the codes that i's bits hold, lowest first."""
    codes = _CODES_PER_LOOKUP[fmt.bits]
    book = codec.centroids(fmt, device)
    if codes == 1:
        return book[:, None]
    index = torch.arange(2 ** (fmt.bits * codes), device=device)
    grid = torch.stack([index >> (fmt.bits * i) & (2**fmt.bits - 1) for i in range(codes)], dim=1)
    return book.index_select(0, grid.view(-1)).view(-1, codes)
