"""Evaluations side by side: what is refused, who is on the front, the table and both pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from builders import quantize, write_source
from evaluations import evaluation, task_report
from typer.testing import CliRunner

from kappaquant import open_source
from kappaquant.cli import app
from kappaquant.commands.plots import bits_map, pareto
from kappaquant.errors import FormatError, OutputError, UnsupportedError
from kappaquant.evaluate.documents.compare import compare
from kappaquant.evaluate.runs.pair import source_facts

PNG = b"\x89PNG"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_front_and_order() -> None:
    sizes = {"a": (10, 0.1), "b": (20, 0.01), "c": (20, 0.02), "d": (30, 0.01), "e": (40, 0.001), "twin": (10, 0.1)}
    found = compare({name: evaluation(nbytes, mean) for name, (nbytes, mean) in sizes.items()})
    assert [row.name for row in found.rows] == ["e", "d", "b", "c", "a", "twin"]
    assert {row.name for row in found.rows if row.pareto} == {"a", "twin", "b", "e"}
    assert found.noise_floor == 0.0000213
    assert found.original_perplexity.value == 1.78211


def test_what_plans_predicted_is_held_against_what_was_measured(tmp_path: Path) -> None:
    made = {
        "a": (10, 0.1, 0.2),
        "b": (20, 0.02, 0.03),
        "c": (30, 0.01, 0.04),
        "d": (40, 0.001, 0.002),
        "e": (50, 0.5, None),
    }
    for name, (nbytes, mean, predicted) in made.items():
        found = evaluation(nbytes, mean)
        replace(found, checkpoint=replace(found.checkpoint, predicted_kld=predicted)).save(tmp_path / f"{name}.json")
    printed = run("compare", *(tmp_path / f"{name}.json" for name in made))
    assert "predicted" in printed
    assert "rank correlation of predicted and measured KLD: 0.800" in printed  # c and b the other way round
    found = json.loads(run("compare", "--json", tmp_path / "a.json", tmp_path / "b.json"))
    assert found["rank_correlation"] is None
    assert {row["name"][-6:]: row["predicted"] for row in found["rows"]} == {"a.json": 0.2, "b.json": 0.03}


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("source", "config_sha256", "0" * 64),
        ("source", "headers_sha256", "0" * 64),
        ("source", "samples_sha256", "0" * 64),
        ("text", "sha256", "0" * 64),
        ("text", "tokens", 99),
        ("settings", "window", 128),
        ("settings", "dtype", "auto"),
        ("settings", "begin", ("<s>",)),
        ("settings", "begin", None),
    ],
)
def test_unlike_evaluations_are_refused_by_name(part: str, field: str, value: object) -> None:
    first = evaluation()
    second = replace(first, **{part: replace(getattr(first, part), **{field: value})})
    with pytest.raises(UnsupportedError, match=rf"^second: {part}\.{field} is .*, but of first it is"):
        compare({"first": first, "second": second})


def test_tasks_side_by_side_and_in_pairs(tmp_path: Path) -> None:
    small = evaluation(3_000_000, tasks=(task_report("gsm8k", "110000", "111111"), task_report("mmlu", "11", "11")))
    large = evaluation(4_000_000, tasks=(task_report("gsm8k", "111111", "111111"),))
    found = compare({"small": small, "large": large, "untested": evaluation()})
    assert list(found.original_tasks) == ["gsm8k, exact_match, strict-match", "mmlu, exact_match, strict-match"]
    assert found.original_tasks["gsm8k, exact_match, strict-match"].value == 1
    shares = {row.name: row.tasks for row in found.rows}
    assert shares["small"]["gsm8k, exact_match, strict-match"].value == pytest.approx(1 / 3)
    assert shares["untested"] == {}
    (pair,) = found.pairs
    assert (pair.first, pair.second, pair.difference.value, pair.p_value) == (
        "small",
        "large",
        pytest.approx(-2 / 3),
        0.125,
    )
    assert not pair.significant
    for name, report in (("small", small), ("large", large)):
        report.save(tmp_path / f"{name}.json")
    shown = run("compare", tmp_path / "small.json", tmp_path / "large.json")
    assert "-66.67 points" in shown
    assert "not significant" in shown
    other = replace(large, tasks=(task_report("gsm8k", prompts_sha256="b" * 64, questions=6),))
    with pytest.raises(UnsupportedError, match=r"other: task gsm8k: prompts_sha256 is .* but of small it is"):
        compare({"small": small, "other": other})


def test_another_original_is_refused_by_name(tmp_path: Path) -> None:
    facts = source_facts(open_source(write_source(tmp_path / "tiny")))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"mine: was measured against original, which is not .*tiny"):
        compare({"mine": evaluation()}, facts)
    compare({"mine": evaluation(source=facts)}, facts)


def test_nothing_to_compare() -> None:
    with pytest.raises(UnsupportedError, match="kappaquant evaluate"):
        compare({})
    with pytest.raises(FormatError, match="kappaquant evaluate"):
        CliRunner().invoke(app, ["compare", "absent"], catch_exceptions=False)


def test_the_command(tmp_path: Path) -> None:
    source = write_source(tmp_path / "tiny")
    facts = source_facts(open_source(source))  # type: ignore[arg-type]
    (tmp_path / "small").mkdir()
    evaluation(3_000_000, 0.02, (0.018, 0.022), source=facts).save(tmp_path / "small" / "evaluation.json")
    evaluation(4_000_000, 0.002, None, source=facts).save(tmp_path / "large.json")
    picture = tmp_path / "pareto.png"
    arguments = ("compare", tmp_path / "small", tmp_path / "large.json", "--against", source, "--plot", picture)
    shown = run(*arguments)
    for expected in ("3.0 MB", "5.613", "0.02 [0.018, 0.022]", "98.77% [98.10%, 99.20%]", "1.7832 [1.7500, 1.8200]"):
        assert expected in shown
    assert "1,234 predicted tokens of held-out.txt" in shown
    assert picture.read_bytes().startswith(PNG)
    rows = json.loads(run(*arguments, "--json"))["rows"]
    assert [row["nbytes"] for row in rows] == [4_000_000, 3_000_000]
    assert rows[1]["divergence"] == {"value": 0.02, "interval_95": [0.018, 0.022]}
    assert not list(tmp_path.glob("*.partial"))


def test_the_map_of_bits(tmp_path: Path) -> None:
    opened = quantize(write_source(tmp_path / "tiny"), tmp_path / "out", "recipe")
    bits_map(opened, tmp_path / "library.png")
    shown = run("inspect", opened.path, "--plot", tmp_path / "bits.png")
    assert "routed" in shown
    assert (tmp_path / "bits.png").read_bytes() == (tmp_path / "library.png").read_bytes()
    assert (tmp_path / "bits.png").read_bytes().startswith(PNG)


def test_a_picture_that_has_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent is no folder; create it first"):
        pareto(compare({"a": evaluation()}), tmp_path / "absent" / "p.png")


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = compare({"itself": evaluation(mean=0.0, interval=(0.0, 0.0))})
    with pytest.raises(UnsupportedError, match="divergence above 0"):
        pareto(same, tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"p\.png: .*kappaquant\[plot\]"):
        pareto(compare({"a": evaluation()}), tmp_path / "p.png")
    for command in (
        ("scan", "absent", "--plot", tmp_path / "p.png"),
        ("inspect", "absent", "--plot", tmp_path / "p.png"),
    ):
        with pytest.raises(UnsupportedError, match=r"p\.png: .*kappaquant\[plot\]"):
            run(*command)  # before the model is looked at
    assert not list(tmp_path.iterdir())
