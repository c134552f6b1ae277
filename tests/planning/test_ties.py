"""Tensors that get one width together, and overrides that would part them."""

from __future__ import annotations

import pytest
from choices import choice

from kappaquant.errors import PlanError
from kappaquant.planning.plan import Choice
from kappaquant.planning.ties import check_overrides, tied


def test_sets_that_share_a_name_become_one() -> None:
    assert tied([("a", "b"), ("c",), ("d", "e")]) == [("a", "b"), ("c",), ("d", "e")]
    assert tied([("a", "b"), ("c", "d"), ("b", "c"), ("e",)]) == [("a", "b", "c", "d"), ("e",)]
    assert tied([]) == []


def test_overrides_of_all_or_none_keep_a_tie() -> None:
    check_overrides(("a", "b"), {}, ())
    check_overrides(("a", "b"), {"a": choice(4), "b": choice(4, 64)}, {"a", "b"})
    check_overrides(("a", "b"), {"a": choice(4), "b": choice(16)}, {"a"})  # b is kept by default
    check_overrides(("a", "b"), {"a": choice(16)}, ())


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"a": choice(4)}, r"^a: test to k4, which breaks a tie: it gets one width and kind with b \(no override\) and 1 more; override all"),
        ({"a": choice(4), "b": choice(5), "c": choice(4)}, r"^b: test to k5, .* with a \(k4\)"),
        ({"a": choice(4), "b": Choice("t4g128", "test"), "c": choice(4)}, r"^b: test to t4, .* with a \(k4\)"),
        ({"b": choice(16), "c": choice(16)}, r"^b: test to kept, .* with a \(no override\)"),
    ],
)  # fmt: skip
def test_others_break_it(fixed: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_overrides(("a", "b", "c"), fixed, set(fixed))  # type: ignore[arg-type]
