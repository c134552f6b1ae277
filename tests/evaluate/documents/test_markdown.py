"""The report of an evaluation as Markdown: tables of whole rows."""

from __future__ import annotations

import dataclasses

from kappaquant.evaluate.documents.evaluation import Evaluation
from kappaquant.evaluate.documents.markdown import markdown


def test_markdown_tables_are_whole(report: Evaluation) -> None:
    text = markdown(report)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for lines in blocks:
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "KL divergence, mean (nats)" in text
    assert "original, against itself" in text
    plain = dataclasses.replace(report, settings=dataclasses.replace(report.settings, exact=False, top_k=9))
    assert "KL divergence of the top 9 and the rest" in markdown(plain)
