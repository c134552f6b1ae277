"""The container tq3_native of published checkpoints, whose metadata lies: bits come from the bytes, shapes from the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.checkpoints.checkpoint import Checkpoint, locate_tensors
from kappaquant.checkpoints.container import Container, Contents, Shapes, ShapesOf
from kappaquant.checkpoints.layout import index
from kappaquant.checkpoints.side_files import MARKER_NAME
from kappaquant.errors import FormatError, PlanError
from kappaquant.files.documents import read_json
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat, published_codebook
from kappaquant.formats.entry import Entry, Located
from kappaquant.formats.kinds import CODEBOOK
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.planning.plan import Plan
from kappaquant.sources.open import open_source
from kappaquant.sources.source import INDEX_NAME, SINGLE_NAME, check_config

if TYPE_CHECKING:
    from torch import Tensor

TQ3_NATIVE = "tq3_native"
_SEED = 42  # of the published tool's rotation: the signs of formats/signs.py
_DENSE = (2, 3, 4)  # bits that lie in a dense stream; other codes take a byte each


@dataclass(frozen=True)
class NativeEntry(Entry):
    """A parameter whose parts are stored with their leading axes flattened, its codes perhaps one a byte."""

    byte_codes: bool = False

    def read_parts(self, start: int, stop: int) -> dict[str, Tensor]:
        parts = super().read_parts(start, stop)
        if self.byte_codes and self.fmt is not None:
            from kappaquant.formats import codec

            parts[PACKED_SUFFIX] = codec.pack(parts[PACKED_SUFFIX], self.fmt.bits)
        return parts


class Tq3Native(Container):
    """What published TurboQuant checkpoints are; see docs/format.md."""

    id = TQ3_NATIVE
    kinds = (CODEBOOK,)
    one_group_size = True
    hashed = False
    needs_conversion = True

    def recognizes(self, folder: Path) -> bool:
        return (folder / MARKER_NAME).exists()

    def check_plan(self, plan: Plan, tensors: Mapping[str, TensorInfo]) -> None:
        """Its readers infer 2, 3 and 4 bits per tensor from the bytes; 5 to 8 bits they take, once for all, from the marker."""
        used: dict[int, str] = {}
        groups: dict[int, str] = {}
        for name in plan.choices:
            fmt = plan.format_of(name)
            if fmt is None:
                continue
            if not isinstance(fmt, CodebookFormat):
                other = f"plan with --formats {CODEBOOK}, or " if isinstance(fmt, TrellisFormat) else ""
                raise PlanError(f"{name}: {fmt.id} is no format of {TQ3_NATIVE}; {other}write the kappaquant container")
            used.setdefault(fmt.bits, name)
            groups.setdefault(fmt.group_size, name)
        if not used:
            raise PlanError(f"the plan keeps every tensor; {TQ3_NATIVE} needs at least one that is quantized")
        if len(groups) > 1:
            examples = ", ".join(f"{size} ({groups[size]})" for size in sorted(groups))
            raise PlanError(
                f"groups of {examples}; {TQ3_NATIVE} has one group size: plan with --group-size 128, or write the kappaquant container"
            )
        if len(used) > 1 and max(used) > 4:
            examples = ", ".join(f"{bits} bits ({used[bits]})" for bits in sorted(used))
            raise PlanError(
                f"{used[max(used)]}: {max(used)} bits beside other widths; {TQ3_NATIVE} mixes only 2 to 4 bits, and 5 to 8 must be "
                f"the one width of the whole checkpoint; this plan has {examples}. Use 2 to 4 bits, or the kappaquant container"
            )
        for bits in used:
            published_codebook(bits, *groups)

    def variant(self, fmt: Format) -> Format:
        assert isinstance(fmt, CodebookFormat)
        return _variant(fmt.bits, fmt.group_size)

    def stored(self, info: TensorInfo, fmt: Format | None) -> dict[str, TensorInfo]:
        if fmt is None:
            narrowed = info.dtype in ("BF16", "F32", "F64")
            return {"": TensorInfo(info.name, "F16" if narrowed else info.dtype, info.shape)}
        assert isinstance(fmt, CodebookFormat)
        rows, groups = math.prod(info.shape[:-1]), fmt.groups(info.shape[-1])
        width = fmt.bytes_per_group if fmt.bits in _DENSE else fmt.group_size
        return {
            PACKED_SUFFIX: TensorInfo(info.name + PACKED_SUFFIX, "U8", (rows * groups, width)),
            NORMS_SUFFIX: TensorInfo(info.name + NORMS_SUFFIX, "F32", (rows, groups)),
        }

    def to_disk(self, fmt: Format, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if fmt.bits in _DENSE:
            return parts
        from kappaquant.formats import codec

        return {**parts, PACKED_SUFFIX: codec.unpack(parts[PACKED_SUFFIX], fmt.bits)}

    def documents(self, contents: Contents) -> dict[str, dict[str, Any]]:
        return {MARKER_NAME: _marker(contents), **index(contents.shards), "config.json": dict(contents.config)}

    def open(self, folder: Path, source: str | Path | None, shapes: Shapes | ShapesOf | None) -> Checkpoint:
        marker = read_json(folder / MARKER_NAME, FormatError)
        group_size = _check_marker(marker, folder)
        notices: list[str] = []
        located = locate_tensors(folder, _shards(folder, notices))
        _compare_index(folder, located, notices)
        has_config = (folder / "config.json").exists()
        config = read_json(folder / "config.json", FormatError) if has_config else {}
        check_config(config, str(folder), FormatError)
        packed = [name.removesuffix(PACKED_SUFFIX) for name in located if name.endswith(PACKED_SUFFIX)]
        known = shapes if isinstance(shapes, Mapping) else (shapes or _shapes_of(folder, source))(config, packed)
        entries: dict[str, Entry] = {}
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
                f"{MARKER_NAME} claims {claimed} bits for {times} tensors whose bytes are {actual} bits; read as {actual}"
            )
        for name, (path, stored) in located.items():
            if name.endswith(NORMS_SUFFIX):
                raise FormatError(f"{name}: norms in {path.name} without their {PACKED_SUFFIX[1:]}")
            if name in entries:
                raise FormatError(f"{name}: kept in {path.name} and packed as well; which of them counts is not known")
            entries[name] = Entry(stored.info, None, {"": (path, stored)})
        count = marker.get("compressed_layers")
        if count is not None and count != len(packed):
            notices.append(f"{MARKER_NAME} counts {count} compressed tensors, the shards hold {len(packed)}")
        return Checkpoint(folder, self, config, entries, notices)


def _marker(contents: Contents) -> dict[str, Any]:
    """``tq_config.json``. Published loaders take a tensor's bits from name patterns, so the wider ones are listed in full."""
    formats = {name: fmt for name, fmt in contents.formats.items() if isinstance(fmt, CodebookFormat)}
    bits = {name: fmt.bits for name, fmt in formats.items()}
    config: dict[str, Any] = {
        "format": TQ3_NATIVE,
        "bits": min(bits.values()),
        "group_size": next(iter(formats.values())).group_size,
        "quantizer_seed": _SEED,
        "compressed_layers": len(bits),
        "original_model": contents.model,
    }
    if len(set(bits.values())) > 1:
        config["sensitive_bits"] = max(bits.values())
        config["sensitive_patterns"] = sorted(name for name, b in bits.items() if b == max(bits.values()))
    return config


def _check_marker(marker: dict[str, Any], folder: Path) -> int:
    where = folder / MARKER_NAME
    if marker.get("format") != TQ3_NATIVE:
        raise FormatError(f"{where}: format {marker.get('format')!r}; known is {TQ3_NATIVE!r}")
    if marker.get("quantizer_seed", _SEED) != _SEED:
        raise FormatError(f"{where}: quantizer_seed {marker['quantizer_seed']}; the signs of seed {_SEED} are known")
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
                f"{folder}: {TQ3_NATIVE} files hold no shapes, and there is no config.json to derive them from; "
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
) -> NativeEntry:
    packed, norms = parts
    width = packed[1].info.shape[-1] if packed[1].info.shape else 0
    bits, byte_codes = _stored_bits(name, width, group_size, marker)
    fmt = _variant(bits, group_size)
    rows, groups = math.prod(shape[:-1]), fmt.groups(shape[-1])
    for (path, stored), dtype, expected in ((packed, "U8", (rows * groups, width)), (norms, "F32", (rows, groups))):
        if stored.info.dtype != dtype or stored.info.shape != expected:
            raise FormatError(
                f"{stored.info.name}: {path.name} holds {stored.info.dtype} {list(stored.info.shape)}; a parameter of shape "
                f"{list(shape)} in groups of {group_size} needs {dtype} {list(expected)}"
            )
    return NativeEntry(TensorInfo(name, "F16", shape), fmt, {PACKED_SUFFIX: packed, NORMS_SUFFIX: norms}, byte_codes)


def _variant(bits: int, group_size: int) -> CodebookFormat:
    """The format with the published centroids and float32 norms; a 1-bit code rides in a 2-bit field, half of which never occurs."""
    book, width = published_codebook(bits, group_size), max(bits, 2)
    return CodebookFormat(width, group_size, book + book[-1:] * (2**width - len(book)), "F32")


def _stored_bits(name: str, width: int, group_size: int, marker: dict[str, Any]) -> tuple[int, bool]:
    """(bits, one byte an index?) from the bytes a group takes."""
    for bits in _DENSE:
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
