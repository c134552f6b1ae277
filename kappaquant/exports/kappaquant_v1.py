"""Re-label a tq3_native checkpoint as kappaquant v1: the same codes under names, shapes and a map that serving engines take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.manifest import config_digest, index, json_text, quantization_config
from kappaquant.errors import FormatError, OutputError, PlanError, UnsupportedError
from kappaquant.exports.plain import copy_other_files, layouts
from kappaquant.files.safetensors import write_bytes
from kappaquant.files.tensors import TORCH_DTYPES
from kappaquant.files.unfinished import Partial, reserve
from kappaquant.formats.codebook import (
    BITS,
    FORMAT_VERSION,
    LEGACY_FORMAT,
    MANIFEST_NAME,
    NORMS_SUFFIX,
    PACKED_SUFFIX,
    Format,
    TensorInfo,
    format_by_id,
)
from kappaquant.kernels.tiled import norms_refusal
from kappaquant.planning.plan import Choice, Plan
from kappaquant.quantizing.slices import hash_stored, tensor_bytes
from kappaquant.sources.folder import INDEX_NAME
from kappaquant.version import __version__

NORMS = ("F32", "F16")


def convert(
    checkpoint: Checkpoint,
    output: str | Path,
    norms: str = "F32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a tq3_native checkpoint as a v1 folder of the same codes, codebooks and kept tensors.

    Args:
        norms: "F32" keeps every norm bit for bit; "F16" rounds them, which saves 2 bytes a group.
        progress: called with the output bytes written and in all.

    Raises:
        FormatError: the checkpoint is not tq3_native, or has no config.json.
        UnsupportedError: it has 1-bit codes, which v1 does not.
        PlanError: ``norms`` is neither, or a norm does not fit F16.
        OutputError: ``output`` is not empty, lies in the checkpoint, or does not fit the disk.
    """
    if norms not in NORMS:
        raise PlanError(f"norms {norms!r}: must be one of {', '.join(NORMS)}")
    if checkpoint.format != LEGACY_FORMAT:
        raise FormatError(f"{checkpoint.path}: is {checkpoint.format} already; only {LEGACY_FORMAT} needs converting")
    if not checkpoint.config:
        raise FormatError(f"{checkpoint.path}: has no config.json; copy the original model's there")
    for name in checkpoint.keys():
        if checkpoint.bits(name) not in (*BITS, 16):
            raise UnsupportedError(f"{name}: has {checkpoint.bits(name)}-bit codes; v1 has 2 to 8 bits; dequantize it")
    output = Path(output).absolute()
    if output.resolve() == checkpoint.path.resolve() or checkpoint.path.resolve() in output.resolve().parents:
        raise OutputError(f"{output}: lies in the checkpoint {checkpoint.path}; choose another output")
    identity = [str(checkpoint.path.resolve()), norms, __version__]
    with Partial(output, hashlib.sha256(json.dumps(identity).encode()).hexdigest()) as partial:
        if not partial.finished:
            _write(checkpoint, partial.folder, norms, progress)
        partial.finish()
    return output


def _write(checkpoint: Checkpoint, folder: Path, norms: str, progress: Callable[[int, int], None]) -> None:
    shards = layouts(_stored(checkpoint, name, norms) for name in checkpoint.keys())
    files = {name: (folder / shard, at) for shard, layout in shards.items() for name, at in layout.stored.items()}
    total, done = sum(at.info.nbytes for _, at in files.values()), 0
    for shard, layout in shards.items():
        reserve(folder / shard, layout.header, layout.size)
    for name in checkpoint.keys():
        for key, values in _tensors(checkpoint, name, norms):
            path, at = files[key]
            with path.open("rb+") as file:
                write_bytes(file.fileno(), tensor_bytes(values), at.offset)
            done += at.info.nbytes
            progress(done, total)
    copy_other_files(checkpoint, folder)
    tensors = {name: checkpoint.entry(name).info for name in checkpoint.keys()}
    plan = _plan(checkpoint, norms)
    quantization = quantization_config(tensors, plan)
    quantization["codebooks"] = {key: _codebook(checkpoint, plan, key) for key in quantization["codebooks"]}
    if norms != "F16":
        quantization["norms"] = norms
    manifest = {
        "kappaquant_version": __version__,
        "format_version": FORMAT_VERSION,
        "source": {"model": checkpoint.path.name, "revision": None},
        "effort": LEGACY_FORMAT,
        "plan": json.loads(plan.to_json()),
        "quantization_config_sha256": config_digest(quantization),
        "tensors": {
            name: {"shape": list(info.shape), "dtype": info.dtype, "bits": plan.bits(name)}
            for name, info in sorted(tensors.items())
        },
        "sha256": {name: hash_stored(path, at) for name, (path, at) in sorted(files.items())},
    }
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(json_text(index(shards)), encoding="utf-8")
    config = {**checkpoint.config, "quantization_config": quantization}
    (folder / "config.json").write_text(json_text(config), encoding="utf-8")
    (folder / MANIFEST_NAME).write_text(json_text(manifest), encoding="utf-8")


def _stored(checkpoint: Checkpoint, name: str, norms: str) -> list[TensorInfo]:
    """The tensors that hold one parameter in a v1 shard."""
    entry = checkpoint.entry(name)
    if entry.fmt is None:
        return [entry.info]
    shape = entry.info.shape
    return [
        TensorInfo(name + PACKED_SUFFIX, "U8", entry.fmt.packed_shape(shape)),
        TensorInfo(name + NORMS_SUFFIX, norms, entry.fmt.norms_shape(shape)),
    ]


def _tensors(checkpoint: Checkpoint, name: str, norms: str) -> Iterator[tuple[str, torch.Tensor]]:
    if checkpoint.format_of(name) is None:
        yield name, checkpoint.tensor(name)
        return
    yield name + PACKED_SUFFIX, checkpoint.packed(name)
    values = checkpoint.norms(name)
    if norms == "F16" and (reason := norms_refusal(values)):
        raise PlanError(f"{name}{NORMS_SUFFIX}: {reason}; keep them as they are (--norms f32)")
    yield name + NORMS_SUFFIX, values.to(TORCH_DTYPES[norms])


def _plan(checkpoint: Checkpoint, norms: str) -> Plan:
    """The bits that the checkpoint has, as a plan."""
    formats: list[Format] = [fmt for name in checkpoint.keys() if (fmt := checkpoint.format_of(name))]
    group_size = formats[0].group_size if formats else 128
    why = f"as in {LEGACY_FORMAT}"
    choices = {name: Choice(checkpoint.bits(name), why) for name in checkpoint.keys()}
    return Plan(choices, group_size, "converted", {"format": LEGACY_FORMAT, "norms": norms})


def _codebook(checkpoint: Checkpoint, plan: Plan, format_id: str) -> list[float]:
    """The published centroids, which are not this version's own."""
    fmt = format_by_id(format_id, format_id)
    name = next(name for name in checkpoint.keys() if plan.format_of(name) == fmt)
    return list(checkpoint.codebook(name))
