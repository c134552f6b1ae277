"""Open tq3_native checkpoints, whose metadata lies: bits come from the bytes, shapes from the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint, Entry, Located, Shapes, ShapesOf, locate_tensors
from kappaquant.errors import FormatError
from kappaquant.formats.codebook import (
    GROUP_SIZES,
    LEGACY_CONFIG_NAME,
    LEGACY_FORMAT,
    LEGACY_SEED,
    NORMS_SUFFIX,
    PACKED_SUFFIX,
    Format,
    TensorInfo,
    legacy_codebook,
)
from kappaquant.sources.folder import INDEX_NAME, SINGLE_NAME, check_config, open_source, read_json


def open_legacy(folder: Path, source: str | Path | None, shapes: Shapes | ShapesOf | None) -> Checkpoint:
    """See ``open_checkpoint``."""
    marker = read_json(folder / LEGACY_CONFIG_NAME, FormatError)
    group_size = _check_marker(marker, folder)
    notices: list[str] = []
    located = locate_tensors(folder, _shards(folder, notices))
    _compare_index(folder, located, notices)
    has_config = (folder / "config.json").exists()
    config = read_json(folder / "config.json", FormatError) if has_config else {}
    check_config(config, str(folder), FormatError)
    packed = [name.removesuffix(PACKED_SUFFIX) for name in located if name.endswith(PACKED_SUFFIX)]
    known = shapes if isinstance(shapes, Mapping) else (shapes or _shapes_of(folder, source))(config, packed)
    entries = {}
    lies: Counter[tuple[int, int]] = Counter()
    for name in packed:
        parts = _take(name, located)
        if name not in known:
            raise FormatError(f"{name}: the model has no parameter of this name, so its shape is unknown")
        shape = known[name]
        if shape is None:
            continue
        entry = entries[name] = _entry(name, parts, marker, group_size, tuple(shape))
        claimed = _claimed_bits(name, marker)
        if entry.bits != claimed:
            lies[claimed, entry.bits] += 1
    for (claimed, actual), times in sorted(lies.items()):
        notices.append(
            f"{LEGACY_CONFIG_NAME} claims {claimed} bits for {times} tensors whose bytes are {actual} bits; read as {actual}"
        )
    for name, (path, stored_tensor) in located.items():
        if name.endswith(NORMS_SUFFIX):
            raise FormatError(f"{name}: norms in {path.name} without their {PACKED_SUFFIX[1:]}")
        if name in entries:
            raise FormatError(f"{name}: kept in {path.name} and packed as well; which of them counts is not known")
        entries[name] = Entry(stored_tensor.info, None, 16, (), ((path, stored_tensor),))
    count = marker.get("compressed_layers")
    if count is not None and count != len(packed):
        notices.append(f"{LEGACY_CONFIG_NAME} counts {count} compressed tensors, the shards hold {len(packed)}")
    return Checkpoint(folder, LEGACY_FORMAT, config, entries, notices)


def _check_marker(marker: dict[str, Any], folder: Path) -> int:
    where = folder / LEGACY_CONFIG_NAME
    if marker.get("format") != LEGACY_FORMAT:
        raise FormatError(f"{where}: format {marker.get('format')!r}; known is {LEGACY_FORMAT!r}")
    if marker.get("quantizer_seed", LEGACY_SEED) != LEGACY_SEED:
        raise FormatError(
            f"{where}: quantizer_seed {marker['quantizer_seed']}; the signs of seed {LEGACY_SEED} are known"
        )
    if marker.get("group_size") not in GROUP_SIZES:
        raise FormatError(f"{where}: group_size {marker.get('group_size')!r}; must be one of {GROUP_SIZES}")
    for key, kind in (("bits", int), ("sensitive_bits", int), ("sensitive_patterns", list)):
        if not isinstance(marker.get(key), kind | None):
            raise FormatError(f"{where}: {key} {marker[key]!r}; must be a JSON {kind.__name__}")
    return int(marker["group_size"])


def _shards(folder: Path, notices: list[str]) -> list[str]:
    """The shards that are there; an index that names others beside a single file is stale."""
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if (folder / INDEX_NAME).exists():
        named = sorted({str(v) for v in _weight_map(folder).values()})
        for name in named:
            if name != Path(name).name or "\\" in name:
                raise FormatError(f"{folder}/{INDEX_NAME}: shard name {name!r} leaves the folder")
        missing = [name for name in named if name not in files]
        if not missing:
            return named
        if SINGLE_NAME not in files:
            raise FormatError(f"{folder}/{missing[0]}: named by {INDEX_NAME} but missing; fetch it again")
        notices.append(f"{INDEX_NAME} is stale: it names {missing[0]}, which is not there; read {SINGLE_NAME} instead")
        return [SINGLE_NAME]
    if not files:
        raise FormatError(f"{folder}: no safetensors files")
    return files


def _weight_map(folder: Path) -> dict[str, Any]:
    weight_map = read_json(folder / INDEX_NAME, FormatError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{folder}/{INDEX_NAME}: has no weight_map of tensor names to file names")
    return weight_map


def _compare_index(folder: Path, located: Mapping[str, Located], notices: list[str]) -> None:
    if not (folder / INDEX_NAME).exists() or notices:
        return
    weight_map = _weight_map(folder)
    absent = sorted(set(weight_map) - set(located))
    unlisted = sorted(set(located) - set(weight_map))
    for names, what in (
        (absent, "lists tensors that no shard holds"),
        (unlisted, "does not list all tensors of the shards"),
    ):
        if names:
            notices.append(
                f"{INDEX_NAME} is stale: it {what} ({len(names)}, such as {names[0]}); the shards were believed"
            )


def _shapes_of(folder: Path, source: str | Path | None) -> ShapesOf:
    """From the original model if it is named, else from the architecture."""
    if source is not None:
        original = open_source(source, stream=True)
        return lambda config, names: {name: info.shape for name, info in original.tensors.items()}

    def derived(config: dict[str, Any], names: list[str]) -> Shapes:
        if not config:
            raise FormatError(
                f"{folder}: {LEGACY_FORMAT} files hold no shapes, and there is no config.json to derive them from; "
                "name the original model as source"
            )
        from kappaquant.models.skeleton import parameter_shapes

        return parameter_shapes(config, names)

    return derived


def _take(name: str, located: dict[str, Located]) -> tuple[Located, Located]:
    """A quantized parameter's packed codes and norms, out of ``located``."""
    packed = located.pop(name + PACKED_SUFFIX)
    if name + NORMS_SUFFIX not in located:
        raise FormatError(f"{name}: packed in {packed[0].name} but its {NORMS_SUFFIX[1:]} are in no shard")
    return packed, located.pop(name + NORMS_SUFFIX)


def _entry(
    name: str, parts: tuple[Located, Located], marker: dict[str, Any], group_size: int, shape: tuple[int, ...]
) -> Entry:
    packed, norms = parts
    width = packed[1].info.shape[-1] if packed[1].info.shape else 0
    bits, byte_codes = _stored_bits(name, width, group_size, marker)
    # a 1-bit code rides in a 2-bit field, whose upper two entries never occur
    fmt = Format(max(bits, 2), group_size)
    rows, groups = math.prod(shape[:-1]), fmt.groups(shape[-1])
    for (path, stored), dtype, expected in ((packed, "U8", (rows * groups, width)), (norms, "F32", (rows, groups))):
        if stored.info.dtype != dtype or stored.info.shape != expected:
            raise FormatError(
                f"{stored.info.name}: {path.name} holds {stored.info.dtype} {list(stored.info.shape)}; a parameter of shape "
                f"{list(shape)} in groups of {group_size} needs {dtype} {list(expected)}"
            )
    book = legacy_codebook(bits, group_size)
    padded = book + book[-1:] * (2**fmt.bits - len(book))
    return Entry(TensorInfo(name, "F16", shape), fmt, bits, padded, (packed, norms), byte_codes)


def _stored_bits(name: str, width: int, group_size: int, marker: dict[str, Any]) -> tuple[int, bool]:
    """(bits, one byte an index?) from the bytes a group takes."""
    for bits in (2, 3, 4):
        if width * 8 == group_size * bits:
            return bits, False
    claimed = marker.get("bits")
    if width == group_size and claimed in (1, 5, 6, 7, 8):
        return int(claimed), True
    raise FormatError(
        f"{name}{PACKED_SUFFIX}: {width} bytes for a group of {group_size} with bits = {claimed} fits no packing: "
        f"2, 3, 4 bits are packed densely; 1 and 5 to 8 take {group_size} bytes"
    )


def _claimed_bits(name: str, marker: dict[str, Any]) -> int:
    patterns = marker.get("sensitive_patterns") or []
    if marker.get("sensitive_bits") and any(str(p).lower() in name.lower() for p in patterns):
        return int(marker["sensitive_bits"])
    return int(marker.get("bits") or 0)
