"""A checkpoint's parameters as MLX and NumPy arrays: the bytes that ``kappaquant.checkpoints.checkpoint`` locates, without torch."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from kappaquant.errors import UnsupportedError
from kappaquant.files.safetensors import read_bytes
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, GroupedFormat
from kappaquant.formats.entry import Entry, Located

MLX_DTYPES = {
    "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "F64": mx.float32, "BOOL": mx.bool_,
    "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "U32": mx.uint32, "I32": mx.int32,
    "U64": mx.uint64, "I64": mx.int64,
}  # fmt: skip


def read_kept(entry: Entry) -> mx.array:
    """A kept tensor as it is stored; float64, which no GPU of Apple's has, as float32.

    Raises:
        UnsupportedError: MLX has no dtype like the tensor's.
    """
    raw = _raw(entry.parts[""])
    if entry.info.dtype == "F64":
        return mx.array(raw.view(np.float64).astype(np.float32)).reshape(entry.info.shape)
    if entry.info.dtype not in MLX_DTYPES:
        raise UnsupportedError(f"{entry.info.name}: dtype {entry.info.dtype}; MLX has none like it")
    return mx.array(raw).view(MLX_DTYPES[entry.info.dtype]).reshape(entry.info.shape)


def read_codes(entry: Entry, fmt: GroupedFormat) -> tuple[np.ndarray, np.ndarray]:
    """Packed uint8 [..., out, G * bytes_per_group], dense whatever the file's packing, and norms [..., out, G] as stored."""
    packed, norms = _raw(entry.parts[PACKED_SUFFIX]), _raw(entry.parts[NORMS_SUFFIX])
    shape = entry.info.shape
    if packed.size != math.prod(fmt.packed_shape(shape)):  # tq3_native stores wide codes one a byte
        packed = pack(packed.reshape(-1, fmt.group_size), fmt.bits)
    norms = norms.view(np.float32 if fmt.norms == "F32" else np.float16)
    return packed.reshape(fmt.packed_shape(shape)), norms.reshape(fmt.norms_shape(shape))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [n, group_size] -> bytes [n, group_size * bits / 8], code i in bits [i*bits, (i+1)*bits)."""
    out = np.empty((len(codes), codes.shape[1] * bits // 8), np.uint8)
    step = 1 << 14
    for start in range(0, len(codes), step):
        some = np.unpackbits(codes[start : start + step, :, None], axis=-1, count=bits, bitorder="little")
        out[start : start + step] = np.packbits(some.reshape(len(some), -1), axis=-1, bitorder="little")
    return out


def _raw(located: Located) -> np.ndarray:
    path, stored = located
    return np.frombuffer(read_bytes(path, stored.offset, stored.info.nbytes), np.uint8)
