"""The weights an export starts from, alike for a plain source and for a quantized checkpoint, which is decoded row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kappaquant.checkpoints.checkpoint import Checkpoint, Entry
from kappaquant.files.safetensors import Stored
from kappaquant.formats.codebook import CARD_MARK, EVALUATION_NAME, LEGACY_CONFIG_NAME, MANIFEST_NAME, TensorInfo
from kappaquant.planning.plan import Choice, Plan
from kappaquant.sources.folder import INDEX_NAME, Source

_OWN = (MANIFEST_NAME, LEGACY_CONFIG_NAME, EVALUATION_NAME, INDEX_NAME, "config.json")


@dataclass(frozen=True)
class Weights:
    """Headers, and the way to the bytes.

    Attributes:
        label: how messages call them.
        name: what the report calls the model.
        revision: Hub commit, None for a folder.
        folder: where they lie, None on the Hub.
        quantized: "kappaquant" or "tq3_native" for a quantized checkpoint; the weights are then what it decodes to.
        config: content of config.json.
        tensors: every parameter; shapes are logical.
        shard_of: the file each parameter needs.
        side_files: all other files that a copy of the model takes along.
        fetch: the local path of a side file.
        locate: (shard) -> entries of its parameters, fetched if need be.
        release: (shard) says that it is not needed any more.
        identity: what distinguishes these weights from others, as JSON values.
    """

    label: str
    name: str
    revision: str | None
    folder: Path | None
    quantized: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shard_of: dict[str, str]
    side_files: list[str]
    fetch: Callable[[str], Path]
    locate: Callable[[str], dict[str, Entry]]
    release: Callable[[str], None]
    identity: list[Any]


def of_source(source: Source) -> Weights:
    def locate(shard: str) -> dict[str, Entry]:
        path, stored = source.locate(shard)
        return {name: _plain(path, entry) for name, entry in stored.items()}

    label, stamps = source.label, {}
    if source.revision is None:
        label = str(Path(label).resolve())
        for shard in source.shards:
            status = source.fetch(shard).stat()
            stamps[shard] = (status.st_size, status.st_mtime_ns)
    headers = {n: (i.dtype, i.shape) for n, i in source.tensors.items()}
    return Weights(
        source.label, label if source.revision else Path(label).name, source.revision,
        None if source.revision else Path(label), None, source.config, source.tensors, source.shard_of,
        source.side_files, source.fetch, locate, source.release, [label, source.revision, headers, stamps],
    )  # fmt: skip


def of_checkpoint(checkpoint: Checkpoint) -> Weights:
    tensors, shard_of, stamps = {}, {}, {}
    for name in checkpoint.keys():
        entry = checkpoint.entry(name)
        tensors[name] = entry.info
        shard_of[name] = entry.parts[0][0].name
        for path, _ in entry.parts:
            status = path.stat()
            stamps[path.name] = (status.st_size, status.st_mtime_ns)
    files = [p.relative_to(checkpoint.path) for p in sorted(checkpoint.path.rglob("*")) if p.is_file()]
    side = [str(f) for f in files if f.suffix != ".safetensors" and f.name not in _OWN]

    def locate(shard: str) -> dict[str, Entry]:
        return {name: checkpoint.entry(name) for name, holder in shard_of.items() if holder == shard}

    label = str(checkpoint.path.resolve())
    formats = {n: [e.fmt.id if e.fmt else e.info.dtype, e.info.shape] for n, e in checkpoint.entries.items()}
    return Weights(
        str(checkpoint.path), checkpoint.path.resolve().name, None, Path(label), checkpoint.format, checkpoint.config,
        tensors, shard_of, side, lambda name: checkpoint.path / name, locate, lambda shard: None, [label, formats, stamps],
    )  # fmt: skip


def plan_of(checkpoint: Checkpoint) -> Plan:
    """A plan of the bits that a checkpoint has."""
    choices = {n: Choice(max(2, checkpoint.bits(n)), "as in the checkpoint") for n in checkpoint.keys()}
    sizes = {e.fmt.group_size for e in checkpoint.entries.values() if e.fmt}
    return Plan(choices, min([128, *sizes]), "checkpoint", {})


def read_rows(entry: Entry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a parameter seen as [rows, in], float32."""
    width = entry.info.shape[-1]
    reader = Checkpoint(entry.parts[0][0].parent, "", {}, {entry.info.name: entry})
    if entry.fmt is None:
        flat = reader.elements(entry.info.name, start * width, stop * width)
        return flat.view(stop - start, width).to(torch.float32)
    return reader.dequantize_rows(entry.info.name, start, stop)


def read(entry: Entry) -> Tensor:
    """A whole parameter, float32 if it was quantized, else as it is stored."""
    reader = Checkpoint(entry.parts[0][0].parent, "", {}, {entry.info.name: entry})
    return reader.tensor(entry.info.name) if entry.fmt is None else reader.dequantize(entry.info.name)


def is_own_card(path: Path) -> bool:
    """Whether it is a model card that describes a kappaquant checkpoint."""
    return path.name == "README.md" and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _plain(path: Path, stored: Stored) -> Entry:
    return Entry(stored.info, None, 16, (), ((path, stored),))
