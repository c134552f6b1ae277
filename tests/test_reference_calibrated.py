"""The reference model calibrated: what it is calibrated on is not what is measured, and the result has every row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kappaquant
from benchmarks import readme
from benchmarks.reference_calibrated import BITS, FEWER, TOKENS, Texts
from benchmarks.reference_table import MODEL
from kappaquant.engines.transformers.original import load_tokenizer
from kappaquant.runtime import writing
from reference.split import split_of
from scripts import demo


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    source = kappaquant.open_source(MODEL)
    return Texts(source, SimpleNamespace(model=None, tokenizer=load_tokenizer(source)), tmp_path)  # type: ignore[arg-type]


def test_text_of_the_training_kind_is_none_that_is_measured(texts: Texts, tmp_path: Path) -> None:
    made = texts.of_the_kind(2048, 0)
    assert made.windows.numel() == 2048
    stories = (tmp_path / "training split.txt").read_text(encoding="utf-8").split("<|endoftext|>")[:-1]
    assert len(stories) > 40
    for story in stories:
        prompt, asked, _ = story.partition("Answer:")
        assert split_of(prompt + asked if asked else story) == "train"


def test_a_draw_is_written_once_and_says_its_seed(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def write(model: Any, tokenizer: Any, wanted: int, rules: Any) -> list[str]:
        asked.append((wanted, rules.seed))
        return ["Nora has 3 plums. "] * 4096

    monkeypatch.setattr("benchmarks.reference_calibrated.write", write)
    first, longer, other = texts.own(FEWER, 0), texts.own(TOKENS, 0), texts.own(FEWER, 1)
    assert asked == [(TOKENS, 0), (TOKENS, 1)]
    assert [c.windows.numel() for c in (first, longer, other)] == [FEWER, TOKENS, FEWER]
    assert writing.TOKENS == TOKENS
    assert demo.TOKENS == FEWER


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return readme.result("reference_calibrated")


def test_result_has_every_row(measured: dict[str, Any]) -> None:
    for key in ("device", "cpu", "cores", "python", "torch", "transformers", "kappaquant", "commit"):
        assert measured["environment"][key], key
    rows = {(r["bits"], r["text"], r["tokens"], r["draw"]) for r in measured["rows"]}
    assert len(rows) == len(measured["rows"])
    assert {row[0] for row in rows} == set(BITS)
    for bits in BITS:
        assert {row[1:] for row in rows if row[0] == bits} == {
            ("none", 0, 0), ("of the training kind", TOKENS, 0),
            *(("its own", tokens, draw) for tokens in (FEWER, TOKENS) for draw in range(3)),
        }  # fmt: skip
        assert len({row["bytes"] for row in measured["rows"] if row["bits"] == bits}) == 1


def test_rows_without_text_are_those_of_the_other_table(measured: dict[str, Any]) -> None:
    table = {row["name"]: row for row in readme.result("reference_table")["rows"]}
    (row,) = (row for row in measured["rows"] if (row["bits"], row["text"]) == (3, "none"))
    assert row["bytes"] == table["uniform 3"]["bytes"]
    assert row["kld_nats"]["mean"] == pytest.approx(table["uniform 3"]["kld_nats"]["mean"], rel=0.01)


def test_its_block_is_a_table_of_one_width() -> None:
    table = [line for line in readme.reference_calibrated().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 * len(BITS)
    assert len({line.count("|") for line in table}) == 1
