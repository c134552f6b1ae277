"""A checkpoint and the original it is measured against: opened, refused by name if they are no pair, described for the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.open import is_checkpoint, open_checkpoint
from kappaquant.checkpoints.side_files import MANIFEST_NAME
from kappaquant.errors import FormatError, SourceError, UnsupportedError
from kappaquant.evaluate.documents.evaluation import CheckpointFacts, SourceFacts
from kappaquant.files.documents import read_json
from kappaquant.files.safetensors import read_bytes
from kappaquant.sources.folder import LocalSource
from kappaquant.sources.location import local_folder
from kappaquant.sources.open import open_source
from kappaquant.sources.source import Source

_TOKENIZER_JSON = "tokenizer.json"
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")  # of models without a tokenizer.json
_SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
_SAMPLE = 4096  # bytes of a tensor that are hashed


@dataclass(frozen=True)
class Pair:
    """What is measured, and against what.

    Attributes:
        checkpoint: the quantized checkpoint, or a plain folder such as ``dequantize`` writes.
        source: the original, a folder of the user's or of the Hub cache.
        tokenizer: the folder whose tokenizer is used: the original's if it has one.
        notices: what was found odd but harmless, in words.
    """

    checkpoint: Checkpoint | LocalSource
    source: LocalSource
    tokenizer: Path
    notices: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the original is called."""
        return self.source.label.rpartition("/")[2] if self.source.revision else self.source.folder.resolve().name

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.checkpoint.path if isinstance(self.checkpoint, Checkpoint) else self.checkpoint.folder


def open_pair(checkpoint: str | Path, against: str | Path, revision: str | None = None) -> Pair:
    """Open both, reading headers only.

    Args:
        checkpoint: folder or Hub id of a quantized checkpoint, or of plain safetensors.
        against: the original, folder or Hub id; revision: of the latter.

    Raises:
        UnsupportedError: they differ in architecture, vocabulary, size or tokenizer; or neither has a tokenizer.
        FormatError, SourceError: one of them cannot be read.
    """
    source = _local(open_source(against, revision))
    folder = local_folder(checkpoint)
    packed = is_checkpoint(folder)
    opened = open_checkpoint(folder, source=source.folder) if packed else _local(open_source(folder))
    _check_config(folder, opened.config, source)
    notices = list(opened.notices) if isinstance(opened, Checkpoint) else []
    tokenizer = _check_tokenizers(folder, source, notices)
    return Pair(opened, source, tokenizer, notices)


def _local(source: Source) -> LocalSource:
    assert isinstance(source, LocalSource)  # only a streamed source is another
    return source


def _check_config(folder: Path, config: Mapping[str, Any], source: LocalSource) -> None:
    here, there = (_text_config(c) for c in (config, source.config))
    for key in _SAME:
        if here.get(key) != there.get(key):
            raise UnsupportedError(
                f"{folder}: its {key} is {here.get(key)!r}, that of {source.label} is {there.get(key)!r}; "
                "--against takes the model that the checkpoint was made from"
            )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text: Mapping[str, Any] = config.get("text_config") or config
    return text


def _check_tokenizers(folder: Path, source: LocalSource, notices: list[str]) -> Path:
    """The folder whose tokenizer both share; names the file if they do not."""
    compared: list[tuple[str, Callable[[Path], str]]] = [(_TOKENIZER_JSON, _tokenizer_digest)]
    compared += [(name, file_digest) for name in _VOCABULARIES]
    has = {place: {name for name, _ in compared if (place / name).exists()} for place in (folder, source.folder)}
    if not any(has.values()):
        raise UnsupportedError(
            f"{source.label}: neither it nor {folder} has {_TOKENIZER_JSON} or {_VOCABULARIES[0]}; copy the tokenizer's files there"
        )
    for place, other in ((folder, source.folder), (source.folder, folder)):
        if not has[place]:
            notices.append(f"{place} has no tokenizer files; those of {other} are used unchecked")
            return other
    for name, digest in compared:
        if name in has[folder] & has[source.folder]:
            if digest(folder / name) != digest(source.folder / name):
                raise UnsupportedError(
                    f"{folder / name}: differs from {source.folder / name}; with another tokenizer the same text is other "
                    "tokens, and nothing can be compared"
                )
            return source.folder
    notices.append(f"{folder} and {source.folder} share no tokenizer file to compare; those of the latter are used")
    return source.folder


def _tokenizer_digest(path: Path) -> str:
    """Of the content but not of its spacing, nor of the padding and truncation that a library left set."""
    content = read_json(path, SourceError)
    kept = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def checkpoint_facts(checkpoint: Checkpoint | LocalSource) -> CheckpointFacts:
    """What the report says of the checkpoint: its folder's name, not where that lies."""
    if isinstance(checkpoint, LocalSource):
        infos, files = checkpoint.tensors.values(), [checkpoint.folder / shard for shard in checkpoint.headers]
        bits = 8 * checkpoint.stored_bytes / sum(i.numel for i in infos)
        return CheckpointFacts(checkpoint.name, "safetensors", _total(files), bits, None)
    entries = checkpoint.entries.values()
    shards = {path for entry in entries for path, _ in entry.parts.values()}
    bits = 8 * sum(map(checkpoint.nbytes, checkpoint.entries)) / sum(entry.info.numel for entry in entries)
    manifest = checkpoint.path / MANIFEST_NAME
    name, container = checkpoint.name, checkpoint.container.id
    if not manifest.exists():
        return CheckpointFacts(name, container, _total(list(shards)), bits, None)
    predicted = _predicted(read_json(manifest, FormatError))
    return CheckpointFacts(name, container, _total(list(shards)), bits, file_digest(manifest), predicted)


def _predicted(manifest: Mapping[str, Any]) -> float | None:
    """The divergence that the plan of a checkpoint predicted."""
    match manifest.get("plan"):
        case {"inputs": {"predicted_kld": float() | int() as predicted}}:
            return float(predicted)
    return None


def source_facts(source: LocalSource) -> SourceFacts:
    """What the report says of the original; reads the headers and the first 4 kB of every tensor."""
    headers, samples = hashlib.sha256(), hashlib.sha256()
    paths = [source.folder / shard for shard in sorted(source.headers)]
    for path in paths:
        headers.update(path.name.encode())
        headers.update(_header(path))
        for stored in source.locate(path.name)[1].values():
            samples.update(read_bytes(path, stored.offset, min(_SAMPLE, stored.info.nbytes)))
    config = file_digest(source.folder / "config.json")
    name = (
        source.label if source.revision else source.folder.resolve().name
    )  # a report is published: no path of this machine
    return SourceFacts(
        name, source.revision, _total(paths), config, headers.hexdigest(), samples.hexdigest(), source.stored_as
    )  # fmt: skip


def content_digest(checkpoint: Checkpoint | LocalSource) -> str:
    """Tells one checkpoint from another: the manifest's hash, which covers every tensor's, else one over samples."""
    if isinstance(checkpoint, LocalSource):
        facts = source_facts(checkpoint)
        return hashlib.sha256((facts.config_sha256 + facts.headers_sha256 + facts.samples_sha256).encode()).hexdigest()
    manifest = checkpoint.path / MANIFEST_NAME
    if manifest.exists():
        return file_digest(manifest)
    digest = hashlib.sha256()
    for name in checkpoint.keys():
        for path, stored in checkpoint.entries[name].parts.values():
            digest.update(stored.info.name.encode())
            digest.update(read_bytes(path, stored.offset, min(_SAMPLE, stored.info.nbytes)))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: Path) -> bytes:
    length = int.from_bytes(read_bytes(path, 0, 8), "little")
    return bytes(read_bytes(path, 8, length))


def _total(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
