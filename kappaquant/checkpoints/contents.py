"""What a checkpoint holds, by family: the grouping that tables, plots and cards share."""

from __future__ import annotations

from collections.abc import Iterable

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.models.roles import kinds_of
from kappaquant.planning.plan import KEPT
from kappaquant.planning.sizes import Total


def families(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Family -> its parameters; the family of most bytes first."""
    found: dict[str, list[str]] = {}
    for name, kind in kinds_of(checkpoint.tensors, checkpoint.config).items():
        found.setdefault(kind.family, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -total(checkpoint, item[1]).output_bytes))


def widths(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """How some parameters are stored, by ascending bits: the bits of a codebook's codes, the id of any other format, or "kept"."""
    found = set()
    for name in names:
        fmt, bits = checkpoint.format_of(name), checkpoint.bits(name)
        codebook = fmt is not None and isinstance(fmt.rowwise, CodebookFormat)
        found.add((bits, KEPT if fmt is None else str(bits) if codebook else fmt.id))
    return [label for _, label in sorted(found)]


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
