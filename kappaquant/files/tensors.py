"""Stored tensors as torch tensors. What opens checkpoints and reads headers imports this only once elements are wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kappaquant.files.safetensors import Stored, read_bytes
from kappaquant.formats.codebook import DTYPE_BYTES

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


def read_elements(path: Path, stored: Stored, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a stored tensor as a flat torch tensor."""
    dtype = TORCH_DTYPES[stored.info.dtype]
    if start == stop:
        return torch.empty(0, dtype=dtype)
    size = DTYPE_BYTES[stored.info.dtype]
    data = read_bytes(path, stored.offset + start * size, (stop - start) * size)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype)
