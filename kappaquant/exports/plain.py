"""Turn a quantized checkpoint back into plain safetensors that any tool loads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.layout import ShardLayout
from kappaquant.checkpoints.manifest import index, json_text
from kappaquant.errors import OutputError, PlanError
from kappaquant.files.safetensors import build_header, file_size, write_bytes
from kappaquant.files.tensors import TORCH_DTYPES
from kappaquant.files.unfinished import Partial, reserve
from kappaquant.formats.codebook import CARD_MARK, EVALUATION_NAME, LEGACY_CONFIG_NAME, MANIFEST_NAME, TensorInfo
from kappaquant.quantizing.slices import ranges, tensor_bytes
from kappaquant.sources.folder import INDEX_NAME, SINGLE_NAME

SHARD_BYTES = 5_000_000_000
DTYPES = ("BF16", "F16", "F32")


def dequantize(
    checkpoint: Checkpoint,
    output: str | Path,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write every parameter of ``checkpoint`` unquantized to the new folder ``output``, with all its other files.

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
    if output.resolve() == checkpoint.path.resolve() or checkpoint.path.resolve() in output.resolve().parents:
        raise OutputError(f"{output}: lies in the checkpoint {checkpoint.path}; choose another output")
    infos = {}
    for name in checkpoint.keys():
        entry = checkpoint.entry(name)
        infos[name] = TensorInfo(name, (dtype or entry.info.dtype) if entry.fmt else entry.info.dtype, entry.info.shape)
    identity = [str(checkpoint.path.resolve()), {n: i.dtype for n, i in infos.items()}]
    with Partial(output, hashlib.sha256(json.dumps(identity).encode()).hexdigest()) as partial:
        if not partial.finished:
            _write(checkpoint, infos, partial.folder, progress)
        partial.finish()
    return output


def _write(
    checkpoint: Checkpoint, infos: dict[str, TensorInfo], folder: Path, progress: Callable[[int, int], None]
) -> None:
    total, done = sum(info.nbytes for info in infos.values()), 0
    shards = layouts([info] for info in infos.values())
    for shard, layout in shards.items():
        path = folder / shard
        reserve(path, layout.header, layout.size)
        with path.open("rb+") as file:
            for name, stored in layout.stored.items():
                for start, stop in ranges(stored.info.shape):
                    values = _elements(checkpoint, name, stored.info, start, stop)
                    size = stored.info.nbytes // stored.info.numel
                    write_bytes(file.fileno(), tensor_bytes(values), stored.offset + start * size)
                    done += (stop - start) * size
                    progress(done, total)
    copy_other_files(checkpoint, folder)
    config: dict[str, Any] = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(json_text(index(shards)), encoding="utf-8")
    if config:
        (folder / "config.json").write_text(json_text(config), encoding="utf-8")


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what is neither weights nor describes this very checkpoint: tokenizer, licence, templates."""
    for path in checkpoint.path.rglob("*"):
        relative = path.relative_to(checkpoint.path)
        own = _is_card(path) or relative.name in (
            MANIFEST_NAME,
            LEGACY_CONFIG_NAME,
            EVALUATION_NAME,
            INDEX_NAME,
            "config.json",
        )
        if path.is_file() and not own and path.suffix != ".safetensors":
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)


def _elements(checkpoint: Checkpoint, name: str, info: TensorInfo, start: int, stop: int) -> Any:
    if checkpoint.format_of(name) is None:
        return checkpoint.elements(name, start, stop)
    width = info.shape[-1]
    values = checkpoint.dequantize_rows(name, start // width, stop // width).to(TORCH_DTYPES[info.dtype])
    if not bool(values.isfinite().all()):
        raise PlanError(
            f"{name}: its weights are not finite or too large for {info.dtype}; choose BF16 or F32, or verify it"
        )
    return values


def layouts(groups: Iterable[Sequence[TensorInfo]]) -> dict[str, ShardLayout]:
    """Shards by file name, of at most ``SHARD_BYTES`` unless one group, whose tensors stay together, is larger."""
    shards: list[list[TensorInfo]] = [[]]
    for group in groups:
        if shards[-1] and sum(info.nbytes for info in (*shards[-1], *group)) > SHARD_BYTES:
            shards.append([])
        shards[-1].extend(group)
    found = {}
    for number, members in enumerate(shards, 1):
        header, stored = build_header(members)
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        found[name] = ShardLayout(header, stored, file_size(stored, header))
    return found


def _is_card(path: Path) -> bool:
    """Whether it describes the quantized checkpoint, and so not a plain copy."""
    return path.name == "README.md" and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
