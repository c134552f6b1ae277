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
        "model_bytes": bits * 1e6, "kld_nats": {"mean": kld, "interval_95": [kld, kld], "top1_agreement": 0.5},
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
    eight = row("calibrated 3 g64, embedding 8", "kappaquant", 3.25, 0.2, True, policy="uniform", overrides=[["*", 8]])
    by_evidence = {**row("measured, bytes of x", "kappaquant", 5, 0.01, True), "setting": "calibrate, plan"}
    plain = row("uniform 4", "kappaquant", 4.2, 0.2, policy="uniform")
    rows = [
        uniform("calibrated 4 g64", 4.25, 0.04, True), uniform("calibrated 3 g64", 3.25, 0.2, True), kappa, plain,
        uniform("uniform 3 g64", 3.25, 2.0), uniform("own text 3 g64", 3.25, 0.3, True), row("x", "peer", 4, 0.3),
        row("y", "calibrated peer", 4, 0.2, True), {"name": "z", "absent": "not installed"}, eight, by_evidence,
        row("t", "llama.cpp type", 4, 0.2, True),
        {**row("measured in both kinds, bytes of x", "kappaquant", 5, 0.008, True), "setting": "calibrate, plan"},
    ]  # fmt: skip
    joined = {
        "plain": ["uniform 4"], "plain, other": ["uniform 3 g64"], "calibrated": ["calibrated 3 g64", "calibrated 4 g64"],
        "own text": ["own text 3 g64"], "calibrated, other": ["calibrated kurtosis 2.5 g64"], "others": ["x"],
    }  # fmt: skip
    # bits of the matrices say nothing of an embedding; a type makes no whole model, and what is lost no point
    assert drawn(rows, real_picture.BITS) == {**joined, "others, calibrated": ["t", "y"]}
    joined |= {
        "embedding 8": [eight["name"]],
        "measured": [by_evidence["name"]],
        "measured in both kinds": [rows[-1]["name"]],
        "others, calibrated": ["y"],
    }
    del joined["plain, other"]
    assert drawn(rows, real_picture.SIZE) == joined


def drawn(rows: list[dict[str, Any]], picture: real_picture.Picture) -> dict[str, list[str]]:
    return {key: [name for _, _, name in points] for key, points in real_picture.series(rows, picture).items()}


def test_measured_plans_stand_beside_what_takes_their_bytes() -> None:
    rows = [
        row("llama.cpp Q", "llama.cpp", 4, 0.4), row("llama.cpp Q imatrix", "llama.cpp", 4, 0.2, True),
        {**uniform("calibrated 4", 4, 0.1, True), "model_bytes": 5e5}, row("nothing beside", "kappaquant", 4, 9.0),
    ]  # fmt: skip
    rows += [
        {**uniform(f"measured, bytes of {row['name']}", 4, 0.05, True), "predicted_kld": 0.04} for row in rows[:3:2]
    ]
    rows.append(uniform("measured in both kinds, bytes of calibrated 4", 4, 0.04, True))
    found = real_report.pairs(measured(rows)).splitlines()[2:]
    assert found == [
        "| 0.5 | calibrated 4 | 0.1000 | **0.0500** | 0.50 | **0.0400** | 0.40 |",
        "| 4.0 | llama.cpp Q | 0.4000 | **0.0500** | 0.12 | – | – |",
        "| 4.0 | llama.cpp Q imatrix | 0.2000 | **0.0500** | 0.25 | – | – |",
    ]  # fmt: skip
    assert names(real_report.pairs(measured(rows), ("calibrated*",))) == ["0.5"]


def test_predictions_are_summed_up() -> None:
    rows = [{**uniform(f"{at}", 4, 0.1 * at, True), "predicted_kld": 0.05 * at * at} for at in (1, 2, 3)]
    assert real_report.predictions(measured([*rows, uniform("unpredicted", 4, 1.0)])) == (
        "3 plans of 2 to 8 bits: rank correlation of predicted and measured divergence 1.000; measured over predicted 0.67 to 2.00, "
        "in the middle 1.00."
    )


@pytest.mark.parametrize("picture", [real_picture.BITS, real_picture.SIZE], ids=["bits", "size"])
@pytest.mark.parametrize("crowded", [False, True])
def test_names_do_not_overlap(crowded: bool, picture: real_picture.Picture) -> None:
    found = copy.deepcopy(result("real_model"))
    found["rows"] = [r for r in found["rows"] if "absent" not in r and picture.shows(r)]
    points = [r for r in found["rows"] if real_picture.series_of(r) not in real_picture.UNNAMED]
    if crowded:
        close = [copy.deepcopy(r) for r in points]
        for near in close:
            near["kld_nats"]["mean"] *= 1.05
        found["rows"] += close
    _, boxes = real_picture.figure(found, picture)
    assert len(boxes) >= 0.9 * len(points)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_rows_without_the_grid_stand_beside_those_with_it() -> None:
    with_grid = measured(
        [uniform("ours", 4.25, 0.04, True), row("type", "llama.cpp type", 4.5, 0.01), uniform("more", 5.0, 0.02)]
    )
    without = measured([row("type", "llama.cpp type", 4.5, 0.2), uniform("ours", 4.25, 0.05, True)])
    lines = real_report.grid(with_grid, without).splitlines()
    assert [line.split(" | ")[-2:] for line in lines[2:]] == [["0.0400", "0.0500 |"], ["0.0100", "0.2000 |"]]
    assert names("\n".join(lines)) == ["**ours**", "type"]


def test_the_page_shows_the_result() -> None:
    page = real_report.PAGE.read_text(encoding="utf-8")
    assert real_report.page(page, result("real_model"), result("real_model_dithered")) == page, (
        "run python -m benchmarks.real_report"
    )
