"""The files of an MLX folder before they are written: shards byte by byte, and MLX's table of formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kappaquant.checkpoints.layout import ShardLayout
from kappaquant.exports.mlx.layout import Tensor
from kappaquant.files.safetensors import build_header, file_size
from kappaquant.formats.codebook import TensorInfo
from kappaquant.planning.policies import KEPT

SHARD_BYTES = 5_000_000_000
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of safetensors, and what config.json calls them


def stored_tensors(tensor: Tensor) -> list[TensorInfo]:
    """What stands in a shard for one tensor."""
    if tensor.bits == KEPT:
        return [TensorInfo(tensor.key, tensor.dtype, tensor.shape)]
    lead, width = tensor.shape[:-1], tensor.shape[-1]
    per_group = (*lead, width // tensor.group_size)
    return [
        TensorInfo(tensor.key, "U32", (*lead, width * tensor.bits // 32)),
        TensorInfo(f"{tensor.path}.scales", tensor.dtype, per_group),
        TensorInfo(f"{tensor.path}.biases", tensor.dtype, per_group),
    ]


def shard_layouts(tensors: Iterable[Tensor]) -> dict[str, tuple[ShardLayout, list[Tensor]]]:
    """The output's shards, a tensor's parts together, in the order of the model."""
    shards: list[tuple[list[TensorInfo], list[Tensor]]] = [([], [])]
    for tensor in tensors:
        parts = stored_tensors(tensor)
        if shards[-1][0] and sum(i.nbytes for i in (*shards[-1][0], *parts)) > SHARD_BYTES:
            shards.append(([], []))
        shards[-1][0].extend(parts)
        shards[-1][1].append(tensor)
    layouts = {}
    for number, (infos, members) in enumerate(shards, 1):
        header, stored = build_header(infos, "mlx")
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layouts[name] = ShardLayout(header, stored, file_size(stored, header)), members
    return layouts


def quantization_table(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """MLX's ``quantization``: the most common format, and that of every quantized path; empty if there is none."""
    formats = {t.path: (t.group_size, t.bits) for t in tensors if t.key.endswith(".weight") and t.bits != KEPT}
    if not formats:
        return {}
    sizes: dict[tuple[int, int], int] = {}
    for fmt in formats.values():
        sizes[fmt] = sizes.get(fmt, 0) + 1
    group, bits = max(sizes, key=lambda fmt: (sizes[fmt], fmt))
    table: dict[str, Any] = {"group_size": group, "bits": bits, "mode": "affine"}
    for path, (size, width) in formats.items():
        table[path] = {"group_size": size, "bits": width, "mode": "affine"}
    return table
