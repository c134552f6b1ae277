"""JSON read as dataclasses: what fits comes back typed, what does not is named by file and place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest

from kappaquant.errors import FormatError
from kappaquant.evaluate.documents.checked import read_as


@dataclass(frozen=True)
class Inner:
    name: str
    mean: float | None


@dataclass(frozen=True)
class Outer:
    count: int
    exact: bool
    pair: tuple[int, float]
    rows: tuple[Inner, ...]
    words: list[str]
    table: dict[str, Any]


VALUE: dict[str, Any] = {
    "count": 3,
    "exact": True,
    "pair": [1, 2],
    "rows": [{"name": "a", "mean": 1}, {"name": "b", "mean": None}],
    "words": ["x"],
    "table": {"anything": [1]},
}


def test_what_fits() -> None:
    found = read_as(VALUE, Outer, "f.json")
    assert found == Outer(3, True, (1, 2.0), (Inner("a", 1.0), Inner("b", None)), ["x"], {"anything": [1]})
    assert type(found.pair[1]) is type(found.rows[0].mean) is float
    assert read_as(asdict(found) | {"pair": [1, 2.0], "rows": VALUE["rows"]}, Outer, "f.json") == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 3.0}, r"f\.json: count is 3\.0; expected a whole number"),
        ({"count": True}, "count is True; expected a whole number"),
        ({"exact": 1}, "exact is 1; expected true or false"),
        ({"pair": [1]}, r"pair is \[1\]; expected a list of 2"),
        ({"pair": [1, "x"]}, r"pair\[1\] is 'x'; expected a finite number"),
        ({"pair": [1, float("nan")]}, r"pair\[1\] is nan; expected a finite number"),
        ({"rows": {}}, r"rows is \{\}; expected a list"),
        ({"rows": [3]}, r"rows\[0\] is 3; expected an object"),
        ({"rows": [{"name": "a"}]}, r"has no rows\[0\]\.mean; measure again"),
        ({"rows": [{"name": 1, "mean": 2}]}, r"rows\[0\]\.name is 1; expected a string"),
        ({"words": "x"}, "words is 'x'; expected a list"),
        ({"table": []}, r"table is \[\]; expected an object"),
        ({"more": 1}, "more is not known; allowed there: count, exact, pair, rows, words, table"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_as(VALUE | change, Outer, "f.json")
