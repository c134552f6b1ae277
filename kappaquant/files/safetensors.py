"""Safetensors headers, read strictly and written ahead of the data. Standard library only.

The safetensors package maps whole files, and mapped pages count as resident memory; streaming needs the offsets, to read
and write slices. Its rules are kept: no overlap, no hole, nothing behind the last tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappaquant.errors import KappaquantError, SourceError

# safetensors dtype -> bytes per element
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_MAX_HEADER = 100_000_000  # the safetensors package refuses longer ones too


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor: no data.

    Attributes:
        name: key in the checkpoint.
        dtype: safetensors dtype string, one of ``DTYPE_BYTES``.
        shape: logical shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its header entry, and where its bytes begin, counted from the start of the file."""

    info: TensorInfo
    offset: int


def read_header(path: Path, error: type[KappaquantError] = SourceError) -> dict[str, Stored]:
    """Tensors of a local safetensors file in the order of their bytes; ``error`` is raised on any defect."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for whoever writes it
        raise error(f"{path}: is no file; fetch it again")
    try:
        file = path.open("rb")
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise error(f"{path}: {size} bytes, too short for a safetensors file; fetch it again")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, _MAX_HEADER):
            raise error(
                f"{path}: its header claims {length} bytes, the file has {size}; it is truncated or no safetensors file"
            )
        return parse_header(file.read(length), size, str(path), error)


def parse_header(header: bytes, file_size: int, label: str, error: type[KappaquantError]) -> dict[str, Stored]:
    """The checked content of a header that is followed by ``file_size - 8 - len(header)`` bytes of data."""
    try:
        entries = json.loads(header, object_pairs_hook=lambda pairs: _unique(pairs, label, error))
    except (ValueError, RecursionError) as problem:
        raise error(f"{label}: the header is not JSON ({problem}); the file is corrupted, fetch it again") from None
    if not isinstance(entries, dict):
        raise error(f"{label}: the header is a JSON {type(entries).__name__}, not an object")
    entries.pop("__metadata__", None)
    spans = sorted((*_check_entry(name, entry, label, error), name) for name, entry in entries.items())
    position, start = 0, 8 + len(header)
    stored = {}
    for begin, end, name in spans:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise error(f"{label}: {name} at bytes {begin}..{end} {kind} (expected to begin at {position})")
        position = end
        entry = entries[name]
        stored[name] = Stored(TensorInfo(name, entry["dtype"], tuple(entry["shape"])), start + begin)
    if start + position != file_size:
        kind = "truncated" if start + position > file_size else "longer than its tensors"
        raise error(f"{label}: {kind}: the header describes {start + position} bytes, the file has {file_size}")
    return stored


def _unique(pairs: list[tuple[str, Any]], label: str, error: type[KappaquantError]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise error(f"{label}: the header names {twice!r} twice")
    return result


def _check_entry(name: str, entry: Any, label: str, error: type[KappaquantError]) -> tuple[int, int]:
    """(begin, end) of one header entry, if it makes sense on its own."""
    if not name.isprintable():
        raise error(f"{label}: tensor name {name!r} holds control characters or broken Unicode")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise error(f"{label}: {name}: a header entry needs dtype, shape and data_offsets, got {entry!r}")
    if dtype not in DTYPE_BYTES:
        raise error(f"{label}: {name}: unknown dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if not shape_makes_sense(shape):
        raise error(f"{label}: {name}: shape {shape} is not a list of sizes")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if not 0 <= begin <= end or end - begin != nbytes:
        raise error(f"{label}: {name}: offsets {begin}..{end} do not fit {dtype} {shape}, which takes {nbytes} bytes")
    return begin, end


def shape_makes_sense(shape: Iterable[Any]) -> bool:
    """Whether these JSON values are sizes of axes."""
    return all(type(n) is int and n >= 0 for n in shape)


def build_header(tensors: Iterable[TensorInfo], framework: str = "pt") -> tuple[bytes, dict[str, Stored]]:
    """The first bytes of a file that holds these tensors, and where each goes; ``framework`` says whose layouts they have.

    Wide dtypes come first, so that every tensor is aligned to its element (readers that map the file need it).
    """
    ordered = sorted(tensors, key=lambda t: (-DTYPE_BYTES[t.dtype], t.name))
    entries: dict[str, Any] = {"__metadata__": {"format": framework}}
    begin = 0
    for t in ordered:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, begin + t.nbytes]}
        begin += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    stored = {t.name: Stored(t, start + entries[t.name]["data_offsets"][0]) for t in ordered}
    return len(text).to_bytes(8, "little") + text, stored


def file_size(stored: Mapping[str, Stored], header: bytes) -> int:
    return len(header) + sum(s.info.nbytes for s in stored.values())


def read_bytes(path: Path, offset: int, size: int) -> bytearray:
    """Exactly ``size`` bytes at ``offset``; the buffer is writable, so that torch can take it over without a copy."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise SourceError(
                    f"{path}: ends at byte {offset + done}, {size - done} bytes early; it changed while read"
                )
            done += count
    return buffer


def write_bytes(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of ``data`` at ``offset`` of an open file."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write_at(path: Path, stored: Stored, element: int, data: bytes | memoryview) -> None:
    """Elements of a stored tensor, from ``element`` on, into its (already allocated) file; any process may write any part."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        write_bytes(descriptor, data, stored.offset + element * DTYPE_BYTES[stored.info.dtype])
    finally:
        os.close(descriptor)
