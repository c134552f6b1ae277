"""The signs of the rotation, as data. Standard library only; docs/format.md is normative."""

from __future__ import annotations

from functools import cache

from kappaquant.errors import PlanError

GROUP_SIZES = (32, 64, 128, 256)

# bit i of this little-endian stream is sign draw i: 1 is +1, 0 is -1. These are the first 512 draws of MT19937
# seeded with 42, one per 32-bit output, lowest bit; written out so that no framework's generator is needed.
_SIGN_BITS = int.from_bytes(
    bytes.fromhex(
        "2242d73f177cab01f6ba4affe75f6b6507d021a85ce6402438d201c5cbbf2514"
        "26ceab17e2897d893dd3ac5836c9bc75027bf31b7ea93e9a3e53a5aaab248ab4"
    ),
    "little",
)


def check_group_size(group_size: int) -> None:
    """Raise PlanError for a group that the rotation does not take."""
    if group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        raise PlanError(f"group size {group_size!r}: the Hadamard rotation needs a power of two, one of {allowed}")


@cache
def signs(group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rotation's two sign vectors (s1, s2), each of ``group_size`` entries +1 or -1."""
    check_group_size(group_size)
    draws = tuple(1 if _SIGN_BITS >> i & 1 else -1 for i in range(2 * group_size))
    return draws[:group_size], draws[group_size:]
