"""Read a quantized checkpoint back, kappaquant v1 and the legacy tq3_native alike; nothing is ever guessed or skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.checkpoints.manifest import config_digest
from kappaquant.errors import FormatError
from kappaquant.files.safetensors import Stored, read_header, shape_makes_sense
from kappaquant.formats.codebook import (
    DTYPE_BYTES,
    FORMAT_VERSION,
    LEGACY_CONFIG_NAME,
    MANIFEST_NAME,
    NORMS_SUFFIX,
    PACKED_SUFFIX,
    QUANT_METHOD,
    ROTATION,
    Format,
    TensorInfo,
    format_by_id,
)
from kappaquant.sources.folder import INDEX_NAME, SINGLE_NAME, check_config, read_json, shard_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Located = tuple[Path, Stored]
Shapes = Mapping[str, tuple[int, ...]]
ShapesOf = Callable[[dict[str, Any], list[str]], Mapping[str, tuple[int, ...] | None]]


@dataclass(frozen=True)
class Entry:
    """One parameter: what it is, and where its bytes are.

    Attributes:
        info: name, source dtype and logical shape.
        fmt: packing of the codes, None for a kept tensor.
        bits: bits an index carries, 16 for a kept tensor.
        codebook: the centroids, ascending float32 values; empty for a kept tensor.
        parts: (packed, norms), or the one kept tensor.
        byte_codes: tq3_native stores 1 and 5 to 8 bits as one byte an index.
    """

    info: TensorInfo
    fmt: Format | None
    bits: int
    codebook: tuple[float, ...]
    parts: tuple[Located, ...]
    byte_codes: bool = False


@dataclass
class Checkpoint:
    """An open checkpoint; tensors are read when asked for.

    Attributes:
        path: its folder.
        format: "kappaquant" or "tq3_native".
        config: content of config.json.
        notices: what was found odd but harmless, in words.
    """

    path: Path
    format: str
    config: dict[str, Any]
    entries: dict[str, Entry]
    notices: list[str] = field(default_factory=list)

    def keys(self) -> list[str]:
        """Logical parameter names, sorted."""
        return sorted(self.entries)

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise FormatError(f"{self.path}: has no parameter {name!r}; keys() lists all {len(self.entries)}")
        return self.entries[name]

    def format_of(self, name: str) -> Format | None:
        return self.entry(name).fmt

    def bits(self, name: str) -> int:
        """Bits of an index; 16 for a parameter that is kept as it was."""
        return self.entry(name).bits

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).info.shape

    def dtype(self, name: str) -> str:
        """Safetensors dtype: of the stored tensor if kept, of the source (as far as known) if quantized."""
        return self.entry(name).info.dtype

    def codebook(self, name: str) -> tuple[float, ...]:
        return self.entry(name).codebook

    def nbytes(self, name: str) -> int:
        """Bytes a parameter takes on disk."""
        return sum(stored.info.nbytes for _, stored in self.entry(name).parts)

    def packed(self, name: str) -> Tensor:
        """uint8 [..., out, G * bytes_per_group], dense whatever the file's packing."""
        entry = self._quantized(name)
        assert entry.fmt is not None
        return self._packed_rows(entry, 0, _rows(entry.info)).view(entry.fmt.packed_shape(entry.info.shape))

    def norms(self, name: str) -> Tensor:
        """[..., out, G], in ``norm_dtype``."""
        from kappaquant.files.tensors import read_elements

        entry = self._quantized(name)
        assert entry.fmt is not None
        path, stored = entry.parts[1]
        return read_elements(path, stored, 0, stored.info.numel).view(entry.fmt.norms_shape(entry.info.shape))

    def norm_dtype(self, name: str) -> torch.dtype:
        """Of a quantized parameter's norms, as stored."""
        from kappaquant.files.tensors import TORCH_DTYPES

        return TORCH_DTYPES[self._quantized(name).parts[1][1].info.dtype]

    def tensor(self, name: str) -> Tensor:
        """A kept parameter as it is stored."""
        entry = self.entry(name)
        if entry.fmt is not None:
            raise FormatError(f"{name}: is quantized to {entry.bits} bits; use dequantize(), or packed() and norms()")
        return self.elements(name, 0, entry.info.numel).view(entry.info.shape)

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a kept parameter, flat."""
        from kappaquant.files.tensors import read_elements

        path, stored = self.entry(name).parts[0]
        return read_elements(path, stored, start, stop)

    def dequantize(self, name: str) -> Tensor:
        """The parameter as float32 in its logical shape; a kept one is converted."""
        entry = self.entry(name)
        if entry.fmt is None:
            return self.tensor(name).float()
        return self.dequantize_rows(name, 0, _rows(entry.info)).view(entry.info.shape)

    def dequantize_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a quantized parameter seen as [rows, in]: float32 [stop - start, in]."""
        from kappaquant.files.tensors import read_elements
        from kappaquant.formats import codec

        entry = self._quantized(name)
        assert entry.fmt is not None
        groups = entry.fmt.groups(entry.info.shape[-1])
        path, stored = entry.parts[1]
        norms = read_elements(path, stored, start * groups, stop * groups).view(-1, groups)
        packed = self._packed_rows(entry, start, stop)
        return codec.decode(packed, norms, entry.fmt, entry.info.shape[-1], entry.codebook)

    def _quantized(self, name: str) -> Entry:
        entry = self.entry(name)
        if entry.fmt is None:
            raise FormatError(f"{name}: is kept as {entry.info.dtype}; use tensor()")
        return entry

    def _packed_rows(self, entry: Entry, start: int, stop: int) -> Tensor:
        from kappaquant.files.tensors import read_elements
        from kappaquant.formats import codec

        assert entry.fmt is not None
        path, stored = entry.parts[0]
        width = stored.info.nbytes // max(1, _rows(entry.info))
        raw = read_elements(path, stored, start * width, stop * width).view(stop - start, width)
        return codec.pack(raw, entry.fmt) if entry.byte_codes else raw

    def verify(self) -> Iterator[str]:
        """Compare every stored byte with the manifest (v1), every norm with what a norm can be; yields each problem.

        Names, shapes and completeness were checked when the checkpoint was opened.
        """
        from kappaquant.quantizing.slices import hash_stored

        hashes = read_json(self.path / MANIFEST_NAME, FormatError)["sha256"] if self.format == QUANT_METHOD else {}
        for name in self.keys():
            entry = self.entries[name]
            for path, stored in entry.parts:
                expected = hashes.get(stored.info.name)
                if expected is not None and hash_stored(path, stored) != expected:
                    yield f"{stored.info.name}: its bytes in {path.name} do not have the SHA-256 of the manifest; fetch {path.name} again"
            if entry.fmt is not None and not bool(self.norms(name).isfinite().all()):
                yield f"{name}{NORMS_SUFFIX}: holds a norm that is NaN or infinite"


def open_checkpoint(
    path: str | Path, *, source: str | Path | None = None, shapes: Shapes | ShapesOf | None = None
) -> Checkpoint:
    """Open a quantized checkpoint folder of either format, reading headers only.

    Args:
        source: for tq3_native, whose files hold no shapes: the original model (folder or Hub id) to take them from.
            By default they follow from the architecture in config.json, and only this needs torch.
        shapes: the same, given directly; or a function that takes config.json's content (empty if there is none) and the
            names of quantized parameters, and returns their shapes. None for a shape leaves that parameter out.

    Raises:
        FormatError: malformed, incomplete, of an unknown version, or not quantized at all.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    if (folder / LEGACY_CONFIG_NAME).exists():
        from kappaquant.checkpoints.tq3_native import open_legacy

        return open_legacy(folder, source, shapes)
    config = read_json(folder / "config.json", FormatError)
    found = config.get("quantization_config")
    quantization = found if isinstance(found, dict) else {}
    method = quantization.get("quant_method")
    if method != QUANT_METHOD:
        state = f"quantized by {method}" if method else "not quantized"
        raise FormatError(
            f"{folder}: {state}; expected quant_method {QUANT_METHOD!r} in config.json, or {LEGACY_CONFIG_NAME}"
        )
    return _open_v1(folder, config, quantization)


def _open_v1(folder: Path, config: dict[str, Any], quantization: dict[str, Any]) -> Checkpoint:
    check_quantization_config(quantization, str(folder))
    manifest = read_json(folder / MANIFEST_NAME, FormatError)
    if manifest.get("quantization_config_sha256") != config_digest(quantization):
        raise FormatError(f"{folder}/config.json: its quantization_config is not the one {MANIFEST_NAME} vouches for")
    check_config(config, str(folder), FormatError)
    described, hashes = manifest.get("tensors"), manifest.get("sha256")
    if not isinstance(described, dict) or not isinstance(hashes, dict):
        raise FormatError(f"{folder}/{MANIFEST_NAME}: lacks its 'tensors' or 'sha256' table")
    located = locate_tensors(folder, indexed_shards(folder))
    entries = {}
    for name, storage in quantization["tensors"].items():
        match described.get(name):
            case {"shape": [*shape], "dtype": str(dtype)} if dtype in DTYPE_BYTES and shape_makes_sense(shape):
                entries[name] = _entry(name, storage, tuple(shape), dtype, quantization, located)
            case entry:
                raise FormatError(f"{name}: {MANIFEST_NAME} needs its shape and dtype, and has {entry!r}")
    if located:
        extra = next(iter(located))
        raise FormatError(
            f"{extra}: in {located[extra][0].name} but not in config.json's map of {len(entries)} parameters"
        )
    for entry in entries.values():
        for _, stored in entry.parts:
            if stored.info.name not in hashes:
                raise FormatError(f"{stored.info.name}: {MANIFEST_NAME} has no SHA-256 for it")
    return Checkpoint(folder, QUANT_METHOD, config, entries)


def _entry(
    name: str,
    storage: str,
    shape: tuple[int, ...],
    dtype: str,
    quantization: dict[str, Any],
    located: dict[str, Located],
) -> Entry:
    """The entry of one parameter of the map; takes its tensors out of ``located``."""
    if storage in DTYPE_BYTES:
        part = _take(located, name, storage, shape)
        return Entry(TensorInfo(name, storage, shape), None, 16, (), (part,))
    fmt = format_by_id(storage, name)
    if len(shape) < 2:
        raise FormatError(f"{name}: shape {list(shape)}; only matrices are stored as {storage}")
    parts = (
        _take(located, name + PACKED_SUFFIX, "U8", fmt.packed_shape(shape)),
        _take(located, name + NORMS_SUFFIX, quantization.get("norms", "F16"), fmt.norms_shape(shape)),
    )
    return Entry(TensorInfo(name, dtype, shape), fmt, fmt.bits, tuple(quantization["codebooks"][storage]), parts)


def _take(located: dict[str, Located], name: str, dtype: str, shape: tuple[int, ...]) -> Located:
    if name not in located:
        raise FormatError(f"{name}: missing from the shards; fetch the checkpoint again")
    part = located.pop(name)
    info = part[1].info
    if (info.dtype, info.shape) != (dtype, shape):
        raise FormatError(
            f"{name}: {part[0].name} holds {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
        )
    return part


def check_quantization_config(quantization: Mapping[str, Any], label: str) -> None:
    """Raise FormatError unless this is a complete quantization_config of a version, rotation and codebooks known here."""
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{label}: format_version {version!r}; this kappaquant reads {FORMAT_VERSION}, a newer one may help"
        )
    if quantization.get("rotation") != ROTATION:
        raise FormatError(f"{label}: rotation {quantization.get('rotation')!r}; this kappaquant reads {ROTATION!r}")
    if quantization.get("norms", "F16") not in ("F16", "F32"):
        raise FormatError(f"{label}: norms {quantization['norms']!r}; this kappaquant reads 'F16' and 'F32'")
    tensors, codebooks = quantization.get("tensors"), quantization.get("codebooks")
    if not isinstance(tensors, dict) or not isinstance(codebooks, dict):
        raise FormatError(f"{label}: quantization_config lacks its 'tensors' or 'codebooks' table")
    for name, storage in tensors.items():
        if not isinstance(storage, str):
            raise FormatError(f"{name}: stored as {storage!r}; expected a format id or a dtype")
        if storage in DTYPE_BYTES:
            continue
        fmt = format_by_id(storage, name)
        book = codebooks.get(storage)
        if not isinstance(book, list) or len(book) != 2**fmt.bits or not _ascending(book):
            raise FormatError(
                f"{name}: quantization_config has no codebook of {2**fmt.bits} ascending values for {storage}"
            )


def _ascending(book: list[Any]) -> bool:
    numbers = all(type(c) in (int, float) and math.isfinite(c) for c in book)
    return numbers and all(low < high for low, high in pairwise(book))


def indexed_shards(folder: Path) -> list[str]:
    """Shards of a v1 folder: those of the index, else the single file."""
    files = [p.name for p in folder.iterdir()]
    index = read_json(folder / INDEX_NAME, FormatError) if INDEX_NAME in files else None
    if index is None and SINGLE_NAME not in files:
        raise FormatError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME}; the checkpoint is incomplete")
    return shard_names(str(folder), files, index, FormatError)


def locate_tensors(folder: Path, shards: list[str]) -> dict[str, Located]:
    """Every tensor of the shards; a name in two of them is an error."""
    located: dict[str, Located] = {}
    for shard in shards:
        for name, stored in read_header(folder / shard, FormatError).items():
            if name in located:
                raise FormatError(f"{name}: in both {located[name][0].name} and {shard}")
            located[name] = (folder / shard, stored)
    return located


def _rows(info: TensorInfo) -> int:
    return math.prod(info.shape[:-1])
