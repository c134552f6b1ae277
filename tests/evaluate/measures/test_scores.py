"""Scores of a task from the outcomes of both models, and which rows an earlier report lends to a new one."""

from __future__ import annotations

import pytest
from evaluations import evaluation, task_report, throughput_row

from kappaquant.evaluate.measures.scores import carry_over, score


def test_scores() -> None:
    found = score("acc", "1100", "1011")
    assert (found.checkpoint.value, found.source.value, found.difference.value) == (0.5, 0.75, -0.25)
    assert (found.only_checkpoint, found.only_source, found.p_value, found.significant) == (1, 2, 1.0, False)
    assert score("acc", "1" * 6, "0" * 6).significant  # p = 1/32
    assert not score("acc", "1" * 5, "0" * 5).significant  # p = 1/16
    with pytest.raises(ValueError, match="zip"):
        score("acc", "11", "1")


def test_rows_are_carried_over_for_the_same_models_only() -> None:
    old = evaluation(
        tasks=(task_report("gsm8k"), task_report("stories"), task_report("other", checkpoint_sha256="b" * 64)),
        throughput=(throughput_row(), throughput_row(context=9, source_sha256="b" * 64)),
    )
    new = task_report("stories", checkpoint="0000")
    found, dropped = carry_over(evaluation(tasks=(new,)), old, "1" * 64, "2" * 64)
    assert found.tasks == (new, old.tasks[0])
    assert found.throughput == old.throughput[:1]
    assert [notice.partition(":")[0] for notice in dropped] == [
        "task other",
        "throughput of the checkpoint, batch 1, context 9",
    ]
    assert "another checkpoint (bbbbbbbbbbbb…)" in dropped[0]
    assert "another original" in dropped[1]
