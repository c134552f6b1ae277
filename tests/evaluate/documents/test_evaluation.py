"""The report of an evaluation as a file: written whole, read back, and named where it is broken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kappaquant.errors import FormatError, OutputError
from kappaquant.evaluate.documents.evaluation import Evaluation


def test_the_report_is_written_and_read_back(report: Evaluation, tmp_path: Path) -> None:
    report.save(tmp_path / "evaluation.json")
    loaded = Evaluation.load(tmp_path / "evaluation.json")
    assert loaded.to_json() == report.to_json()
    assert loaded.divergence.mean == pytest.approx(report.divergence.mean, rel=1e-5)
    assert loaded.checkpoint == dataclasses.replace(
        report.checkpoint, bits_per_weight=loaded.checkpoint.bits_per_weight
    )
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        report.save(tmp_path / "absent" / "evaluation.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version 2; this kappaquant reads evaluations of version 1"),
        (lambda c: c["divergence"].pop("mean"), "has no divergence.mean"),
        (lambda c: c["divergence"].update(mean="0.1"), "divergence.mean is '0.1'; expected a finite number"),
        (lambda c: c["divergence"].update(interval_95=[1]), r"divergence.interval_95 is \[1\]; expected a list of 2"),
        (lambda c: c["divergence"].update(median=float("nan")), "divergence.median is nan"),
        (lambda c: c["text"].update(tokens=True), "text.tokens is True; expected a whole number"),
        (lambda c: c["divergence"]["by_position"][1].update(first=None), r"by_position\[1\].first is None"),
        (lambda c: c.update(families={}), "families is {}; expected a list"),
        (lambda c: c.update(source=None), "source is None; expected an object"),
        (lambda c: c.update(more=1), "more is not known; allowed there: kappaquant, "),
    ],
)
def test_a_broken_report_is_named(
    report: Evaluation, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content = json.loads(report.to_json())
    change(content)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=f"evaluation.json: .*{message}"):
        Evaluation.load(path)


def test_a_report_from_before_plans_predicted_is_read(report: Evaluation, tmp_path: Path) -> None:
    content = json.loads(report.to_json())
    del content["checkpoint"]["predicted_kld"]
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    assert Evaluation.load(tmp_path / "evaluation.json").checkpoint.predicted_kld is None


def test_files_that_are_no_report(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file; kappaquant evaluate writes one"):
        Evaluation.load(tmp_path / "absent.json")
    for text, message in (("{", "not JSON"), ("[]", "format_version None")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            Evaluation.load(tmp_path / "bad.json")
