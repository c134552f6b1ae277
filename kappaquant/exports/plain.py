"""Turn a quantized checkpoint back into plain safetensors that any tool loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.layout import ShardLayout, dealt, index
from kappaquant.checkpoints.writer import Writer
from kappaquant.errors import PlanError
from kappaquant.files.documents import digest
from kappaquant.files.processes import ItemError
from kappaquant.files.safetensors import DTYPE_BYTES, Stored, TensorInfo, write_at
from kappaquant.files.tensors import TORCH_DTYPES, ranges, tensor_bytes
from kappaquant.formats.entry import Entry

DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a parameter, whole rows of its last axis, and where they go."""

    entry: Entry
    start: int
    stop: int
    target_path: Path
    stored: Stored

    @property
    def tensor(self) -> str:
        return self.entry.info.name

    @property
    def nbytes(self) -> int:
        """Of the output."""
        return (self.stop - self.start) * DTYPE_BYTES[self.stored.info.dtype]


def dequantize(
    checkpoint: Checkpoint,
    output: str | Path,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write every parameter of ``checkpoint`` unquantized to the new folder ``output``, with all its other files.

    A run that is killed leaves ``<output>.partial``; the same call resumes it.

    Args:
        dtype: "BF16", "F16" or "F32" for the dequantized tensors; None takes the dtype they had in the source
            (float16 for tq3_native, which does not tell). Kept tensors keep theirs.
        progress: called with the output bytes written and in all.

    Raises:
        PlanError: another dtype, or one that can not hold the weights.
        OutputError: ``output`` is not empty, lies in the checkpoint, or does not fit the disk.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    output = Path(output).absolute()
    infos = {}
    for name in checkpoint.keys():
        entry = checkpoint.entry(name)
        infos[name] = TensorInfo(name, (dtype or entry.info.dtype) if entry.fmt else entry.info.dtype, entry.info.shape)
    fingerprint = digest(str(checkpoint.path.resolve()), {n: i.dtype for n, i in infos.items()})
    with Writer[None](
        output, fingerprint, inside=checkpoint.path, stage="write", total=sum(info.nbytes for info in infos.values()),
        progress=lambda stage, done, total: progress(done, total),
    ) as writer:  # fmt: skip
        if not writer.finished:
            _write(checkpoint, dealt([info] for info in infos.values()), writer)
        writer.name()
    return output


def _write(checkpoint: Checkpoint, shards: dict[str, ShardLayout], writer: Writer[None]) -> None:
    for shard, layout in shards.items():
        writer.lay_out(shard, layout)
        path = writer.folder / shard
        slices = [
            Slice(checkpoint.entry(name), start, stop, path, stored)
            for name, stored in layout.stored.items()
            for start, stop in ranges(stored.info.shape)
        ]
        try:
            writer.fill(shard, writer.missing(slices), _decode, None)
        except ItemError as failure:
            raise failure.problem from failure
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    documents = {**index(shards), **({"config.json": config} if config else {})}
    writer.finish(documents, {name: checkpoint.fetch(name) for name in checkpoint.side_files})


def _decode(piece: Slice) -> None:
    entry, info = piece.entry, piece.stored.info
    if entry.fmt is None:
        values = entry.elements(piece.start, piece.stop)
    else:
        width = info.shape[-1]
        values = entry.read_rows(piece.start // width, piece.stop // width).to(TORCH_DTYPES[info.dtype])
        if not bool(values.isfinite().all()):
            raise PlanError(
                f"{piece.tensor}: its weights are not finite or too large for {info.dtype}; choose BF16 or F32, or verify it"
            )
    write_at(piece.target_path, piece.stored, piece.start, tensor_bytes(values))
