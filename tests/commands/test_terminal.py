"""What commands print: JSON untouched, tables in full width where nobody's terminal is narrow, text as it comes."""

from __future__ import annotations

import pytest
from rich.table import Table

from kappaquant.commands.terminal import console, emit, errors, progress, show


def test_json_ends_with_one_line_break(capsys: pytest.CaptureFixture[str]) -> None:
    show('{"long": "' + "x" * 300 + '"}', as_json=True)
    show("{}\n", as_json=True)
    assert capsys.readouterr().out == '{"long": "' + "x" * 300 + '"}\n{}\n'


def test_tables_are_not_squeezed_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("a" * 60, "b" * 60)
    table.add_row("c" * 60, "d" * 60)
    show(table, as_json=False)
    assert "a" * 60 in capsys.readouterr().out
    assert console().width == 140


def test_pieces_are_printed_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def pieces():  # type: ignore[no-untyped-def]
        yield "one "
        seen.append(capsys.readouterr().out)
        yield "two"

    assert emit(pieces()) == "one two"
    assert seen == ["one "]
    assert capsys.readouterr().out == "two\n"


def test_errors_and_progress_stay_out_of_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    errors().print("wrong")
    with progress("working", "tensors") as report:
        report("working", 1, 2)
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "wrong" in caught.err
