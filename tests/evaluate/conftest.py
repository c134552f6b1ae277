"""Models that the tests of evaluations measure; each is quantized once for all of them, and none changes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import EXACT, measure, quantized, save_source

import kappaquant
from kappaquant.evaluate.documents.evaluation import Evaluation
from kappaquant.evaluate.runs.pair import open_pair


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("pair") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(source: Path) -> Path:
    return quantized(source, source.parent / "q3")


@pytest.fixture(scope="session")
def logits(source: Path) -> Path:
    """Predictions of the original that several tests share."""
    return source.parent / "logits"


@pytest.fixture(scope="session")
def report(checkpoint: Path, source: Path, logits: Path) -> Evaluation:
    return measure(checkpoint, source, logits, dataclasses.replace(EXACT, by_layer=True))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference model and two bits of it, which is where its arithmetic goes wrong."""
    from reference.evaluate import MODEL

    source = kappaquant.open_source(MODEL)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=2)
    from kappaquant.quantizing.quantize import Options as How

    return open_pair(
        kappaquant.quantize(source, tmp_path_factory.mktemp("pair") / "u2", plan, How("fast", jobs=1)), MODEL
    )
