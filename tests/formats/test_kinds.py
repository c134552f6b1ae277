"""Kinds of formats by letter, and which of them a width gets."""

from __future__ import annotations

import pytest

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.kinds import KINDS, check_kinds, kind_and_bits, name_of, usual_kind
from kappaquant.formats.registry import formats
from kappaquant.formats.transposed import Transposed, fitting_weight


def test_together_they_are_all_formats() -> None:
    made = {kind.make(bits, size) for kind in KINDS.values() for bits in kind.bits for size in (32, 64, 128, 256)}
    assert made == set(formats())


def test_a_width_gets_the_kind_of_least_error_that_has_it() -> None:
    assert [usual_kind(("k", "t"), bits, "w") for bits in (2, 3, 4, 5, 8)] == ["t", "t", "t", "k", "k"]
    assert usual_kind(("k",), 3, "w") == "k"
    with pytest.raises(PlanError, match=r"w: formats t have no width of 5 bits; allow k too \(--formats\)"):
        usual_kind(("t",), 5, "w")


def test_groups_suit_the_input_axis_as_those_of_codebooks_do() -> None:
    for shape, transposed in (((8, 192), False), ((8, 200), False), ((576, 8), True)):
        found = fitting_weight(3, shape, "auto", transposed, "t")
        assert found.id == fitting_weight(3, shape, "auto", transposed).id.replace("tq", "t")


@pytest.mark.parametrize(("given", "found"), [(["k"], ("k",)), (["t", "k"], ("k", "t")), (["t", "t"], ("t",))])
def test_letters(given: list[str], found: tuple[str, ...]) -> None:
    assert check_kinds(given) == found


@pytest.mark.parametrize("given", [[], [""], [["t"]], [3], ["k", "x"], ["kt"]])
def test_other_letters_are_refused(given: list[str]) -> None:
    with pytest.raises(
        PlanError, match=r"must be letters separated by commas, of k \(codebooks\), t \(trellis codes\)"
    ):
        check_kinds(given)


def test_names_say_kind_and_bits() -> None:
    for fmt in formats():
        letter, bits = kind_and_bits(name_of(fmt), "test") or ("", 0)
        assert KINDS[letter].make(bits, 64).bits == fmt.bits
        assert fmt.id.startswith(f"{KINDS[letter].prefix}{bits}g")
        assert name_of(Transposed(fmt)) == name_of(fmt)
    assert [name_of(CodebookFormat(3, 64, norms="F32")), name_of(KINDS["t"].make(3, 32))] == ["k3", "t3"]
    assert [kind_and_bits(text, "test") for text in ("t3g64", "tq3", "3", "x3", "T3", "")] == [None] * 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "here: trellis codes have no width of 5 bits; there are t2, t3, t4"),
        ("k9", "here: codebooks have no width of 9 bits"),
    ],
)
def test_widths_that_a_kind_lacks_are_refused(name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        kind_and_bits(name, "here")
