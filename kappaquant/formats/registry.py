"""Formats by id: those of this package, and any that is registered. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kappaquant.errors import FormatError, RegistrationError
from kappaquant.files.safetensors import DTYPE_BYTES
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import FORMATS
from kappaquant.formats.transposed import MARK, Transposed
from kappaquant.formats.trellis import TRELLIS_FORMATS

_FORMATS: dict[str, Format] = {**FORMATS, **TRELLIS_FORMATS}
_OTHER_WORDS = ("kept", *DTYPE_BYTES)  # stand in plans and checkpoints where an id could


def register(fmt: Format) -> None:
    """Let plans and checkpoints name a format by its id, in this process.

    Raises:
        RegistrationError: no id that plans can tell from bits and dtypes, bits out of range, or the id is another format's.
    """
    format_id, bits = getattr(fmt, "id", None), getattr(fmt, "bits", None)
    if not isinstance(format_id, str) or not re.fullmatch(r"[A-Za-z][\w.+-]*", format_id) or format_id in _OTHER_WORDS:
        raise RegistrationError(
            f"format id {format_id!r}: must be a word that begins with a letter, and none of {', '.join(_OTHER_WORDS)}"
        )
    if not isinstance(bits, int) or not 1 <= bits <= 15:
        raise RegistrationError(f"format {format_id!r}: has {bits!r} bits; a code has 1 to 15")
    held = _FORMATS.setdefault(fmt.id, fmt)
    if held != fmt:
        raise RegistrationError(f"format id {fmt.id!r} is taken by {held}; give {fmt} another id")


def unregister(format_id: str) -> None:
    """Take a registered format back."""
    del _FORMATS[format_id]


def formats() -> tuple[Format, ...]:
    """All that are registered, those of this package first."""
    return tuple(_FORMATS.values())


def suffixes() -> Iterator[str]:
    """What the stored names of any format's parts end in, each once."""
    yield from dict.fromkeys(suffix for fmt in formats() for suffix in fmt.parts((256, 256)))


def format_by_id(format_id: str, tensor: str) -> Format:
    """The format of an id read from a plan or checkpoint; ``tensor`` is named when there is none. Raises FormatError."""
    if format_id in _FORMATS:
        return _FORMATS[format_id]
    rowwise = _FORMATS.get(format_id.removesuffix(MARK))
    if rowwise is None:
        raise FormatError(
            f"{tensor}: unknown format id {format_id!r}; this version reads {', '.join(_FORMATS)}, and with {MARK!r} behind it each "
            "of them for a transposed weight"
        )
    return Transposed(rowwise)
