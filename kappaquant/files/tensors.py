"""Bytes in files as torch tensors and back: read, cut into slices, hashed.

What opens checkpoints and reads headers imports this only once elements are wanted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kappaquant.files.safetensors import DTYPE_BYTES, Stored, read_bytes

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


FLOATS = ("BF16", "F16", "F32", "F64")
SLICE_ELEMENTS = (
    1 << 23
)  # 16 MB of bf16: little memory, and still milliseconds of work for each message between processes


def read_elements(path: Path, stored: Stored, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a stored tensor as a flat torch tensor."""
    dtype = TORCH_DTYPES[stored.info.dtype]
    if start == stop:
        return torch.empty(0, dtype=dtype)
    size = DTYPE_BYTES[stored.info.dtype]
    data = read_bytes(path, stored.offset + start * size, (stop - start) * size)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype)


def ranges(shape: tuple[int, ...], axes: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts of a tensor, in elements, at whole rows of the last axis, or of so many last axes. An empty tensor has none."""
    row = math.prod(shape[-axes:])
    total = math.prod(shape)
    step = max(1, SLICE_ELEMENTS // max(row, 1)) * row
    return ((start, min(start + step, total)) for start in range(0, total, step or 1))


def tensor_bytes(values: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order."""
    return values.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def hash_stored(path: Path, stored: Stored) -> str:
    """SHA-256 (hexadecimal) of a stored tensor's bytes, read back from the file."""
    digest = hashlib.sha256()
    end = stored.offset + stored.info.nbytes
    for offset in range(stored.offset, end, SLICE_ELEMENTS):
        digest.update(read_bytes(path, offset, min(SLICE_ELEMENTS, end - offset)))
    return digest.hexdigest()
