"""Products on CPUs by the native core: codes are looked up as bytes and multiplied by an int8 input, or decoded to float32."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from ctypes import byref

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels.base import Arranged, Kernel, Use
from kappaquant.kernels.cpu import threads
from kappaquant.kernels.cpu.library import DTYPES, absence, core, signs_of
from kappaquant.kernels.cpu.structures import Weight

_NORMS_AT_ONCE = 16
"""Scales of inputs are padded to a multiple of it."""
_KINDS: tuple[type[GroupedFormat], ...] = (CodebookFormat, TrellisFormat)
"""As core.h counts them."""


class Native(Kernel):
    """Multiplies by weights as they lie on disk, so that they may stay in the pages of a file.

    Args:
        level: name of the instruction set; the fastest of the processor by default.
    """

    uses: frozenset[Use] = frozenset({"linear", "experts", "grouped", "rows"})

    def __init__(self, level: str = "") -> None:
        self.name = f"native {level}".strip()
        self._level = level

    def refusal(self, fmt: Format, parts: Mapping[str, Tensor]) -> str | None:
        if not isinstance(fmt, _KINDS):
            return f"takes codebook and trellis formats, not {fmt.id}"
        if any(part.device.type != "cpu" for part in parts.values()):
            return "runs on CPUs"
        if reason := absence():
            return reason
        strange = [suffix for suffix, part in parts.items() if not part.is_contiguous()]
        return f"{strange[0]} does not lie in one piece" if strange else None

    def input_kind(
        self, fmt: Format, tokens: int, rows: int, activations: str, device: torch.device
    ) -> Hashable | None:
        return "int8" if activations == "int8" else "float32", fmt.step

    def prepare(self, x: Tensor, fmt: Format, kind: Hashable) -> list[Tensor]:
        """Rotated: int8 [tokens, G * group] with scales and offsets [tokens, padded G], or float32 [tokens, G * group]."""
        assert isinstance(fmt, GroupedFormat)
        assert isinstance(kind, tuple)
        x = _readable(x)
        tokens, inputs = x.shape
        groups = fmt.groups(inputs)
        width, padded = groups * fmt.group_size, -(-groups // _NORMS_AT_ONCE) * _NORMS_AT_ONCE
        if kind[0] == "int8":
            made = [
                torch.empty(tokens, width, dtype=torch.int8),
                torch.empty(tokens, padded),
                torch.empty(tokens, padded),
            ]
            places = (None, *(tensor.data_ptr() for tensor in made))
        else:
            made = [torch.empty(tokens, width)]
            places = (made[0].data_ptr(), None, None, None)
        native = core(self._level)
        native.library.kq_prepare(
            native.level, threads.count(), x.data_ptr(), DTYPES[x.dtype], tokens, inputs, groups, fmt.group_size,
            signs_of(fmt.group_size).data_ptr(), *places,
        )  # fmt: skip
        return made

    def linear(
        self, x: Tensor, prepared: Sequence[Tensor], kind: Hashable | None, weight: Arranged, bias: Tensor | None
    ) -> Tensor:
        prepared = prepared or self.prepare(x, weight.fmt, kind)
        held = weight_of(weight)
        y = torch.empty(x.shape[0], weight.shape[-2], dtype=x.dtype if x.dtype in DTYPES else torch.float32)
        added = None if bias is None else bias.detach().float().contiguous()
        native = core(self._level)
        native.library.kq_linear(
            native.level, threads.count(), byref(held), *_places(prepared), x.shape[0],
            None if added is None else added.data_ptr(), y.data_ptr(), DTYPES[y.dtype],
        )  # fmt: skip
        return y.to(x.dtype)

    def grouped_linear(self, x: Tensor, index: Tensor, weight: Arranged) -> Tensor:
        prepared = self.prepare(x, weight.fmt, ("float32", weight.fmt.step))
        held, index = weight_of(weight), index.contiguous()
        y = torch.empty(*index.shape, weight.shape[-2])
        native = core(self._level)
        native.library.kq_grouped(
            native.level, threads.count(), byref(held), *_places(prepared), index.data_ptr(), *index.shape,
            y.data_ptr(),
        )  # fmt: skip
        return y

    def experts_refusal(self, gate_up: Arranged, down: Arranged) -> str | None:
        return None

    def experts(
        self, x: Tensor, index: Tensor, weights: Tensor, gate_up: Arranged, down: Arranged, activations: str
    ) -> Tensor:
        x = x.contiguous()
        kind = self.input_kind(gate_up.fmt, x.shape[0], gate_up.shape[-2], activations, x.device)
        prepared = self.prepare(x, gate_up.fmt, kind)
        first, second = weight_of(gate_up), weight_of(down)
        index, weights = index.contiguous(), weights.float().contiguous()
        y = torch.empty(x.shape, dtype=x.dtype if x.dtype in DTYPES else torch.float32)
        native = core(self._level)
        native.library.kq_experts(
            native.level, threads.count(), byref(first), byref(second), *_places(prepared), index.data_ptr(),
            weights.data_ptr(), *index.shape, signs_of(down.fmt.step).data_ptr(), y.data_ptr(), DTYPES[y.dtype],
        )  # fmt: skip
        return y.to(x.dtype)


def _places(prepared: Sequence[Tensor]) -> tuple[int | None, int | None, int | None, int | None]:
    """Where int8 values, scales, offsets and floats lie."""
    if len(prepared) == 1:
        return None, None, None, prepared[0].data_ptr()
    values, scales, offsets = prepared
    return values.data_ptr(), scales.data_ptr(), offsets.data_ptr(), None


def weight_of(weight: Arranged) -> Weight:
    """The parts of a weight [out, in] or [E, out, in] as the library takes them, checked against what it will read.

    Raises:
        UnsupportedError: parts of other sizes.
    """
    fmt, shape = weight.fmt, weight.shape
    assert isinstance(fmt, GroupedFormat)
    packed, norms = weight.parts[PACKED_SUFFIX], weight.parts[NORMS_SUFFIX]
    for part, expected in ((packed, fmt.packed_shape(shape)), (norms, fmt.norms_shape(shape))):
        if part.shape != expected or not part.is_contiguous():
            raise UnsupportedError(
                f"a weight {list(shape)} in {fmt.id} has a part of shape {list(part.shape)}; expected {list(expected)} in one piece"
            )
    experts = shape[0] if len(shape) == 3 else 1
    return Weight(
        packed.data_ptr(), norms.data_ptr(), codec.centroids(fmt, packed.device).data_ptr(), experts, shape[-2],
        fmt.groups(shape[-1]), fmt.bits, fmt.group_size, norms.dtype == torch.float32,
        next(number for number, kind in enumerate(_KINDS) if isinstance(fmt, kind)),
    )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    return (x if x.dtype in DTYPES else x.float()).contiguous()
