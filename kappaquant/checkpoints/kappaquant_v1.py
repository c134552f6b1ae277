"""The container kappaquant, version 1: a Hugging Face folder with a complete map of formats and a manifest of hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint, locate_tensors
from kappaquant.checkpoints.container import Container, Contents, Shapes, ShapesOf
from kappaquant.checkpoints.layout import index
from kappaquant.checkpoints.manifest import (
    FORMAT_VERSION,
    QUANT_METHOD,
    ROTATION,
    config_digest,
    manifest,
    quantization_config,
    settings_of,
)
from kappaquant.checkpoints.side_files import MANIFEST_NAME
from kappaquant.errors import FormatError
from kappaquant.files.documents import read_json
from kappaquant.files.safetensors import DTYPE_BYTES, TensorInfo, shape_makes_sense
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import NORM_DTYPES
from kappaquant.formats.entry import Entry, Located, stored_parts
from kappaquant.formats.registry import format_by_id
from kappaquant.planning.plan import Plan
from kappaquant.sources.source import INDEX_NAME, SINGLE_NAME, check_config, shard_names

WEIGHTS_KEY, NO_WEIGHTS = "transformers_weights", "import-kappaquant-first.safetensors"
"""In config.json: the file that transformers then looks for, and does not find.

It warns of a quantization method that it does not know, and goes on with random weights; kappaquant's quantizer takes the key away.
"""


class KappaquantV1(Container):
    """See docs/format.md."""

    id = QUANT_METHOD

    def recognizes(self, folder: Path) -> bool:
        try:
            quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
            return bool(quantization["quant_method"] == QUANT_METHOD)
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            return False

    def check_plan(self, plan: Plan, tensors: Mapping[str, TensorInfo]) -> None:
        """Any plan fits."""

    def stored(self, info: TensorInfo, fmt: Format | None) -> dict[str, TensorInfo]:
        return stored_parts(info, fmt)

    def documents(self, contents: Contents) -> dict[str, dict[str, Any]]:
        quantization = quantization_config(contents)
        return {
            MANIFEST_NAME: manifest(contents, quantization),
            **index(contents.shards),
            "config.json": {**contents.config, "quantization_config": quantization, WEIGHTS_KEY: NO_WEIGHTS},
        }

    def open(self, folder: Path, source: str | Path | None, shapes: Shapes | ShapesOf | None) -> Checkpoint:
        config = read_json(folder / "config.json", FormatError)
        quantization = config["quantization_config"]
        check_quantization_config(quantization, str(folder))
        described = _described(folder, quantization)
        check_config(config, str(folder), FormatError)
        located = locate_tensors(folder, _indexed_shards(folder))
        formats = _formats(quantization)
        entries = {}
        for name, storage in quantization["tensors"].items():
            match described["tensors"].get(name):
                case {"shape": [*shape], "dtype": str(dtype)} if dtype in DTYPE_BYTES and shape_makes_sense(shape):
                    info = TensorInfo(name, storage if storage in DTYPE_BYTES else dtype, tuple(shape))
                    entries[name] = self._entry(info, formats.get(storage), located)
                case entry:
                    raise FormatError(f"{name}: {MANIFEST_NAME} needs its shape and dtype, and has {entry!r}")
        if located:
            extra = next(iter(located))
            raise FormatError(
                f"{extra}: in {located[extra][0].name} but not in config.json's map of {len(entries)} parameters"
            )
        for entry in entries.values():
            for _, stored in entry.parts.values():
                if stored.info.name not in described["sha256"]:
                    raise FormatError(f"{stored.info.name}: {MANIFEST_NAME} has no SHA-256 for it")
        return Checkpoint(folder, self, {key: value for key, value in config.items() if key != WEIGHTS_KEY}, entries)

    def _entry(self, info: TensorInfo, fmt: Format | None, located: dict[str, Located]) -> Entry:
        """The entry of one parameter of the map; takes its tensors out of ``located``."""
        if fmt is not None and len(info.shape) < 2:
            raise FormatError(f"{info.name}: shape {list(info.shape)}; only matrices are stored as {fmt.id}")
        return Entry(info, fmt, {suffix: _take(located, part) for suffix, part in self.stored(info, fmt).items()})


def _take(located: dict[str, Located], wanted: TensorInfo) -> Located:
    if wanted.name not in located:
        raise FormatError(f"{wanted.name}: missing from the shards; fetch the checkpoint again")
    path, stored = part = located.pop(wanted.name)
    if stored.info != wanted:
        found = stored.info
        raise FormatError(
            f"{wanted.name}: {path.name} holds {found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
        )
    return part


def _described(folder: Path, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest, which must vouch for this ``quantization_config``."""
    found = read_json(folder / MANIFEST_NAME, FormatError)
    if found.get("quantization_config_sha256") != config_digest(quantization):
        raise FormatError(f"{folder}/config.json: its quantization_config is not the one {MANIFEST_NAME} vouches for")
    if not isinstance(found.get("tensors"), dict) or not isinstance(found.get("sha256"), dict):
        raise FormatError(f"{folder}/{MANIFEST_NAME}: lacks its 'tensors' or 'sha256' table")
    return found


def _formats(quantization: Mapping[str, Any]) -> dict[str, Format]:
    """Format id -> the format with what the checkpoint says of it; checked before by ``check_quantization_config``."""
    used = {storage: name for name, storage in quantization["tensors"].items() if storage not in DTYPE_BYTES}
    return {key: format_by_id(key, name).restored(settings_of(key, quantization)) for key, name in used.items()}


def check_quantization_config(quantization: Mapping[str, Any], label: str) -> None:
    """Raise FormatError unless this is a complete quantization_config of a version, rotation and formats known here."""
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{label}: format_version {version!r}; this kappaquant reads {FORMAT_VERSION}, a newer one may help"
        )
    if quantization.get("rotation") != ROTATION:
        raise FormatError(f"{label}: rotation {quantization.get('rotation')!r}; this kappaquant reads {ROTATION!r}")
    if quantization.get("norms", "F16") not in NORM_DTYPES:
        raise FormatError(f"{label}: norms {quantization['norms']!r}; this kappaquant reads 'F16' and 'F32'")
    tensors, codebooks = quantization.get("tensors"), quantization.get("codebooks")
    if not isinstance(tensors, dict) or not isinstance(codebooks, dict):
        raise FormatError(f"{label}: quantization_config lacks its 'tensors' or 'codebooks' table")
    if not isinstance(quantization.get("formats", {}), dict):
        raise FormatError(f"{label}: quantization_config's 'formats' is no table")
    checked: set[str] = set()
    for name, storage in tensors.items():
        if not isinstance(storage, str):
            raise FormatError(f"{name}: stored as {storage!r}; expected a format id or a dtype")
        if storage in DTYPE_BYTES or storage in checked:
            continue
        checked.add(storage)
        try:
            format_by_id(storage, name).restored(settings_of(storage, quantization))
        except ValueError as problem:
            raise FormatError(f"{name}: quantization_config has {problem}") from None


def _indexed_shards(folder: Path) -> list[str]:
    """Shards of the folder: those of the index, else the single file."""
    files = [p.name for p in folder.iterdir()]
    listed = read_json(folder / INDEX_NAME, FormatError) if INDEX_NAME in files else None
    if listed is None and SINGLE_NAME not in files:
        raise FormatError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME}; the checkpoint is incomplete")
    return shard_names(str(folder), files, listed, FormatError)
