"""The page in a real headless Chromium: what keys and controls do, what is copied, how it looks in light and dark."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from command_line import run_here
from synthetic_evidence import evidence, evidence_of
from tiny_models import save_tiny

import kappaquant
from kappaquant.models.roles import fused_groups
from kappaquant.planning.explorer.page import page as explorer
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import Plan
from kappaquant.planning.sizes import summary

pytestmark = pytest.mark.slow
NASTY = "</script><script>document.title = 'broken'</script><!-- & ' \" ü"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_5_moe_text", tmp_path_factory.mktemp("explored") / "tiny model")


@pytest.fixture(scope="module")
def page(model: Path) -> Path:
    """As the command line writes it."""
    source = kappaquant.open_source(model)
    known, path = model.parent / "evidence.json", model.parent / "page.html"
    evidence_of(source).save(known)
    done = run_here("plan", model, "--evidence", known, "--explore", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def browser(one_browser: Browser, page: Path) -> Iterator[Browser]:
    """With the page open; afterwards nothing but the page has been asked for, and nothing has gone wrong."""
    one_browser.problems.clear()
    one_browser.requests.clear()
    one_browser.open(page)
    yield one_browser
    assert one_browser.problems == []
    assert {url.partition("#")[0] for url in one_browser.requests} == {page.as_uri()}


def numbers(browser: Browser) -> dict[str, Any]:
    return {**browser.run("({ size: state.bytes, ...state.result })"), "shown": browser.text("loss")}


def test_arrow_keys_move_the_slider_and_numbers_follow(browser: Browser) -> None:
    ends = browser.run("[problem.smallest.bytes, problem.largest.bytes]")
    browser.run("document.getElementById('size').focus()")
    seen = [numbers(browser)]
    for key in ("ArrowRight", "ArrowRight", "PageUp", "ArrowLeft", "End", "Home"):
        browser.press(key)
        seen.append(numbers(browser))
    sizes = [each["size"] for each in seen]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]
    assert sizes[4] < sizes[3]
    assert [sizes[5], sizes[6]] == ends[::-1]
    for each in seen:
        assert each["bytes"] <= each["size"]
        assert each["bound"] <= each["loss"] * (1 + 1e-9)
        assert float(each["shown"]) == pytest.approx(each["loss"], rel=0.01)
    assert seen[5]["loss"] < seen[3]["loss"] < seen[0]["loss"] < seen[6]["loss"]
    said = browser.run("document.getElementById('size').getAttribute('aria-valuetext')")
    assert said.endswith(f"nats {seen[6]['shown']}")


def test_a_size_is_typed_with_its_unit(browser: Browser) -> None:
    def solve(text: str) -> str:
        browser.run(f"byId('wanted').value = {text!r}; byId('exact').requestSubmit()")
        return browser.text("wanted-problem")

    middle = browser.run("Math.round((problem.smallest.bytes + problem.largest.bytes) / 2)")
    assert solve(f"{middle} B") == ""
    assert numbers(browser)["size"] == middle
    assert solve(f"{middle / 1024:.3f}KiB") == ""
    assert numbers(browser)["size"] == pytest.approx(middle, abs=2)
    assert "write a number and a unit" in solve("18").lower()
    assert "write a number and a unit" in solve("18 parsecs").lower()
    assert "Plans take from" in solve("1 TB")
    assert "Plans take from" in solve("1 B")
    assert numbers(browser)["size"] == pytest.approx(middle, abs=2)


@pytest.mark.parametrize("limited", [False, True])
def test_the_copied_plan_is_one_that_quantize_takes(
    browser: Browser, model: Path, tmp_path: Path, limited: bool
) -> None:
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("takeSize(problem.smallest.bytes * 1.6)")
    if limited:
        browser.run("byId('limit').focus(), byId('limit').value = 300")
        browser.press("ArrowLeft")
    browser.run("byId('copy-plan').click()")
    browser.wait("byId('done').textContent === 'Plan copied.'")
    text = browser.run("navigator.clipboard.readText()")
    found, source = Plan.from_json(text), kappaquant.open_source(model)
    found.check(source.tensors, source.config)
    assert found.to_json() == text
    assert (found.policy, found.inputs["chosen_in"]) == ("sensitivity", "explorer")
    sizes, shown = summary(found, source.tensors, source.config), numbers(browser)
    assert sizes.output_bytes == shown["bytes"] <= found.inputs["size"] == shown["size"]
    assert sizes.active_bytes_per_token == round(shown["active"])
    assert len(sizes.by_format) > 3  # it mixes widths
    if limited:
        assert sizes.active_bytes_per_token <= found.inputs["active"]
    assert any(re.search(r"^layer 1, attention.q: \S+ of \S+ nats predicted$", c.why) for c in found.choices.values())
    (tmp_path / "plan.json").write_text(text)
    done = run_here("quantize", model, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", "--effort", "fast")
    assert done.returncode == 0, done.stderr
    written = kappaquant.open_checkpoint(tmp_path / "out")
    assert {name: written.bits(name) for name in written.keys()} == {n: found.bits(n) for n in found.choices}


def test_copied_commands_make_and_quantize_a_plan_of_this_size(browser: Browser, model: Path, tmp_path: Path) -> None:
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("byId('copy-command').click()")
    browser.wait("byId('done').textContent === 'Commands copied.'")
    first, second = browser.run("navigator.clipboard.readText()").splitlines()
    assert second == f"kappaquant quantize '{model}' -o OUTPUT --plan plan.json"
    assert first.startswith(f"kappaquant plan '{model}' --evidence {model.parent}/evidence.json --size ")
    page = browser.run("({loss: state.result.loss, files: state.bytes + contents.headers})")
    assert first.endswith(f" --size {page['files']}B -o plan.json")
    command = shlex.split(first)
    command[command.index("plan.json")] = str(tmp_path / "plan.json")
    done = run_here(*command[1:])
    assert done.returncode == 0, done.stderr
    exact, source = Plan.load(tmp_path / "plan.json"), kappaquant.open_source(model)
    # the command's files may be as large as the page's tensors and headers, and it solves exactly
    assert exact.inputs["predicted_kld"] <= page["loss"] * (1 + 1e-5)
    assert summary(exact, source.tensors, source.config).output_bytes <= page["files"]


def test_arrow_keys_walk_the_cells_and_show_each(browser: Browser) -> None:
    browser.run("document.querySelector('[role=gridcell][tabindex=\"0\"]').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "End", "Home", "ArrowUp"):
        browser.press(key)
        label, shown = browser.run("document.activeElement.getAttribute('aria-label')"), browser.text("unit")
        assert re.search(r": \d+ bits, [\d.]+ MB, predicted loss [\d.e-]+, kappa [\d.]+$", label)
        where = label.partition(":")[0]
        assert re.sub(r"[._]", " ", shown).startswith(where)
        seen.append(where)
    right, first, below, end, home, last = seen
    assert (first[:7], right[:7], end[:7]) == ("layer 0", "layer 1", "layer 1")
    assert first[7:] == right[7:] != below[7:] == end[7:]
    assert (home, last) == (below, first)
    assert browser.run("document.querySelectorAll('[role=gridcell][tabindex=\"0\"]').length") == 1


def test_keys_switch_the_colours(browser: Browser) -> None:
    browser.run("document.querySelector('[name=colour]').focus()")
    seen = [browser.text("legend")]
    for _ in range(3):
        browser.press("ArrowRight")
        seen.append(browser.text("legend"))
    assert [word in text for word, text in zip(("bits:", "κ", "predicted loss", "bytes"), seen, strict=True)] == [
        True
    ] * 4
    levels = browser.run(
        "new Set([...document.querySelectorAll('[role=gridcell]')].map((cell) => cell.getAttribute('class'))).size"
    )
    assert levels > 2


def test_the_address_keeps_the_size(browser: Browser) -> None:
    browser.run("document.getElementById('size').focus()")
    browser.press("PageUp")
    size = numbers(browser)["size"]
    browser.wait(f"location.hash === '#{size}'")
    browser.run("state.size = null")
    browser.call("Page.reload")
    browser.wait("document.readyState === 'complete' && typeof state === 'object' && !('size' in state)")
    assert numbers(browser)["size"] == size


def test_a_recipe_gives_its_size(browser: Browser) -> None:
    browser.run("[...document.querySelectorAll('#marks button')].find((b) => b.textContent === 'uniform 3').click()")
    found = numbers(browser)
    mark = next(m for m in browser.run("contents.marks") if m["name"] == "uniform 3")
    assert found["size"] == mark["nbytes"]
    assert found["loss"] <= mark["loss"]


def test_light_and_dark_can_both_be_read(browser: Browser, page: Path) -> None:
    backgrounds = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        pairs = browser.run(
            """[...document.querySelectorAll("h1, h2, dt, dd, .note, label, button, pre, td, [role=gridcell] text, .tick")]
            .filter((e) => e.textContent.trim() && !e.closest(".hidden, fieldset"))
            .map((e) => {
              const behind = e.previousElementSibling?.tagName === "rect" ? getComputedStyle(e.previousElementSibling).fill : null;
              let at = e, back = behind;
              while (!back || /, 0\\)$/.test(back)) { back = getComputedStyle(at).backgroundColor; at = at.parentElement; }
              const style = getComputedStyle(e);
              return [e.closest("svg") ? style.fill : style.color, back, e.textContent];
            })"""
        )
        assert len(pairs) > 60
        for ink, back, text in pairs:
            assert contrast(ink, back) >= 4.5, (dark, text, ink, back)
        backgrounds.append(luminance(browser.run("getComputedStyle(document.body).backgroundColor")))
    assert backgrounds[0] > 0.8
    assert backgrounds[1] < 0.05


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert (
        browser.run(
            "[...document.querySelectorAll('button, input')].filter((e) => !e.labels?.length && !e.textContent).length"
        )
        == 0
    )


def test_solutions_keep_to_both_budgets_and_are_near_the_best(browser: Browser) -> None:
    """Small random problems, by brute force as well: within the budgets, no worse than the bound says, the bound below the best."""
    draw = random.Random(3)
    gaps = []
    for _ in range(60):
        units = [unit(draw, number) for number in range(5)]
        posed = {"units": units, "fixed": [{"bytes": 100, "active": 10.0, "loss": 0.5}]}
        plans = [totals(units, chosen) for chosen in product(range(4), repeat=5)]
        bytes_ = draw.randrange(min(p[0] for p in plans), max(p[0] for p in plans) + 1)
        least = min(p[1] for p in plans if p[0] <= bytes_)
        active = draw.choice([None, least * draw.uniform(1, 2)])
        found = browser.run(f"solve(posed({json.dumps(posed)}), {bytes_}, {active or 'Infinity'})")
        best = min(p[2] for p in plans if p[0] <= bytes_ and (active is None or p[1] <= active))
        assert [found["bytes"], found["active"], found["loss"]] == pytest.approx(totals(units, found["chosen"]))
        assert found["bytes"] <= bytes_
        assert active is None or found["active"] <= active
        assert found["bound"] <= best * (1 + 1e-9) <= found["loss"] * (1 + 1e-6)
        gaps.append(found["loss"] / best - 1)
    assert sum(gap < 1e-9 for gap in gaps) > 30
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.25


def unit(draw: random.Random, number: int) -> dict[str, Any]:
    sizes = sorted(draw.sample(range(50, 400), 4))
    losses = sorted((draw.uniform(0, 4) for _ in sizes), reverse=True)
    share = draw.choice([0.0, 0.25, 1.0])
    return {
        "block": number, "formats": ["2", "3", "4", "16"], "bytes": sizes, "active": [share * size for size in sizes], "loss": losses,
    }  # fmt: skip


def totals(units: list[dict[str, Any]], chosen: Any) -> tuple[int, float, float]:
    sums = [sum(u[key][at] for u, at in zip(units, chosen, strict=True)) for key in ("bytes", "active", "loss")]
    return sums[0] + 100, sums[1] + 10.0, sums[2] + 0.5


@pytest.mark.parametrize("wish", [{"fuse": True}, {"target": "vllm"}], ids=["fuse", "target"])
def test_units_that_engines_fuse_move_together(
    browser: Browser, model: Path, tmp_path: Path, wish: dict[str, Any]
) -> None:
    source = kappaquant.open_source(model)
    plan = make_plan(source.tensors, source.config, "uniform", **wish)
    path = tmp_path / "page.html"
    path.write_text(explorer(plan, source.tensors, source.config, evidence(source.tensors, source.config)))
    browser.open(path)
    browser.requests[:] = [url for url in browser.requests if not url.startswith(path.as_uri())]
    fused = [set(names) for names in fused_groups(source.tensors, source.config)]
    mixed = 0
    for share in (1.1, 1.4, 2, 3):
        browser.run(f"takeSize(problem.smallest.bytes * {share})")
        found = Plan.from_json(browser.run("shownPlan()"))
        bits = {name: found.bits(name) for name in found.choices}
        assert all(len({bits[name] for name in names}) == 1 for names in fused)
        assert {key: found.inputs.get(key) for key in wish} == wish
        mixed += len(set(bits.values())) > 2
    assert mixed > 2


def test_pages_of_other_evidence_and_strange_names_open(browser: Browser, model: Path, tmp_path: Path) -> None:
    source, path = kappaquant.open_source(model), tmp_path / "page.html"
    plan = make_plan(source.tensors, source.config, "uniform")
    known = evidence(source.tensors, source.config, kind="weights", model=NASTY, widths=(3, 4))
    path.write_text(explorer(plan, source.tensors, source.config, known, command=NASTY), encoding="utf-8")
    browser.open(path)
    browser.requests[:] = [url for url in browser.requests if not url.startswith(path.as_uri())]
    assert browser.run("document.querySelector('h1').textContent") == NASTY
    assert browser.text("loss-name") == "predicted error"
    assert "a fallback" in browser.text("evidence")
    assert browser.text("command").startswith(NASTY)
    assert browser.run("document.scripts.length") == 2


def test_no_budget_below_the_smallest_plan_is_solved(browser: Browser) -> None:
    assert browser.run("solve(problem, problem.smallest.bytes - 1)") is None
    assert browser.run("solve(problem, problem.largest.bytes, problem.smallest.active - 1)") is None
    assert browser.run("solve(problem, problem.largest.bytes, problem.smallest.active).active") == pytest.approx(
        browser.run("problem.smallest.active")
    )
