"""What an output checkpoint looks like, byte by byte, computed from headers and the plan before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from kappaquant.errors import PlanError
from kappaquant.files.safetensors import Stored, build_header, file_size
from kappaquant.formats.codebook import LEGACY_FORMAT, NORMS_SUFFIX, PACKED_SUFFIX, Format, TensorInfo

Target = Literal["kappaquant", "tq3_native"]
TARGETS: tuple[Target, ...] = ("kappaquant", "tq3_native")


@dataclass(frozen=True)
class ShardLayout:
    """One output shard: its first bytes, where each stored tensor goes, and its total size in bytes."""

    header: bytes
    stored: dict[str, Stored]
    size: int


def check_target(target: str) -> None:
    if target not in TARGETS:
        raise PlanError(f"format {target!r}: must be one of {', '.join(TARGETS)}")


def stored_tensors(info: TensorInfo, fmt: Format | None, target: Target) -> list[TensorInfo]:
    """The tensors that stand in an output shard for one source tensor; ``fmt`` is None where it is kept."""
    if fmt is None:
        legacy_float = target == LEGACY_FORMAT and info.dtype in ("BF16", "F32", "F64")
        return [TensorInfo(info.name, "F16" if legacy_float else info.dtype, info.shape)]
    packed, norms = fmt.packed_shape(info.shape), fmt.norms_shape(info.shape)
    if target == LEGACY_FORMAT:
        rows, groups = info.numel // info.shape[-1], norms[-1]
        # up to 4 bits are packed; wider codes take a byte each
        width = fmt.bytes_per_group if fmt.bits <= 4 else fmt.group_size
        packed, norms = (rows * groups, width), (rows, groups)
    return [
        TensorInfo(info.name + PACKED_SUFFIX, "U8", packed),
        TensorInfo(info.name + NORMS_SUFFIX, "F32" if target == LEGACY_FORMAT else "F16", norms),
    ]


def stored_names(name: str) -> tuple[str, str, str]:
    """Names under which a parameter can stand in a shard: kept, packed, norms."""
    return name, name + PACKED_SUFFIX, name + NORMS_SUFFIX


def shard_layout(
    tensors: Mapping[str, TensorInfo], formats: Mapping[str, Format | None], target: Target
) -> ShardLayout:
    """Layout of the output shard that takes these source tensors."""
    header, stored = build_header(
        piece for name, info in tensors.items() for piece in stored_tensors(info, formats[name], target)
    )
    return ShardLayout(header, stored, file_size(stored, header))


def output_bytes(
    shards: Mapping[str, Mapping[str, TensorInfo]],
    format_of: Callable[[str], Format | None],
    target: Target = "kappaquant",
) -> int:
    """Exact bytes of all output shards, headers included, from the source's headers and the plan alone."""
    return sum(shard_layout(t, {name: format_of(name) for name in t}, target).size for t in shards.values())
