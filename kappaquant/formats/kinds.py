"""Kinds of codes that planning chooses from, by letter: a width and a group size make a format. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat


@dataclass(frozen=True)
class Kind:
    """Formats that differ in bits and group size.

    Attributes:
        name: what messages call them.
        bits: the widths there are.
        make: the format of a width and a group size.
    """

    name: str
    bits: Sequence[int]
    make: Callable[[int, int], GroupedFormat]


CODEBOOK, TRELLIS_CODE = "k", "t"
KINDS: Mapping[str, Kind] = {
    CODEBOOK: Kind("codebooks", BITS, CodebookFormat),
    TRELLIS_CODE: Kind("trellis codes", TRELLIS_BITS, TrellisFormat),
}
USUAL = (CODEBOOK,)
"""What plans choose from unless they are told to."""


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The letters, each once and in the order of ``KINDS``. Raises PlanError for none, or for one that there is not."""
    given = list(kinds)
    if not given or any(kind not in KINDS for kind in given):
        known = ", ".join(f"{letter} ({kind.name})" for letter, kind in KINDS.items())
        raise PlanError(f"formats {','.join(given)!r}: must be letters separated by commas, of {known}")
    return tuple(kind for kind in KINDS if kind in given)


def kinds_of_width(kinds: Iterable[str], bits: int) -> list[str]:
    """Those that have a width, the one of least error last."""
    return [kind for kind in kinds if bits in KINDS[kind].bits]


def usual_kind(kinds: Sequence[str], bits: int) -> str:
    """The one of least error that has a width. Raises PlanError where none has."""
    found = kinds_of_width(kinds, bits)
    if not found:
        others = " and ".join(kind for kind in KINDS if bits in KINDS[kind].bits)
        raise PlanError(
            f"{bits} bits: formats {','.join(kinds)} have none of that width; allow {others} too (--formats)"
        )
    return found[-1]
