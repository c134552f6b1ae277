"""Evaluations without a measurement, for what is made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kappaquant.evaluate.documents.evaluation import (
    CheckpointFacts,
    DataFile,
    DivergenceReport,
    Evaluation,
    FamilyDivergence,
    Measured,
    PerplexityReport,
    PositionBin,
    Settings,
    SourceFacts,
    TaskReport,
    TextFacts,
    Throughput,
)
from kappaquant.evaluate.measures.scores import score


def evaluation(
    nbytes: int = 4_000_000,
    mean: float = 0.00123,
    interval: tuple[float, float] | None = (0.0011, 0.0014),
    manifest: str | None = None,
    **changes: Any,
) -> Evaluation:
    """An evaluation of a checkpoint of so many bytes; ``changes`` replace whole parts of it."""
    divergence = DivergenceReport(
        mean=mean, interval_95=interval, median=0.0004, p99=0.0171, maximum=0.75, top1_agreement=0.98765,
        top1_interval_95=(0.981, 0.992), by_position=(PositionBin(1, 512, mean, 1234),),
    )  # fmt: skip
    made = Evaluation(
        kappaquant="0.1.0",
        environment={"torch": "9.8.7", "device": "cpu"},
        checkpoint=CheckpointFacts("measured", "kappaquant", nbytes, 5.613, manifest),
        source=SourceFacts("original", None, 11_460_000, "c" * 64, "d" * 64, "e" * 64),
        text=TextFacts("held-out.txt", "f" * 64, 12, 1234),
        settings=Settings(512, "float32", "cpu", 256, False, 2000, 0, bos="auto", begin=()),
        divergence=divergence,
        noise_floor=replace(divergence, mean=0.0000213, interval_95=(0.00002, 0.000023)),
        perplexity=PerplexityReport(Measured(1.78321, (1.75, 1.82)), Measured(1.78211, (1.74, 1.81))),
        families=(FamilyDivergence("router", 0.000321, (0.0003, 0.00035), 16.0),),
    )
    return replace(made, **changes)


VERSIONS = {"kappaquant": "0.1.0", "lm_eval": "0.4.13", "device": "cpu", "original_device": "cpu"}


def task_report(task: str, checkpoint: str = "1100", source: str = "1111", **changes: Any) -> TaskReport:
    """A task with one metric and these outcomes."""
    made = TaskReport(
        task=task, data=(DataFile("asked.jsonl", "8" * 64), DataFile("shown.jsonl", "9" * 64)), prompts_sha256="a" * 64,
        questions=len(source), shots=5, max_tokens=1024, chat_template=False, batch_size=16, dtype="float32", activations="int8",
        checkpoint_sha256="1" * 64, source_sha256="2" * 64, versions=VERSIONS,
        scores=(score("exact_match, strict-match", checkpoint, source),),
    )  # fmt: skip
    return replace(made, **changes)


def throughput_row(**changes: Any) -> Throughput:
    made = Throughput(
        model="checkpoint", batch=1, context=32, decode_tokens_per_s=12.5, prefill_tokens_per_s=100.0, first_token_ms=320.0,
        peak_gib=0.75, token_bytes=2_000_000, bandwidth_gb_per_s=10.0, roofline_share=0.0025, device="cpu", activations="int8",
        checkpoint_sha256="1" * 64, source_sha256="2" * 64, versions=VERSIONS,
    )  # fmt: skip
    return replace(made, **changes)
