"""Lists of numbers in an option, as --thresholds and --ladder take them."""

from __future__ import annotations

import pytest

from kappaquant.commands.options import numbers
from kappaquant.errors import PlanError


def test_numbers() -> None:
    assert numbers("0.5, 2,,8", float, "--thresholds") == [0.5, 2.0, 8.0]
    assert numbers("2,3,4", int, "--ladder") == [2, 3, 4]
    assert numbers("", int, "--ladder") == []


@pytest.mark.parametrize(("text", "kind"), [("2,x", int), ("2.5", int), ("4;5", float)])
def test_what_is_no_number_names_the_option(text: str, kind: type) -> None:
    with pytest.raises(PlanError, match=f"--ladder '{text}': must be numbers separated by commas"):
        numbers(text, kind, "--ladder")
