"""Calibration text that a model wrote itself: the seeds it begins with, and a file that says which model it was.

A quantized checkpoint and its source count as one model: the hash is over what both have, config, headers and the vectors (norms,
biases), which no plan packs. Vectors tell a model that was trained further from the one it began as, though headers be the same; training
that leaves every vector alone is not noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.kappaquant_v1 import QUANT_METHOD
from kappaquant.checkpoints.side_files import MANIFEST_NAME
from kappaquant.errors import FormatError, PlanError, UnsupportedError
from kappaquant.files.documents import read_json, write_whole
from kappaquant.sources.source import Source

TOKENS = 32 * 1024
"""How many tokens a model writes unless more or fewer are asked for."""


@dataclass(frozen=True)
class Rules:
    """How text is sampled.

    Attributes:
        temperature: logits are divided by it.
        seed: of the draws.
        rows: texts at once, B.
        length: tokens of a text behind its seed, at most.
    """

    temperature: float = 1.0
    seed: int = 0
    rows: int = 32
    length: int = 256


@dataclass(frozen=True)
class Model:
    """Which model wrote a text, or is to be quantized.

    Attributes:
        model, revision: Hub id or folder name, and the commit where it is known.
        sha256: over config, headers and vectors; the same of a source and of what was quantized from it.
        quantized: the container it is packed in; None for a source.
    """

    model: str
    revision: str | None
    sha256: str
    quantized: str | None = None

    def __str__(self) -> str:
        return f"{self.model} (revision {self.revision or 'unknown'}, {self.sha256[:12]})"

    def check(self, writer: Model, label: str) -> None:
        """Raise PlanError unless ``writer`` is this model, quantized or not; revisions count where both are known."""
        revisions = self.revision, writer.revision
        if self.sha256 == writer.sha256 and (None in revisions or revisions[0] == revisions[1]):
            return
        raise PlanError(
            f"{label}: calibration text of another model or revision: written by {writer}, to be quantized is {self}; let this "
            "model write one (--effort calibrated without --calibration, or kappaquant write), or give plain text"
        )


@dataclass(frozen=True)
class Header:
    """The first line of a file of written text: all that decided what follows.

    Attributes:
        written_by: the model.
        seeds_sha256: of the seeds.
        tokens: how many were asked for.
        rules: how they were sampled.
    """

    written_by: Model
    seeds_sha256: str
    tokens: int
    rules: Rules

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of the text, beside its tokens."""
        return {"written_by": asdict(self.written_by), "seeds_sha256": self.seeds_sha256}


def header_of(weights: Source | Checkpoint, tokens: int = TOKENS) -> Header:
    """The header of the text that a model writes. Raises UnsupportedError, as ``model_of`` does."""
    return Header(model_of(weights), seeds_digest(), tokens, Rules())


def model_of(weights: Source | Checkpoint) -> Model:
    """Which model these weights are; reads all vectors, of a streamed source every shard.

    Raises:
        UnsupportedError: a checkpoint of a container that does not keep what the source was.
    """
    name, revision = weights.name, weights.revision
    if isinstance(weights, Checkpoint):
        if weights.container.id != QUANT_METHOD:
            raise UnsupportedError(
                f"{weights.path}: {weights.container.id} does not tell which model it was made from; let the source write, or "
                "a checkpoint of the kappaquant format"
            )
        match read_json(weights.path / MANIFEST_NAME, FormatError).get("source"):
            case {"model": str(name), "revision": (str() | None) as revision}:
                pass
            case other:
                raise FormatError(
                    f"{weights.path}/{MANIFEST_NAME}: its source is {other!r}; a model and revision belong there"
                )
    config = {key: value for key, value in weights.config.items() if key != "quantization_config"}
    headers = {name: (info.dtype, info.shape) for name, info in weights.tensors.items()}
    digest = hashlib.sha256(json.dumps([config, headers], sort_keys=True).encode())
    for _, content in sorted(_vectors(weights)):
        digest.update(content)
    return Model(name, revision, digest.hexdigest(), weights.quantized)


def seeds() -> list[dict[str, Any]]:
    """What texts begin with: {"kind": language or the like, "text": ...}, or {..., "messages": [...]} to be answered."""
    return [json.loads(line) for line in _seeds().splitlines()]


def seeds_digest() -> str:
    """SHA-256 of the seeds."""
    return hashlib.sha256(_seeds().encode()).hexdigest()


def save(path: Path, header: Header, texts: Sequence[str]) -> None:
    """Write texts as .jsonl behind their header, whole or not at all. Raises OutputError."""
    rows = [asdict(header), *({"text": text} for text in texts)]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_header(line: str, label: str) -> Header | None:
    """The header in a file's first line; None where it is another line.

    Raises:
        PlanError: it is a header, but not one that this version writes.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or "written_by" not in row:
        return None
    try:
        header = Header(Model(**row["written_by"]), row["seeds_sha256"], row["tokens"], Rules(**row["rules"]))
        known = row == json.loads(json.dumps(asdict(header)))
        if known and all(isinstance(digest, str) for digest in (header.written_by.sha256, header.seeds_sha256)):
            return header
    except (TypeError, LookupError):
        pass
    raise PlanError(
        f"{label}:1: says that a model wrote the text, but not which as this version of kappaquant says it; write it again with "
        "kappaquant write"
    )


def _seeds() -> str:
    return files(__package__).joinpath("seeds.jsonl").read_text(encoding="utf-8")


def _vectors(weights: Source | Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of what has less than two axes, shard by shard."""
    from kappaquant.files.tensors import tensor_bytes

    shard_of = weights.shard_of
    holds = {name: shard_of[name] for name, info in weights.tensors.items() if len(info.shape) < 2}
    for shard in sorted(set(holds.values())):
        for name, entry in weights.read_entries(shard).items():
            if name in holds:
                yield name, bytes(tensor_bytes(entry.elements(0, entry.info.numel)))
