"""The files of an MLX folder before they are written: shards byte by byte, and MLX's table of formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kappaquant.checkpoints.layout import ShardLayout, dealt
from kappaquant.exports.mlx.layout import Tensor
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import KEPT_BITS

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of safetensors, and what config.json calls them


def stored_tensors(tensor: Tensor) -> list[TensorInfo]:
    """What stands in a shard for one tensor."""
    if tensor.bits == KEPT_BITS:
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
    members = list(tensors)
    shards = dealt([stored_tensors(tensor) for tensor in members], "mlx")
    return {
        name: (layout, [tensor for tensor in members if tensor.key in layout.stored]) for name, layout in shards.items()
    }


def quantization_table(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """MLX's ``quantization``: the most common format, and that of every quantized path; empty if there is none."""
    formats = {t.path: (t.group_size, t.bits) for t in tensors if t.key.endswith(".weight") and t.bits != KEPT_BITS}
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
