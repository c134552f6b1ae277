"""The page with more kinds of formats than codebooks: what it offers, that its solver and Python's agree, and the plan it gives."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from command_line import run_here
from headers import in_memory
from synthetic_evidence import evidence, evidence_of
from tiny_models import save_tiny

import kappaquant
from kappaquant.errors import PlanError
from kappaquant.planning.allocation import Option, allocate
from kappaquant.planning.explorer.contents import Contents
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import Plan
from kappaquant.planning.sizes import summary

TENSORS, CONFIG = in_memory("qwen3_5_moe_text")
BOTH = evidence(TENSORS, CONFIG, kinds="kt")
NAMES = ["k2", "t2", "k3", "t3", "k4", "t4", "k5", "k6", "k7", "k8", "16"]


def gathered(kinds: str, known: Any = BOTH, **options: Any) -> dict[str, Any]:
    return Contents(make_plan(TENSORS, CONFIG, "uniform", kinds=kinds, **options), TENSORS, CONFIG, known).gathered()


def test_every_format_of_the_kinds_is_offered_with_its_bytes_and_loss() -> None:
    contents = gathered("kt")
    assert contents["kinds"] == ["k", "t"]
    for unit in contents["units"]:
        assert unit["formats"] == NAMES
        assert unit["widths"] == [2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 16]
        assert unit["measured_at"] == "k2"
        assert unit["bytes"][:6:2] == unit["bytes"][1:6:2]
        names = [contents["names"][n] for row in unit["tensors"] for n in row["names"]]
        own = next(u for u in BOTH.units if set(names) <= set(u.tensors))
        for at, name in enumerate(NAMES[:-1]):
            ids = {contents["names"][n]: row["formats"][at] for row in unit["tensors"] for n in row["names"]}
            assert all(fmt.startswith(f"{name.replace('k', 'tq')}g") for fmt in ids.values())
            assert unit["loss"][at] == pytest.approx(BOTH.loss(own, ids))


def test_one_kind_is_offered_alone() -> None:
    assert {tuple(unit["formats"]) for unit in gathered("t")["units"]} == {("t2", "t3", "t4", "16")}
    assert {tuple(unit["formats"]) for unit in gathered("k")["units"]} == {("2", "3", "4", "5", "6", "7", "8", "16")}


def test_recipes_are_marked_as_plans_of_these_kinds_are() -> None:
    marks = {mark["name"]: mark for mark in gathered("kt")["marks"]}
    made = make_plan(TENSORS, CONFIG, "uniform", bits=3, kinds="kt")
    formats = {name: fmt.id if (fmt := made.format_of(name)) else None for name in TENSORS}
    assert {fmt[:2] for fmt in formats.values() if fmt} == {"t3"}
    assert marks["uniform 3"]["loss"] == pytest.approx(BOTH.predicted(formats))


def test_kinds_that_were_not_measured_are_refused() -> None:
    message = r"no error in trellis codes \(t\); calibrate with --formats k,t, or plan with --formats k$"
    with pytest.raises(PlanError, match=message):
        gathered("kt", evidence(TENSORS, CONFIG))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("qwen3_5_moe_text", tmp_path_factory.mktemp("kinds") / "model")
    evidence_of(kappaquant.open_source(folder), kinds="kt").save(folder.parent / "evidence.json")
    return folder


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(params=[(), ("--fuse-legal",)], ids=["free", "fused"])
def browser(one_browser: Browser, model: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Browser]:
    """With the page of both kinds open, as the command line writes it."""
    page = tmp_path / "page.html"
    done = run_here(
        "plan",
        model,
        "--evidence",
        model.parent / "evidence.json",
        "--formats",
        "k,t",
        "--explore",
        page,
        *request.param,
    )
    assert done.returncode == 0, done.stderr
    one_browser.problems.clear()
    one_browser.open(page)
    yield one_browser
    assert one_browser.problems == []


def variables(contents: dict[str, Any]) -> tuple[list[list[str]], list[list[Option]]]:
    """Of each block, names of the formats that it may have, and what each costs and takes."""
    blocks: dict[int, list[dict[str, Any]]] = {}
    for unit in contents["units"]:
        blocks.setdefault(unit["block"], []).append(unit)
    sums = [
        [tuple(sum(unit[key][at] for unit in units) for key in ("loss", "bytes")) for at in range(len(NAMES))]
        for units in blocks.values()
    ]
    return [units[0]["formats"] for units in blocks.values()], [[Option(*each) for each in of] for of in sums]


@pytest.mark.slow
def test_the_page_and_python_choose_the_same(browser: Browser) -> None:
    """The very plan where the bytes are those of a step of the curve, and mostly elsewhere; never a better one, and no bound above it."""
    contents = browser.run("contents")
    names, options = variables(contents)
    fixed = sum(row["bytes"] for row in contents["fixed"])
    steps = browser.run("problem.path.totals.map((total) => total.bytes)")
    draw, order = random.Random(1), list(dict.fromkeys(unit["block"] for unit in contents["units"]))
    first = [next(n for n, unit in enumerate(contents["units"]) if unit["block"] == block) for block in order]
    kinds, gaps = set(), []
    for size in [*steps, *(draw.randrange(steps[0], steps[-1]) for _ in range(20))]:
        page, exact = browser.run(f"solve(problem, {size})"), allocate(options, size - fixed)
        assert exact
        chosen = [contents["units"][n]["formats"][page["chosen"][n]] for n in first]
        assert page["bound"] <= exact.cost * (1 + 1e-9) + 1e-15
        assert exact.cost <= page["loss"] * (1 + 1e-6)
        if size in steps:
            assert chosen == [names[block][at] for block, at in enumerate(exact.chosen)]
        else:
            gaps.append(page["loss"] / exact.cost - 1)
        kinds |= {name[0] for name in chosen if name[-1] in "234"}
    assert kinds == {"k", "t"}
    assert sum(gap < 1e-9 for gap in gaps) > len(gaps) // 2
    assert max(gaps) < 0.25


@pytest.mark.slow
def test_the_plan_of_the_page_has_both_kinds_and_is_one_that_quantize_takes(
    browser: Browser, model: Path, tmp_path: Path
) -> None:
    browser.run("takeSize(problem.smallest.bytes * 1.2)")
    text = browser.run("shownPlan()")
    found, source, known = Plan.from_json(text), kappaquant.open_source(model), kappaquant.open_source(model)
    found.check(source.tensors, source.config)
    assert found.to_json() == text
    assert found.kinds == ("k", "t")
    assert summary(found, source.tensors, source.config).output_bytes == browser.run("state.result.bytes")
    formats = {name: fmt.id if (fmt := found.format_of(name)) else None for name in found.choices}
    assert {fmt[:2] for fmt in formats.values() if fmt} >= {"tq", "t2"}
    loss = evidence_of(known, kinds="kt").predicted(formats)
    assert found.inputs["predicted_kld"] == pytest.approx(loss, rel=1e-5)
    (tmp_path / "plan.json").write_text(text)
    done = run_here("quantize", model, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", "--effort", "fast")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_formats_are_named_in_cells_legend_table_and_command(browser: Browser) -> None:
    browser.run("takeSize(problem.smallest.bytes * 1.2)")
    cells = browser.run("[...document.querySelectorAll('[role=gridcell] text')].map((each) => each.textContent)")
    assert {"k", "t"} <= {text[0] for text in cells}
    assert set(cells) <= set(NAMES)
    label = browser.run("document.querySelector('[role=gridcell]').getAttribute('aria-label')")
    assert re.search(r": [kt]\d, [\d.]+ [kM]B, predicted loss", label)
    assert re.search(r"t2: [\d.]+ %", browser.text("legend"))
    assert re.search("format\\s*" + "\\s*".join(NAMES), browser.text("unit"))
    assert "measured at k2: " in browser.text("unit")
    assert "--formats" not in browser.text("command")  # all that the evidence has, which is what plans choose from
