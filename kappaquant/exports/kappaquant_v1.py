"""Re-label a tq3_native checkpoint as kappaquant v1: the same codes under names, shapes and a map that serving engines take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.container import Contents
from kappaquant.checkpoints.layout import ShardLayout, dealt
from kappaquant.checkpoints.open import container_by_id
from kappaquant.checkpoints.writer import Writer
from kappaquant.errors import FormatError, PlanError, UnsupportedError
from kappaquant.files.documents import digest
from kappaquant.files.processes import ItemError
from kappaquant.files.safetensors import Stored, TensorInfo, write_at
from kappaquant.files.tensors import TORCH_DTYPES, ranges, tensor_bytes
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import AUTO, BITS, NORM_DTYPES, NORMS_SUFFIX, CodebookFormat
from kappaquant.formats.codec import norms_refusal
from kappaquant.formats.entry import KEPT_BITS, Entry
from kappaquant.planning.plan import KEPT, Choice, Plan
from kappaquant.version import __version__


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a parameter, whole rows of its last axis, and where its parts go."""

    entry: Entry
    start: int
    stop: int
    target_path: Path
    stored: dict[str, Stored]

    @property
    def tensor(self) -> str:
        return self.entry.info.name

    @property
    def nbytes(self) -> int:
        """Of the output."""
        whole = sum(stored.info.nbytes for stored in self.stored.values())
        return whole * (self.stop - self.start) // self.entry.info.numel


def convert(
    checkpoint: Checkpoint,
    output: str | Path,
    norms: str = "F32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a checkpoint of another container as a v1 folder of the same codes, codebooks and kept tensors.

    A run that is killed leaves ``<output>.partial``; the same call resumes it.

    Args:
        norms: "F32" keeps every norm bit for bit; "F16" rounds them, which saves 2 bytes a group.
        progress: called with the output bytes written and in all.

    Raises:
        FormatError: the checkpoint needs no converting, or has no config.json.
        UnsupportedError: it has 1-bit codes, which v1 does not.
        PlanError: ``norms`` is neither, or a norm does not fit F16.
        OutputError: ``output`` is not empty, lies in the checkpoint, or does not fit the disk.
    """
    if norms not in NORM_DTYPES:
        raise PlanError(f"norms {norms!r}: must be one of {', '.join(NORM_DTYPES)}")
    if not checkpoint.container.needs_conversion:
        raise FormatError(f"{checkpoint.path}: is {checkpoint.container.id} already, and needs no converting")
    if not checkpoint.config:
        raise FormatError(f"{checkpoint.path}: has no config.json; copy the original model's there")
    for name in checkpoint.keys():
        if checkpoint.bits(name) not in (*BITS, KEPT_BITS):
            raise UnsupportedError(f"{name}: has {checkpoint.bits(name)}-bit codes; v1 has 2 to 8 bits; dequantize it")
    output = Path(output).absolute()
    formats = {name: _format(checkpoint.format_of(name), norms) for name in checkpoint.keys()}
    v1 = container_by_id("kappaquant")
    parts = {name: v1.stored(checkpoint.entry(name).info, fmt) for name, fmt in formats.items()}
    fingerprint = digest(str(checkpoint.path.resolve()), norms, __version__)
    total = sum(part.nbytes for stored in parts.values() for part in stored.values())
    with Writer[None](
        output, fingerprint, inside=checkpoint.path, stage="write", total=total,
        progress=lambda stage, done, total: progress(done, total),
    ) as writer:  # fmt: skip
        if not writer.finished:
            shards = dealt(list(stored.values()) for stored in parts.values())
            for shard, layout in shards.items():
                writer.lay_out(shard, layout)
                slices = _slices(checkpoint, writer.folder / shard, parts, layout)
                try:
                    writer.fill(shard, writer.missing(slices), _copy, None)
                except ItemError as failure:
                    raise failure.problem from failure
            contents = Contents(
                checkpoint.name, checkpoint.revision, checkpoint.config, checkpoint.tensors, formats, _plan(checkpoint, norms),
                checkpoint.container.id, {}, writer.hashes(None), writer.layouts,
            )  # fmt: skip
            writer.finish(v1.documents(contents), {name: checkpoint.fetch(name) for name in checkpoint.side_files})
        writer.name()
    return output


def _slices(
    checkpoint: Checkpoint, path: Path, parts: dict[str, dict[str, TensorInfo]], layout: ShardLayout
) -> Iterator[Slice]:
    """The pieces of one shard."""
    for name, stored in parts.items():
        if next(iter(stored.values())).name in layout.stored:
            places = {suffix: layout.stored[part.name] for suffix, part in stored.items()}
            for start, stop in ranges(checkpoint.shape(name)):
                yield Slice(checkpoint.entry(name), start, stop, path, places)


def _copy(piece: Slice) -> None:
    if piece.entry.fmt is None:
        values = piece.entry.elements(piece.start, piece.stop)
        write_at(piece.target_path, piece.stored[""], piece.start, tensor_bytes(values))
        return
    width = piece.entry.info.shape[-1]
    first, last = piece.start // width, piece.stop // width
    for suffix, part in piece.entry.read_parts(first, last).items():
        stored = piece.stored[suffix]
        if suffix == NORMS_SUFFIX and stored.info.dtype == "F16" and (reason := norms_refusal(part)):
            raise PlanError(f"{stored.info.name}: {reason}; keep them as they are (--norms f32)")
        values = part.to(TORCH_DTYPES[stored.info.dtype])
        write_at(piece.target_path, stored, first * part[0].numel(), tensor_bytes(values))


def _format(fmt: Format | None, norms: str) -> Format | None:
    """The format with its own codebook, and norms as they are to be."""
    if fmt is None:
        return None
    assert isinstance(fmt, CodebookFormat)
    return CodebookFormat(fmt.bits, fmt.group_size, fmt.codebook, norms)


def _plan(checkpoint: Checkpoint, norms: str) -> Plan:
    """The formats that the checkpoint has, as a plan."""
    formats = {name: checkpoint.format_of(name) for name in checkpoint.keys()}
    groups = {fmt.group_size for fmt in formats.values() if isinstance(fmt, CodebookFormat)}
    why = f"as in {checkpoint.container.id}"
    choices = {name: Choice(fmt.id if fmt else KEPT, why) for name, fmt in formats.items()}
    inputs = {"format": checkpoint.container.id, "norms": norms}
    return Plan(choices, groups.pop() if len(groups) == 1 else AUTO, "converted", inputs)
