"""plan --explore on the command line: the page it writes, and what it asks for first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import run_here
from evaluations import evaluation
from synthetic_evidence import evidence_of

import kappaquant


@pytest.fixture
def known(source: Path) -> Path:
    opened = kappaquant.open_source(source)
    path = source.parent / "evidence.json"
    evidence_of(opened, outer=False).save(path)
    return path


def contents(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="contents">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return json.loads(found[1])


def test_it_writes_the_page_beside_the_plan(source: Path, known: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    (tmp_path / "measured").mkdir()
    evaluation(nbytes=123_456, mean=0.02, interval=(0.01, 0.03)).save(tmp_path / "measured" / "evaluation.json")
    done = run_here(
        "plan", source, "--evidence", known, "--explore", page, "--measured", tmp_path / "measured", "--policy", "uniform",
        "--bits", 4, "--set", "*.o_proj.weight=5", "--fuse-legal", "--target", "vllm",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "open it in a browser" in " ".join(done.stdout.split())
    embedded = contents(page)
    mark = next(entry for entry in embedded["marks"] if entry["measured"])
    assert (mark["name"], mark["nbytes"], mark["loss"]) == ("measured", 123_456, 0.02)
    assert embedded["source"] == str(source)
    assert embedded["command"] == (
        f"kappaquant plan {source} --evidence {known} --set '*.o_proj.weight=5' --fuse-legal --target vllm"
    )
    assert embedded["fuse"] is True
    assert embedded["target"] == "vllm"


def test_a_page_chooses_from_all_that_was_measured(source: Path, tmp_path: Path) -> None:
    """Whatever the plan beside it is of; what overrides gave stays, and its command gives it again."""
    page, both = tmp_path / "page.html", tmp_path / "both.json"
    evidence_of(kappaquant.open_source(source), kinds="kt").save(both)
    by = "plan", source, "--evidence", both, "--explore", page, "--set", "*.o_proj.weight=4"
    done = run_here(*by, "--json")
    assert done.returncode == 0, done.stderr
    assert kappaquant.Plan.from_json(done.stdout).kinds == ("k",)
    embedded = contents(page)
    assert embedded["kinds"] == ["k", "t"]
    assert embedded["units"][0]["formats"][:4] == ["k2", "t2", "k3", "t3"]
    assert embedded["command"] == f"kappaquant plan {source} --evidence {both} --set '*.o_proj.weight=k4'"
    fixed = {row["why"]: row["format"] for row in embedded["fixed"]}
    assert fixed["set by '*.o_proj.weight'"].startswith("tq4g")
    assert run_here(*by, "--formats", "k").returncode == 0
    assert contents(page)["kinds"] == ["k"]
    assert contents(page)["command"].endswith("=4' --formats k")


def test_json_output_stays_json(source: Path, known: Path, tmp_path: Path) -> None:
    done = run_here("plan", source, "--evidence", known, "--explore", tmp_path / "page.html", "--json")
    assert json.loads(done.stdout)["plan_version"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--explore", "page.html"], "give --evidence as well"),
        (["--measured", "folder"], "give --explore as well"),
        (["--explore", "nowhere/page.html", "--evidence", "evidence.json"], "is no folder"),
        (["--explore", "page.html", "--evidence", "gone.json"], "no such file"),
        (["--explore", "page.html", "--evidence", "evidence.json", "--measured", "gone"], "no such file"),
    ],
)
def test_what_is_missing_is_said_first(
    given: list[str], message: str, source: Path, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(known.parent)
    done = run_here("plan", source, *given)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (known.parent / "page.html").exists()
