"""The table, the headline and the picture of real weights."""

from __future__ import annotations

import copy
import json
from itertools import combinations
from typing import Any

import pytest

from benchmarks import real_model, real_picture, real_report
from benchmarks.readme import result


def row(name: str, group: str, bits: float, kld: float, calibrated: bool = False, **options: Any) -> dict[str, Any]:
    return {
        "name": name, "group": group, "setting": json.dumps(options), "calibrated": calibrated, "matrix_bits_per_weight": bits,
        "model_bytes": 1e6, "kld_nats": {"mean": kld, "interval_95": [kld, kld], "top1_agreement": 0.5},
        "perplexity": {"value": 9.0},
    }  # fmt: skip


def uniform(name: str, bits: float, kld: float, calibrated: bool = False) -> dict[str, Any]:
    return row(name, "kappaquant", bits, kld, calibrated, policy="uniform", group_size=64)


def measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows, "tokens": 1000, "original": {"value": 8.0}, "environment": {"cores": 2}}


def names(table: str) -> list[str]:
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:] if line.startswith("|")]


def test_headline_has_the_best_of_each_other_kind_at_like_bits() -> None:
    rows = [
        uniform("calibrated 3 g64", 3.25, 0.2, True), uniform("uniform 3 g64", 3.25, 2.0), uniform("uniform 6 g64", 6.25, 0.1),
        row("worse", "peer", 3.3, 3.0), row("better", "peer", 3.7, 1.0), row("larger", "peer", 3.76, 0.01),
        row("smaller", "llama.cpp", 2.75, 5.0), row("weighted", "llama.cpp", 3.0, 4.0, True),
        {"name": "nowhere", "group": "peer", "calibrated": False, "absent": "not installed"},
    ]  # fmt: skip
    table = real_report.headline(measured(rows))
    assert names(table) == ["smaller", "weighted", "**uniform 3 g64**", "**calibrated 3 g64**", "better"]
    assert "wrote itself" not in table
    assert "(benchmarks/results/real_model.json)" in table
    rows.append(uniform("own text 3 g64", 3.25, 0.3, True))
    assert "Own text: calibrated on what the model wrote itself." in real_report.headline(measured(rows))


def test_headline_takes_rows_that_are_measured() -> None:
    assert set(real_report.OURS) <= {variant.name for variant in real_model.variants()}
    assert {"**uniform 3 g64**", "**calibrated 3 g64**", "**calibrated 4 g64**"} <= set(
        names(real_report.headline(result("real_model")))
    )


def test_lines_join_widths_of_one_rule() -> None:
    kappa = row("calibrated kurtosis 2.5 g64", "kappaquant", 2.8, 0.5, True, policy="kurtosis", group_size=64)
    plain = row("uniform 4", "kappaquant", 4.2, 0.2, policy="uniform")
    rows = [
        uniform("calibrated 4 g64", 4.25, 0.04, True), uniform("calibrated 3 g64", 3.25, 0.2, True), kappa, plain,
        uniform("uniform 3 g64", 3.25, 2.0), uniform("own text 3 g64", 3.25, 0.3, True), row("x", "peer", 4, 0.3),
        row("y", "calibrated peer", 4, 0.2, True), {"name": "z", "absent": "not installed"},
    ]  # fmt: skip
    found = {key: [name for _, _, name in points] for key, points in real_picture.series(rows).items()}
    assert found == {
        "plain": ["uniform 4"], "plain, other": ["uniform 3 g64"], "calibrated": ["calibrated 3 g64", "calibrated 4 g64"],
        "own text": ["own text 3 g64"], "calibrated, other": ["calibrated kurtosis 2.5 g64"], "others": ["x"],
        "others, calibrated": ["y"],
    }  # fmt: skip


@pytest.mark.parametrize("crowded", [False, True])
def test_names_do_not_overlap(crowded: bool) -> None:
    found = copy.deepcopy(result("real_model"))
    points = [r for r in found["rows"] if "absent" not in r]
    if crowded:
        close = [copy.deepcopy(r) for r in points]
        for near in close:
            near["kld_nats"]["mean"] *= 1.05
        found["rows"] += close
    _, boxes = real_picture.figure(found)
    assert len(boxes) >= len(points)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_the_page_shows_the_result() -> None:
    page = real_report.PAGE.read_text(encoding="utf-8")
    assert real_report.page(page, result("real_model")) == page, "run python -m benchmarks.real_report"
