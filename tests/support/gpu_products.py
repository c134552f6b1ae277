"""Weights and inputs for tests of GPU kernels, and how far their products are off."""

from __future__ import annotations

import struct

import pytest
import torch

from kappaquant.formats import codec
from kappaquant.formats.codebook import FORMATS, GroupedFormat
from kappaquant.formats.kinds import KINDS, kind_and_bits
from kappaquant.formats.trellis import TRELLIS_FORMATS, TrellisFormat
from kappaquant.kernels.cuda import gemm, int8_gemm, tables, tensor_cores
from kappaquant.kernels.cuda.cells import cells

ALL: list[GroupedFormat] = sorted(
    [*FORMATS.values(), *TRELLIS_FORMATS.values()], key=lambda f: (f.bits, f.id[0], f.group_size)
)
NAMES = [f"{letter}{bits}" for letter, kind in KINDS.items() for bits in kind.bits]
INT8_NAMES = [name for name in NAMES if int(name[1:]) in tensor_cores.INT8_BITS]
gpu = pytest.mark.gpu


def hopper(test):  # type: ignore[no-untyped-def]
    """A test for GPUs with Hopper's products."""
    reason = gemm.refusal(torch.device("cuda")) if torch.cuda.is_available() else None
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


def fits(use: gemm.Launch | int8_gemm.Launch) -> bool:
    """Whether a launch fits a Hopper card with every format it serves."""
    served = (fmt for fmt in ALL if use.half or fmt.bits in tensor_cores.INT8_BITS)
    needed = (use.shared_bytes(fmt.group_size) + tables.shared_bytes(cells(fmt), use.half) for fmt in served)
    return max(needed) <= 227 << 10


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def named(name: str, group: int = 128) -> GroupedFormat:
    """The format of a name such as "t3"."""
    letter, bits = kind_and_bits(name, "") or ("", 0)
    return KINDS[letter].make(bits, group)


def codes(fmt: GroupedFormat, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, norms) of a weight about as large as a Gaussian one.

    Any bytes are codes of a trellis, and its search in torch takes long.
    """
    if not isinstance(fmt, TrellisFormat):
        encoded = codec.encode(random(*shape, seed=seed), fmt, "fast")
        return encoded.packed, encoded.norms
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, fmt.packed_shape(shape), dtype=torch.uint8, generator=generator)
    size = (fmt.group_size**0.5) * (0.5 + torch.rand(fmt.norms_shape(shape), generator=generator))
    return packed, size.half()


def prepared(
    fmt: GroupedFormat, *shape: int, seed: int = 0, scale: float = 1.0
) -> tuple[tensor_cores.Weight, torch.Tensor]:
    """(weight on the GPU, decoded in float64), a standard Gaussian times ``scale``, or as large."""
    packed, norms = (part.cuda() for part in codes(fmt, *shape, seed=seed))
    norms *= scale
    decoded = codec.decode(packed, norms, fmt, shape[-1]).double()
    return tensor_cores.Weight.of(packed, norms, fmt, shape[-1]), decoded


def int8_values(fmt: GroupedFormat) -> torch.Tensor:
    """What int8 tables hold in place of a codebook, in its order."""
    kind = cells(fmt)
    words, scale = tables.int8_table(kind)
    raw = list(struct.pack(f"<{len(words)}I", *words))[: len(kind.entries)]
    made = torch.tensor([byte - 256 if byte > 127 else byte for byte in both_eights(raw)], dtype=torch.float64)
    # ~entry is -1 - entry
    return (torch.cat([made + 0.5, -1 - made + 0.5] if kind.has_signs else [made]) * scale).sort().values


def both_eights(raw: list[int]) -> list[int]:
    """The entries of a table that has 16 of them as the second eight and what turns these into the first."""
    if len(raw) != 16:
        return raw
    assert not any(value & 0x8080 if value > 255 else value & 0x80 for value in raw[8:]), "a selector would not give 0"
    return [second ^ more for second, more in zip(raw[:8], raw[8:], strict=True)] + raw[:8]


def error(y: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor) -> float:
    """RMS error over the RMS that products of such vectors have; few outputs may by chance all be near 0."""
    expected = x.double() @ decoded.T
    usual = (x.double().norm(dim=1, keepdim=True) * decoded.norm(dim=1)).norm() / decoded.shape[1] ** 0.5
    return float((y.double() - expected).norm() / usual)
