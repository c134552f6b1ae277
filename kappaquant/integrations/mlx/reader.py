"""A quantized checkpoint of either format, read without torch: where each parameter's bytes are, and the bytes.

``kappaquant.checkpoint`` is the reader of record, but torch is what its tensors are made of. This one opens the same
folders under the same rules, on the same headers and registry; tests hold the two against each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kappaquant.errors import FormatError
from kappaquant.format import (
    DTYPE_BYTES,
    FORMAT_VERSION,
    GROUP_SIZES,
    LEGACY_CONFIG_NAME,
    LEGACY_FORMAT,
    LEGACY_SEED,
    MANIFEST_NAME,
    NORMS_SUFFIX,
    PACKED_SUFFIX,
    QUANT_METHOD,
    ROTATION,
    Format,
    TensorInfo,
    format_by_id,
    legacy_codebook,
)
from kappaquant.safetensors_io import Stored, read_bytes, read_header, shape_makes_sense

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

Located = tuple[Path, Stored]
ShapesOf = Callable[[list[str]], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Entry:
    """One parameter: what it is, and where its bytes are.

    Attributes:
        info: name, source dtype and logical shape.
        fmt: packing of the codes, None for a kept tensor.
        codebook: the centroids, ascending float32 values; empty for a kept tensor.
        parts: (packed, norms), or the one kept tensor.
        byte_codes: tq3_native stores 1 and 5 to 8 bits as one byte an index.
    """

    info: TensorInfo
    fmt: Format | None
    codebook: tuple[float, ...]
    parts: tuple[Located, ...]
    byte_codes: bool = False


@dataclass
class Checkpoint:
    """An open checkpoint, headers only.

    Attributes:
        path: its folder.
        format: "kappaquant" or "tq3_native".
        config: content of config.json; empty if a tq3_native folder has none.
        located: every tensor of the shards.
        notices: what was found odd but harmless, in words.
    """

    path: Path
    format: str
    config: dict[str, Any]
    located: dict[str, Located]
    notices: list[str] = field(default_factory=list)
    marker: dict[str, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Logical parameter names, sorted."""
        return sorted({name.removesuffix(PACKED_SUFFIX).removesuffix(NORMS_SUFFIX) for name in self.located})

    def entries(self, shapes_of: ShapesOf) -> dict[str, Entry]:
        """Every parameter's entry.

        Args:
            shapes_of: from names to the shapes the architecture gives them. tq3_native stores none; a name it leaves
                out is left out of the result.

        Raises:
            FormatError: a tensor is missing, extra, misshapen, or of a packing that does not exist.
        """
        return _v1_entries(self) if self.format == QUANT_METHOD else _legacy_entries(self, shapes_of)


def open_folder(path: str | Path) -> Checkpoint:
    """Open a folder of either format, reading headers only.

    Raises:
        FormatError: malformed, of an unknown version, or not quantized at all.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    legacy = (folder / LEGACY_CONFIG_NAME).exists()
    config = {} if legacy and not (folder / "config.json").exists() else read_json(folder / "config.json")
    for key, kind in (("text_config", dict), ("model_type", str)):
        if not isinstance(config.get(key), kind | None):
            raise FormatError(f"{folder}/config.json: {key!r} is {config[key]!r}; it must be a JSON {kind.__name__}")
    notices: list[str] = []
    if legacy:
        marker = read_json(folder / LEGACY_CONFIG_NAME)
        _check_marker(marker, folder)
        located = _locate(folder, _legacy_shards(folder, notices))
        return Checkpoint(folder, LEGACY_FORMAT, config, located, notices, marker)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(quantization, dict) or method != QUANT_METHOD:
        state = f"quantized by {method}" if method else "not quantized"
        raise FormatError(
            f"{folder}: {state}; expected quant_method {QUANT_METHOD!r} in config.json, or {LEGACY_CONFIG_NAME}"
        )
    _check_quantization(quantization, str(folder))
    return Checkpoint(folder, QUANT_METHOD, config, _locate(folder, _v1_shards(folder)), notices)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or FormatError that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise FormatError(f"{path}: cannot be read ({problem.strerror}); a checkpoint folder needs it") from None
    except (ValueError, RecursionError) as problem:
        raise FormatError(f"{path}: not JSON ({problem})") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: a JSON {type(content).__name__} where an object belongs")
    return content


def read_raw(located: Located) -> np.ndarray:
    """A stored tensor's bytes, uint8 [nbytes]."""
    path, stored = located
    return np.frombuffer(read_bytes(path, stored.offset, stored.info.nbytes), np.uint8)


# --- kappaquant v1 ---


def _check_quantization(quantization: dict[str, Any], label: str) -> None:
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{label}: format_version {version!r}; this kappaquant reads {FORMAT_VERSION}, a newer one may help"
        )
    if quantization.get("rotation") != ROTATION:
        raise FormatError(f"{label}: rotation {quantization.get('rotation')!r}; this kappaquant reads {ROTATION!r}")
    if quantization.get("norms", "F16") not in ("F16", "F32"):
        raise FormatError(f"{label}: norms {quantization['norms']!r}; this kappaquant reads 'F16' and 'F32'")
    if not all(isinstance(quantization.get(key), dict) for key in ("tensors", "codebooks")):
        raise FormatError(f"{label}: quantization_config lacks its 'tensors' or 'codebooks' table")


def _v1_shards(folder: Path) -> list[str]:
    if (folder / INDEX_NAME).exists():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if not (folder / name).exists():
                raise FormatError(f"{folder}/{name}: named by {INDEX_NAME} but missing; fetch it again")
        return names
    if not (folder / SINGLE_NAME).exists():
        raise FormatError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME}; the checkpoint is incomplete")
    return [SINGLE_NAME]


def _v1_entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    """As the manifest describes and vouches for them: bits come from the checkpoint, never from names."""
    folder, quantization = checkpoint.path, checkpoint.config["quantization_config"]
    manifest = read_json(folder / MANIFEST_NAME)
    text = json.dumps(quantization, sort_keys=True, separators=(",", ":"))
    if manifest.get("quantization_config_sha256") != hashlib.sha256(text.encode()).hexdigest():
        raise FormatError(f"{folder}/config.json: its quantization_config is not the one {MANIFEST_NAME} vouches for")
    described, hashes = manifest.get("tensors"), manifest.get("sha256")
    if not isinstance(described, dict) or not isinstance(hashes, dict):
        raise FormatError(f"{folder}/{MANIFEST_NAME}: lacks its 'tensors' or 'sha256' table")
    unvouched = checkpoint.located.keys() - hashes.keys()
    located, entries = dict(checkpoint.located), {}
    for name, storage in quantization["tensors"].items():
        match described.get(name):
            case {"shape": [*shape], "dtype": str(dtype)} if dtype in DTYPE_BYTES and shape_makes_sense(shape):
                entries[name] = _v1_entry(TensorInfo(name, dtype, tuple(shape)), storage, quantization, located)
            case entry:
                raise FormatError(f"{name}: {MANIFEST_NAME} needs its shape and dtype, and has {entry!r}")
    if located:
        extra = next(iter(located))
        raise FormatError(
            f"{extra}: in {located[extra][0].name} but not in config.json's map of {len(entries)} parameters"
        )
    if unvouched:
        raise FormatError(f"{min(unvouched)}: {MANIFEST_NAME} has no SHA-256 for it")
    return entries


def _v1_entry(info: TensorInfo, storage: Any, quantization: dict[str, Any], located: dict[str, Located]) -> Entry:
    if storage in DTYPE_BYTES:
        return Entry(
            TensorInfo(info.name, storage, info.shape), None, (), (_take(located, info.name, storage, info.shape),)
        )
    if not isinstance(storage, str):
        raise FormatError(f"{info.name}: stored as {storage!r}; expected a format id or a dtype")
    fmt = format_by_id(storage, info.name)
    book = quantization["codebooks"].get(storage)
    if not isinstance(book, list) or len(book) != 2**fmt.bits or not _ascending(book):
        raise FormatError(
            f"{info.name}: quantization_config has no codebook of {2**fmt.bits} ascending values for {storage}"
        )
    if len(info.shape) < 2:
        raise FormatError(f"{info.name}: shape {list(info.shape)}; only matrices are stored as {storage}")
    parts = (
        _take(located, info.name + PACKED_SUFFIX, "U8", fmt.packed_shape(info.shape)),
        _take(located, info.name + NORMS_SUFFIX, quantization.get("norms", "F16"), fmt.norms_shape(info.shape)),
    )
    return Entry(info, fmt, tuple(book), parts)


def _ascending(book: list[Any]) -> bool:
    numbers = all(type(c) in (int, float) and math.isfinite(c) for c in book)
    return numbers and all(low < high for low, high in pairwise(book))


# --- tq3_native ---


def _check_marker(marker: dict[str, Any], folder: Path) -> None:
    for key, known, default in (
        ("format", (LEGACY_FORMAT,), None),
        ("quantizer_seed", (LEGACY_SEED,), LEGACY_SEED),
        ("group_size", GROUP_SIZES, None),
    ):
        if marker.get(key, default) not in known:
            raise FormatError(
                f"{folder / LEGACY_CONFIG_NAME}: {key} {marker.get(key)!r}; known is {', '.join(map(str, known))}"
            )


def _legacy_shards(folder: Path, notices: list[str]) -> list[str]:
    """The shards that are there; an index that names others beside a single file is stale."""
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder}: no safetensors files")
    if not (folder / INDEX_NAME).exists():
        return files
    named = sorted(set(_weight_map(folder).values()))
    missing = [name for name in named if name not in files]
    if not missing:
        return named
    if SINGLE_NAME not in files:
        raise FormatError(f"{folder}/{missing[0]}: named by {INDEX_NAME} but missing; fetch it again")
    notices.append(f"{INDEX_NAME} is stale: it names {missing[0]}, which is not there; read {SINGLE_NAME} instead")
    return [SINGLE_NAME]


def _legacy_entries(checkpoint: Checkpoint, shapes_of: ShapesOf) -> dict[str, Entry]:
    """Bits from the bytes, since the marker's cannot be trusted; shapes from the architecture."""
    located, entries = dict(checkpoint.located), {}
    packed = [name.removesuffix(PACKED_SUFFIX) for name in located if name.endswith(PACKED_SUFFIX)]
    shapes = shapes_of(packed)
    for name in packed:
        if name + NORMS_SUFFIX not in located:
            raise FormatError(f"{name}: packed, but its {NORMS_SUFFIX[1:]} are in no shard")
        parts = located.pop(name + PACKED_SUFFIX), located.pop(name + NORMS_SUFFIX)
        if name in shapes:
            entries[name] = _legacy_entry(name, shapes[name], parts, checkpoint.marker)
    for name, part in located.items():
        if name.endswith(NORMS_SUFFIX):
            raise FormatError(f"{name}: norms in {part[0].name} without their {PACKED_SUFFIX[1:]}")
        entries[name] = Entry(part[1].info, None, (), (part,))
    return entries


def _legacy_entry(name: str, shape: tuple[int, ...], parts: tuple[Located, Located], marker: dict[str, Any]) -> Entry:
    group_size = marker["group_size"]
    width = parts[0][1].info.shape[-1] if parts[0][1].info.shape else 0
    dense = [bits for bits in (2, 3, 4) if width * 8 == group_size * bits]
    bits = dense[0] if dense else marker.get("bits")
    if not dense and (width != group_size or bits not in (1, 5, 6, 7, 8)):
        raise FormatError(
            f"{name}{PACKED_SUFFIX}: {width} bytes for a group of {group_size} with bits = {bits} fits no packing: "
            f"2, 3, 4 bits are packed densely; 1 and 5 to 8 take {group_size} bytes"
        )
    assert isinstance(bits, int)
    fmt = Format(max(bits, 2), group_size)  # a 1-bit code rides in a 2-bit field
    rows, groups = math.prod(shape[:-1]), fmt.groups(shape[-1])
    for (path, stored), dtype, expected in (
        (parts[0], "U8", (rows * groups, width)),
        (parts[1], "F32", (rows, groups)),
    ):
        if (stored.info.dtype, stored.info.shape) != (dtype, expected):
            raise FormatError(
                f"{stored.info.name}: {path.name} holds {stored.info.dtype} {list(stored.info.shape)}; a parameter of "
                f"shape {list(shape)} in groups of {group_size} needs {dtype} {list(expected)}"
            )
    book = legacy_codebook(bits, group_size)
    padded = book + book[-1:] * (2**fmt.bits - len(book))
    return Entry(TensorInfo(name, "F16", shape), fmt, padded, parts, not dense)


# --- both ---


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{folder}/{INDEX_NAME}: has no weight_map of tensor names to file names")
    for name in weight_map.values():
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise FormatError(f"{folder}/{INDEX_NAME}: shard name {name!r} is not a plain *.safetensors name")
    return weight_map


def _locate(folder: Path, shards: list[str]) -> dict[str, Located]:
    located: dict[str, Located] = {}
    for shard in shards:
        for name, stored in read_header(folder / shard, FormatError).items():
            if name in located:
                raise FormatError(f"{name}: in both {located[name][0].name} and {shard}")
            located[name] = (folder / shard, stored)
    return located


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
