"""What an encoding of a source's tensors is: which stored tensors it takes for one, what that one is, and how it is decoded.

A tensor that is stored as codes and scales is presented as the bfloat16 tensor it stands for: codes times scales in float32, rounded
once. So the source of quantized weights is the same to all that reads it as the bf16 checkpoint that other tools would make of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kappaquant.errors import NonFiniteError, SourceError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import Entry, Located
from kappaquant.sources.encodings.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

PRESENTED = "BF16"
"""The dtype that decoded tensors are presented in, and kept in."""
EXPONENTS = ("U8", "F8_E8M0")
"""Dtypes of scales that are bare exponents: byte e says 2 ** (e - 127), 255 is no number."""
SCALES = ("F32", "F16", "BF16", "F8_E4M3", *EXPONENTS)


class Encoding(ABC):
    """How one tensor is stored. Subclasses are small frozen dataclasses, which travel to other processes."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What reports call it, such as "fp8, blocks of 128x128"."""

    @classmethod
    @abstractmethod
    def find(cls, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> Iterator[Encoded]:
        """The tensors among those stored (and not taken by another encoding) that are encoded so.

        Raises:
            SourceError: codes without a scale, or a scale of a shape or dtype that does not fit; names the tensor.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, Located], shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Elements [start, stop), at least one, of the tensor of that shape: float32, flat.

        Args:
            parts: where the parts are that ``find`` named.

        Raises:
            NonFiniteError: a scale is NaN or infinite; names it.
        """


@dataclass(frozen=True)
class Encoded:
    """One tensor that is stored as several.

    Attributes:
        info: name, dtype and shape that it is presented with.
        parts: what the encoding calls a part -> the stored tensor; the codes come first.
    """

    info: TensorInfo
    encoding: Encoding
    parts: dict[str, str]

    @property
    def codes(self) -> str:
        """The stored tensor that the others belong to."""
        return next(iter(self.parts.values()))


@dataclass(frozen=True)
class EncodedEntry(Entry):
    """A parameter that is decoded when elements of it are asked for; no ``Format`` of this package packs it."""

    encoding: Encoding

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat, in the dtype that the parameter is presented in."""
        import torch

        from kappaquant.files.tensors import TORCH_DTYPES

        dtype = TORCH_DTYPES[self.info.dtype]
        if start == stop:
            return torch.empty(0, dtype=dtype)
        return self.encoding.decode(self.parts, self.info.shape, start, stop).to(dtype)


def read_scales(located: Located, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a stored scale as float32. Raises NonFiniteError."""
    import torch

    from kappaquant.files.tensors import read_elements

    path, stored = located
    values = read_elements(path, stored, start, stop)
    if stored.info.dtype in EXPONENTS:
        exponents = values.view(torch.uint8).int()
        scales = torch.ldexp(torch.ones(len(exponents)), exponents - 127).masked_fill(exponents == 255, torch.nan)
    else:
        scales = values.float()
    check_scales(scales, stored.info.name, path.name)
    return scales


def check_scales(scales: Tensor, name: str, file_name: str) -> None:
    """Raise NonFiniteError for scales that are no numbers."""
    if not bool(scales.isfinite().all()):
        raise NonFiniteError(f"{name}: a scale in {file_name} is NaN or infinite; fetch that file again")


def scale_of(tensors: Mapping[str, TensorInfo], codes: TensorInfo, names: tuple[str, ...]) -> TensorInfo:
    """The one scale of these names that belongs to some codes, of a dtype that scales have. Raises SourceError."""
    found = [tensors[name] for name in names if name in tensors]
    if len(found) != 1:
        state = f"has both {names[0]} and {names[1]}" if found else f"has no scale ({' or '.join(names)})"
        raise SourceError(f"{codes.name}: is stored as {codes.dtype} and {state}; fetch the model again")
    if found[0].dtype not in SCALES:
        raise SourceError(f"{found[0].name}: a scale of dtype {found[0].dtype}; it must be one of {', '.join(SCALES)}")
    return found[0]


def misfit(scale: TensorInfo, codes: TensorInfo, fitting: str) -> SourceError:
    """The error for a scale that does not belong to the codes; ``fitting`` says which shapes would."""
    return SourceError(
        f"{scale.name}: has shape {list(scale.shape)}, which does not fit {codes.name} of {list(codes.shape)}: {fitting}"
    )
