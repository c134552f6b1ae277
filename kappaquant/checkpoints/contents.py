"""What a checkpoint holds, by family: the grouping that tables, plots and cards share."""

from __future__ import annotations

from collections.abc import Iterable

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.models.roles import kinds_of
from kappaquant.planning.sizes import Total


def families(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Family -> its parameters; the family of most bytes first."""
    found: dict[str, list[str]] = {}
    for name, kind in kinds_of(checkpoint.tensors, checkpoint.config).items():
        found.setdefault(kind.family, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -total(checkpoint, item[1]).output_bytes))


def widths(checkpoint: Checkpoint, names: Iterable[str]) -> list[int]:
    """Bits that some parameters have, ascending; 16 stands for kept."""
    return sorted({checkpoint.bits(name) for name in names})


def total(checkpoint: Checkpoint, names: Iterable[str]) -> Total:
    """Sums over some parameters; what a token reads is not counted."""
    names = list(names)
    return Total(
        tensors=len(names),
        params=sum(checkpoint.entry(n).info.numel for n in names),
        source_bytes=sum(checkpoint.entry(n).info.nbytes for n in names),
        output_bytes=sum(checkpoint.nbytes(n) for n in names),
        active_params=0,
        active_bytes=0,
    )
