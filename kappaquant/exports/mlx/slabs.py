"""The pieces of work of an export: a slab of one tensor, read, folded, quantized or cast, and written in place by any process.

Weights that read the residual stream are cut by rows, those that write it by columns, since the rotation runs along the other
axis. How a tensor is cut depends on its shape alone, so that what is learnt of it does not depend on jobs or interruptions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kappaquant.errors import NonFiniteError
from kappaquant.exports.mlx.layout import Tensor
from kappaquant.exports.mlx.rotation import rotate, rotate_columns
from kappaquant.files.safetensors import DTYPE_BYTES, Stored, write_bytes
from kappaquant.files.tensors import TORCH_DTYPES, tensor_bytes
from kappaquant.formats.affine import Effort, quantize
from kappaquant.formats.entry import KEPT_BITS, Entry

SLAB_ELEMENTS = 1 << 21  # 8 MB as float32, of which a process holds several copies
_SLAB = 128  # columns are cut at multiples of every group


@dataclass(frozen=True)
class Slab:
    """Matrices [first, last) of a tensor, and of each the rows and columns [start, stop)."""

    first: int
    last: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def numel(self) -> int:
        return (self.last - self.first) * (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class SlabWork:
    """One slab of the tensor that is ``made``, its number among them, and where it comes from and goes to.

    Attributes:
        entries: source parameter -> where its bytes are, for every parameter of the slab and its gain.
        one_plus: the norm multiplies by 1 + its weight.
        target_path, stored: the output shard, and the places of its tensors by key.
    """

    made: Tensor
    number: int
    slab: Slab
    entries: dict[str, Entry]
    one_plus: bool
    target_path: Path
    stored: dict[str, Stored]
    effort: Effort

    @property
    def tensor(self) -> str:
        return self.made.key

    @property
    def start(self) -> int:
        return self.number

    @property
    def nbytes(self) -> int:
        """Counted in weights, for those are what takes time."""
        return self.slab.numel


@dataclass(frozen=True)
class Sums:
    """Squared error against the folded weights, and their energy."""

    squared_error: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.squared_error + other.squared_error, self.energy + other.energy)

    def to_json(self) -> list[float]:
        return [self.squared_error, self.energy]

    @classmethod
    def from_json(cls, value: list[float]) -> Sums:
        return cls(*value)


def slabs(tensor: Tensor) -> Iterator[Slab]:
    """Cuts of a tensor, of about SLAB_ELEMENTS each."""
    rows, width, count = tensor.rows, tensor.width, len(tensor.pieces)
    size = rows * width
    if size <= SLAB_ELEMENTS:
        step = max(1, SLAB_ELEMENTS // max(size, 1))
        for first in range(0, count, step):
            yield Slab(first, min(first + step, count), (0, rows), (0, width))
        return
    for index in range(count):
        if tensor.action == "out":
            step = max(1, SLAB_ELEMENTS // rows // _SLAB) * _SLAB
            for start in range(0, width, step):
                yield Slab(index, index + 1, (0, rows), (start, min(start + step, width)))
        else:
            step = max(1, SLAB_ELEMENTS // width)
            for start in range(0, rows, step):
                yield Slab(index, index + 1, (start, min(start + step, rows)), (0, width))


def make_slab(unit: SlabWork) -> Sums:
    """Make one slab and write it into the (already allocated) output shard.

    Raises:
        NonFiniteError: NaN, infinity, or values that the output's dtype cannot hold; names the tensor.
    """
    tensor, slab = unit.made, unit.slab
    weight = folded(tensor, slab, unit.entries, unit.one_plus)
    if not bool(weight.isfinite().all()):
        raise NonFiniteError(f"{tensor.pieces[slab.first].name}: holds NaN or infinity; repair the source")
    descriptor = os.open(unit.target_path, os.O_WRONLY)
    try:
        if tensor.bits == KEPT_BITS:
            cast = weight.to(TORCH_DTYPES[tensor.dtype])
            if not bool(cast.isfinite().all()):
                raise NonFiniteError(
                    f"{tensor.pieces[slab.first].name}: holds {float(weight.abs().max()):.6g}, more than {tensor.dtype} can; "
                    "give --dtype BF16"
                )
            _write(descriptor, unit.stored[tensor.key], tensor, slab, cast)
            difference = cast.double() - weight.double()
            return Sums(float(difference.square().sum()), float(weight.double().square().sum()))
        dtype = TORCH_DTYPES[tensor.dtype]
        made = quantize(weight, tensor.bits, tensor.group_size, dtype, unit.effort, tensor.pieces[slab.first].name)
        _write(descriptor, unit.stored[tensor.key], tensor, slab, made.packed)
        _write(descriptor, unit.stored[f"{tensor.path}.scales"], tensor, slab, made.scales)
        _write(descriptor, unit.stored[f"{tensor.path}.biases"], tensor, slab, made.biases)
        return Sums(made.squared_error, made.energy)
    finally:
        os.close(descriptor)


def folded(tensor: Tensor, slab: Slab, entries: dict[str, Entry], one_plus: bool) -> torch.Tensor:
    """float32 [matrices, rows, columns] of a slab, with gain and rotation."""
    count, (top, bottom), (left, right) = slab.last - slab.first, slab.rows, slab.columns
    weight = torch.empty(count, bottom - top, right - left)
    if tensor.action == "one":
        return weight.fill_(1.0)
    for index, piece in enumerate(tensor.pieces[slab.first : slab.last]):
        step = max(
            1, SLAB_ELEMENTS // tensor.width
        )  # a slab of columns passes over whole rows, but never holds them all
        for start in range(top, bottom, step):
            stop = min(start + step, bottom)
            whole = entries[piece.name].read_rows(piece.row + start, piece.row + stop)
            weight[index, start - top : stop - top] = whole[:, left:right]
    if tensor.action == "plus_one":
        return weight.add_(1.0)
    if tensor.gain is not None:
        gain = entries[tensor.gain].read().to(torch.float32)
        weight *= gain + 1.0 if one_plus else gain
    if tensor.action == "in":
        return rotate(weight)
    if tensor.action == "out":
        for index in range(count):
            weight[index] = rotate_columns(weight[index])
    return weight


def _write(descriptor: int, stored: Stored, tensor: Tensor, slab: Slab, values: torch.Tensor) -> None:
    """Put [matrices, rows, n] where a slab's part of a stored tensor is."""
    size = DTYPE_BYTES[stored.info.dtype]
    row_bytes = stored.info.numel * size // (len(tensor.pieces) * tensor.rows)
    begin = stored.offset + (slab.first * tensor.rows + slab.rows[0]) * row_bytes
    if slab.columns == (0, tensor.width):
        write_bytes(descriptor, tensor_bytes(values), begin)
        return
    begin += row_bytes * slab.columns[0] // tensor.width
    data = tensor_bytes(values)
    per_row = len(data) // values.shape[1]
    for row in range(values.shape[1]):
        write_bytes(descriptor, data[row * per_row : (row + 1) * per_row], begin + row * row_bytes)
