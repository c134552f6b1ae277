"""Kinds of codes that planning chooses from, by letter: a width and a group size make a format; "t3" is a kind and a width. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kappaquant.errors import PlanError
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat


@dataclass(frozen=True)
class Kind:
    """Formats that differ in bits and group size.

    Attributes:
        name: what messages call them.
        prefix: what their ids begin with, before the bits.
        bits: the widths there are.
        make: the format of a width and a group size.
    """

    name: str
    prefix: str
    bits: Sequence[int]
    make: type[CodebookFormat] | type[TrellisFormat]


CODEBOOK, TRELLIS_CODE = "k", "t"
KINDS: Mapping[str, Kind] = {
    CODEBOOK: Kind("codebooks", "tq", BITS, CodebookFormat),
    TRELLIS_CODE: Kind("trellis codes", "t", TRELLIS_BITS, TrellisFormat),
}
"""In alphabetical order, and of two that have a width the one of less error last."""
USUAL = (CODEBOOK,)
"""What plans choose from unless they are told to, or go by evidence that holds more."""


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The letters, each once and in the order of ``KINDS``. Raises PlanError for none, or for one that there is not."""
    given = list(kinds)
    if not given or any(kind not in tuple(KINDS) for kind in given):
        known = ", ".join(f"{letter} ({kind.name})" for letter, kind in KINDS.items())
        raise PlanError(f"formats {','.join(map(str, given))!r}: must be letters separated by commas, of {known}")
    return tuple(kind for kind in KINDS if kind in given)


def usual_kind(kinds: Sequence[str], bits: int, where: str) -> str:
    """The one of least error that has a width. Raises PlanError where none has; ``where`` opens the message."""
    found = [kind for kind in kinds if bits in KINDS[kind].bits]
    if not found:
        others = " and ".join(kind for kind in KINDS if bits in KINDS[kind].bits)
        raise PlanError(
            f"{where}: formats {','.join(kinds)} have no width of {bits} bits; allow {others} too (--formats)"
        )
    return found[-1]  # they stand in the order of ``KINDS``


def kind_and_bits(name: str, where: str) -> tuple[str, int] | None:
    """The kind and the width that a name such as "t3" says; None for what names none.

    Raises:
        PlanError: a width that the kind does not have; ``where`` opens the message.
    """
    found = re.fullmatch(r"([a-z])(\d+)", name)
    if not found or found[1] not in KINDS:
        return None
    letter, bits = found[1], int(found[2])
    kind = KINDS[letter]
    if bits not in kind.bits:
        names = ", ".join(f"{letter}{width}" for width in kind.bits)
        raise PlanError(f"{where}: {kind.name} have no width of {bits} bits; there are {names}")
    return letter, bits


def name_of(fmt: Format) -> str:
    """ "t3" for a trellis code of 3 bits in whatever groups; the id of a format that is of no kind."""
    held = fmt.rowwise
    letter = next((letter for letter, kind in KINDS.items() if isinstance(held, kind.make)), None)
    return fmt.id if letter is None else f"{letter}{fmt.bits}"
