"""From right and wrong answers of two models to shares, intervals and tests; and what an earlier report still says."""

from __future__ import annotations

from dataclasses import replace

from kappaquant.evaluate.documents.evaluation import Evaluation, Measured, Score, TaskReport, Throughput
from kappaquant.evaluate.measures.intervals import paired_difference, sign_test, wilson

SIGNIFICANT = 0.05


def score(metric: str, checkpoint: str, source: str) -> Score:
    """Two models on the same questions.

    Args:
        checkpoint, source: a digit for each question, 1 where it was answered right.

    Raises:
        ValueError: they are of different lengths, or empty.
    """
    pairs = list(zip(checkpoint, source, strict=True))
    only_checkpoint, only_source = pairs.count(("1", "0")), pairs.count(("0", "1"))
    n = len(pairs)
    p_value = sign_test(only_checkpoint, only_source)
    return Score(
        metric, share(checkpoint), share(source),
        Measured((only_checkpoint - only_source) / n, paired_difference(only_checkpoint, only_source, n)),
        only_checkpoint, only_source, p_value, p_value < SIGNIFICANT, checkpoint, source,
    )  # fmt: skip


def share(outcomes: str) -> Measured:
    """Share of right answers with Wilson's interval."""
    right = outcomes.count("1")
    return Measured(right / len(outcomes), wilson(right, len(outcomes)))


def carry_over(found: Evaluation, earlier: Evaluation, checkpoint: str, source: str) -> tuple[Evaluation, list[str]]:
    """Rows of an earlier report that this run did not measure again, if they are of the same two models.

    Args:
        checkpoint, source: content hashes of the models that ``found`` is of.

    Returns:
        The report with its own rows first, and in words what was dropped since it was measured of other models.
    """

    dropped: list[str] = []

    def same(row: TaskReport | Throughput) -> bool:
        of = (("checkpoint", row.checkpoint_sha256, checkpoint), ("original", row.source_sha256, source))
        for side, there, here in of:
            if there != here:
                dropped.append(
                    f"{_name(row)}: was measured of another {side} ({there[:12]}…) and is dropped; measure it again"
                )
                return False
        return True

    asked = {_task_key(row) for row in found.tasks}
    timed = {_case_key(row) for row in found.throughput}
    tasks = [row for row in earlier.tasks if same(row) and _task_key(row) not in asked]
    throughput = [row for row in earlier.throughput if same(row) and _case_key(row) not in timed]
    merged = replace(found, tasks=(*found.tasks, *tasks), throughput=(*found.throughput, *throughput))
    return merged, dropped


def _task_key(row: TaskReport) -> tuple[object, ...]:
    return row.task, row.prompts_sha256, row.max_tokens, row.chat_template


def _case_key(row: Throughput) -> tuple[object, ...]:
    return row.model, row.batch, row.context


def _name(row: TaskReport | Throughput) -> str:
    if isinstance(row, TaskReport):
        return f"task {row.task}"
    return f"throughput of the {row.model}, batch {row.batch}, context {row.context}"
