"""``evaluation.json``: what was measured of one checkpoint against its original, written and read back with every value checked."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from kappaquant.errors import FormatError, OutputError
from kappaquant.evaluate.report import rounded

FORMAT_VERSION = 1
Interval = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """A value and its 95 % interval; None where a single sequence allows none."""

    value: float
    interval_95: Interval | None


@dataclass(frozen=True)
class CheckpointFacts:
    """The checkpoint that was measured.

    Attributes:
        format: "kappaquant" or "tq3_native".
        bytes: of its weight files; bits_per_weight: 8 * bytes of its tensors / weights.
        manifest_sha256: of kappaquant.json; None for tq3_native, which has none.
    """

    path: str
    format: str
    bytes: int
    bits_per_weight: float
    manifest_sha256: str | None


@dataclass(frozen=True)
class SourceFacts:
    """The original it was measured against.

    Attributes:
        path: folder or Hub id; revision: commit on the Hub, None for a folder.
        bytes: of its weight files.
        config_sha256: of config.json; headers_sha256: of the headers of its shards, by name.
        samples_sha256: of the first bytes of every tensor, which tell a fine-tuned model from its base.
    """

    path: str
    revision: str | None
    bytes: int
    config_sha256: str
    headers_sha256: str
    samples_sha256: str


@dataclass(frozen=True)
class TextFacts:
    """The text: name and hash of the file, and how many of its tokens were predicted in how many sequences."""

    name: str
    sha256: str
    sequences: int
    tokens: int


@dataclass(frozen=True)
class Settings:
    """How it was measured.

    Attributes:
        window: tokens of a sequence; dtype: of the unpacked weights and activations, "float32" or "auto" (as published).
        top_k: probabilities of the original kept for each token; exact: they were all there are, so that the divergence is
            no lower bound.
        resamples, seed: of the bootstrap.
        activations: of the checkpoint's packed weights on NVIDIA GPUs, "int8" or "bf16"; elsewhere without effect.
    """

    window: int
    dtype: str
    device: str
    top_k: int
    exact: bool
    resamples: int
    seed: int
    activations: str = "int8"


@dataclass(frozen=True)
class PositionBin:
    """Mean divergence of the tokens at places ``first`` to ``last`` of their sequences, counted from 1."""

    first: int
    last: int
    mean: float
    tokens: int


@dataclass(frozen=True)
class DivergenceReport:
    """KL(original || checkpoint) of the next token, in nats.

    Attributes:
        mean, median, p99, maximum: over tokens; interval_95: of the mean.
        top1_agreement: share of tokens for which both think the same next token likeliest.
        by_position: bins of growing width.
    """

    mean: float
    interval_95: Interval | None
    median: float
    p99: float
    maximum: float
    top1_agreement: float
    top1_interval_95: Interval | None
    by_position: tuple[PositionBin, ...]


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity of both on the same tokens."""

    checkpoint: Measured
    source: Measured


@dataclass(frozen=True)
class FamilyDivergence:
    """Mean divergence of the original with one tensor family as the checkpoint has it; bits: per weight of the family."""

    family: str
    mean: float
    interval_95: Interval | None
    bits: float


@dataclass(frozen=True)
class Evaluation:
    """The whole report; ``Evaluation.load(path)`` reads it, ``save`` writes it.

    Attributes:
        kappaquant: version that measured; environment: versions, device and machine, by name.
        noise_floor: the original against itself in other batches; None if it was not measured.
        families: None unless measured; tasks, throughput: rows of other measurements.
    """

    kappaquant: str
    environment: dict[str, Any]
    checkpoint: CheckpointFacts
    source: SourceFacts
    text: TextFacts
    settings: Settings
    divergence: DivergenceReport
    noise_floor: DivergenceReport | None
    perplexity: PerplexityReport
    families: tuple[FamilyDivergence, ...] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)
    throughput: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Indented JSON; measured values in six digits."""
        values = {"format_version": self.format_version, **asdict(self)}
        return json.dumps(rounded(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the report, or leave what was there.

        Raises:
            OutputError: the file cannot be written.
        """
        write_whole(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a report back.

        Raises:
            FormatError: no such file, not JSON, another format_version, or a value that is missing or of another kind.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FormatError(f"{path}: no such file; kappaquant evaluate writes one") from None
        except OSError as problem:
            raise FormatError(f"{path}: cannot be read ({problem.strerror})") from None
        except (ValueError, RecursionError) as problem:
            raise FormatError(f"{path}: not JSON ({problem})") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{path}: format_version {version!r}; this kappaquant reads evaluations of version {FORMAT_VERSION}, "
                "written by kappaquant evaluate"
            )
        found: Evaluation = _read(content, cls, str(path), "")
        return found


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync and rename it, so that it is never half there; else OutputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written ({problem.strerror})") from None


_PLAIN = {float: "a finite number", int: "a whole number", str: "a string", bool: "true or false"}


def _read(value: Any, kind: Any, file: str, place: str) -> Any:
    """``value`` as the type ``kind``, or a FormatError that names file and place; the types used above are known."""
    if is_dataclass(kind):
        return _read_object(value, kind, file, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        return _read(value, next(a for a in arguments if a is not type(None)), file, place)
    if kind is Any:
        return value
    if origin is tuple and arguments[-1] is not ...:
        if not isinstance(value, list) or len(value) != len(arguments):
            raise FormatError(f"{file}: {place} is {value!r}; expected a list of {len(arguments)}")
        return tuple(_read(v, a, file, f"{place}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise FormatError(f"{file}: {place} is {value!r}; expected a list")
        return origin(_read(v, arguments[0], file, f"{place}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise FormatError(f"{file}: {place} is {value!r}; expected an object")
        return value
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not math.isfinite(value)):
        raise FormatError(f"{file}: {place} is {value!r}; expected {_PLAIN[kind]}")
    return kind(value)


def _read_object(value: Any, kind: Any, file: str, place: str) -> Any:
    if not isinstance(value, dict):
        raise FormatError(f"{file}: {place} is {value!r}; expected an object")
    prefix = f"{place}." if place else ""
    types = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    for name in names:
        if name not in value:
            raise FormatError(f"{file}: has no {prefix}{name}; measure again with kappaquant evaluate")
    unknown = sorted(value.keys() - set(names))
    if unknown:
        raise FormatError(f"{file}: {prefix}{unknown[0]} is not known; allowed there: {', '.join(names)}")
    return kind(**{name: _read(value[name], types[name], file, prefix + name) for name in names})
