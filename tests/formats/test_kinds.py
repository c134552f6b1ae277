"""Kinds of formats by letter, and which of them a width gets."""

from __future__ import annotations

import pytest

from kappaquant.errors import PlanError
from kappaquant.formats.kinds import KINDS, check_kinds, usual_kind
from kappaquant.formats.registry import formats
from kappaquant.formats.transposed import fitting_weight


def test_together_they_are_all_formats() -> None:
    made = {kind.make(bits, size) for kind in KINDS.values() for bits in kind.bits for size in (32, 64, 128, 256)}
    assert made == set(formats())


def test_a_width_gets_the_kind_of_least_error_that_has_it() -> None:
    assert [usual_kind(("k", "t"), bits) for bits in (2, 3, 4, 5, 8)] == ["t", "t", "t", "k", "k"]
    assert usual_kind(("k",), 3) == "k"
    with pytest.raises(PlanError, match=r"5 bits: formats t have none of that width; allow k too \(--formats\)"):
        usual_kind(("t",), 5)


def test_groups_suit_the_input_axis_as_those_of_codebooks_do() -> None:
    for shape, transposed in (((8, 192), False), ((8, 200), False), ((576, 8), True)):
        found = fitting_weight(3, shape, "auto", transposed, "t")
        assert found.id == fitting_weight(3, shape, "auto", transposed).id.replace("tq", "t")


@pytest.mark.parametrize(("given", "found"), [(["k"], ("k",)), (["t", "k"], ("k", "t")), (["t", "t"], ("t",))])
def test_letters(given: list[str], found: tuple[str, ...]) -> None:
    assert check_kinds(given) == found


@pytest.mark.parametrize("given", [[], [""], ["k", "x"], ["kt"]])
def test_other_letters_are_refused(given: list[str]) -> None:
    with pytest.raises(
        PlanError, match=r"must be letters separated by commas, of k \(codebooks\), t \(trellis codes\)"
    ):
        check_kinds(given)
