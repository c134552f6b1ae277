"""What an output shard looks like, byte by byte, computed from headers before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kappaquant.files.safetensors import Stored, TensorInfo, build_header, file_size
from kappaquant.sources.source import INDEX_NAME, SINGLE_NAME

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ShardLayout:
    """One output shard: its first bytes, where each stored tensor goes, and its total size in bytes."""

    header: bytes
    stored: dict[str, Stored]
    size: int

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo], framework: str = "pt") -> ShardLayout:
        """The layout of a shard that holds these tensors; ``framework`` says whose layouts they have."""
        header, stored = build_header(tensors, framework)
        return cls(header, stored, file_size(stored, header))


def dealt(groups: Iterable[Sequence[TensorInfo]], framework: str = "pt") -> dict[str, ShardLayout]:
    """Shards by file name, of at most ``SHARD_BYTES`` unless one group, whose tensors stay together, is larger."""
    shards: list[list[TensorInfo]] = [[]]
    for group in groups:
        if shards[-1] and sum(info.nbytes for info in (*shards[-1], *group)) > SHARD_BYTES:
            shards.append([])
        shards[-1].extend(group)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return {name: ShardLayout.of(members, framework) for name, members in zip(names, shards, strict=True)}


def index(shards: Mapping[str, ShardLayout]) -> dict[str, dict[str, Any]]:
    """The index over these shards by its file name; nothing where a reader needs none."""
    return {} if list(shards) == [SINGLE_NAME] else {INDEX_NAME: index_of(shards)}


def index_of(shards: Mapping[str, ShardLayout]) -> dict[str, Any]:
    """The content of an index over these shards."""
    stored = {name: shard for shard, layout in shards.items() for name in layout.stored}
    total = sum(s.info.nbytes for layout in shards.values() for s in layout.stored.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(stored.items()))}
