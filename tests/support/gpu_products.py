"""Weights and inputs for tests of GPU kernels, and how far their products are off."""

from __future__ import annotations

import pytest
import torch

from kappaquant.formats import codec
from kappaquant.formats.codebook import FORMATS, GroupedFormat
from kappaquant.formats.kinds import KINDS, kind_and_bits
from kappaquant.formats.trellis import TRELLIS_FORMATS, TrellisFormat
from kappaquant.kernels.cuda import tensor_cores

ALL: list[GroupedFormat] = sorted(
    [*FORMATS.values(), *TRELLIS_FORMATS.values()], key=lambda f: (f.bits, f.id[0], f.group_size)
)
NAMES = [f"{letter}{bits}" for letter, kind in KINDS.items() for bits in kind.bits]
INT8_NAMES = [name for name in NAMES if int(name[1:]) in tensor_cores.INT8_BITS]
gpu = pytest.mark.gpu


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


def error(y: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor) -> float:
    """RMS error over the RMS that products of such vectors have; few outputs may by chance all be near 0."""
    expected = x.double() @ decoded.T
    usual = (x.double().norm(dim=1, keepdim=True) * decoded.norm(dim=1)).norm() / decoded.shape[1] ** 0.5
    return float((y.double() - expected).norm() / usual)
