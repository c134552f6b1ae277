"""Plans as data: JSON of both versions, files that are none, and the check against a source."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from choices import choice
from headers import infos
from planned import OUT, PREFIX, QWEN, TENSORS, Q, plan

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.planning.plan import Plan


def test_json_round_trip_and_order(tmp_path: Path) -> None:
    tensors = infos({f"model.layers.{i}.self_attn.q_proj.weight": (128, 128) for i in (10, 2, 0)})
    made = plan(tensors=tensors, overrides=[("*.2.*", 7)])
    text = made.to_json()
    assert Plan.from_json(text) == made
    assert list(json.loads(text)["tensors"]) == sorted(tensors, key=lambda name: int(name.split(".")[2]))
    assert plan(tensors=dict(reversed(tensors.items())), overrides=[("*.2.*", 7)]).to_json() == text
    assert sum("q_proj" in line for line in text.splitlines()) == 3
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_among_other_kinds_overrides_name_the_kind_that_they_got() -> None:
    overrides = [("*q_proj.weight", 4), ("*o_proj.weight", "t3"), ("lm_head.weight", 16)]
    made = plan(overrides=overrides)
    assert made.among(("k",)) is made
    other = made.among(("k", "t"))
    assert (other.kinds, other.choices) == (("k", "t"), made.choices)
    assert other.inputs["overrides"] == [["*q_proj.weight", "k4"], ["*o_proj.weight", "t3"], ["lm_head.weight", 16]]
    assert plan(overrides=[tuple(pair) for pair in other.inputs["overrides"]], kinds="kt").choice(Q) == made.choice(Q)


def test_an_empty_plan_is_still_json() -> None:
    made = plan(tensors={})
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(plan_version=3), "plan_version is 3"),
        (lambda d: d.pop("plan_version"), "plan_version is None"),
        (lambda d: d.update(plan_version=2.0), "plan_version is 2.0"),
        (lambda d: d.update(policy="\ud800"), r"plan\.json: not JSON \(.*surrogates"),
        (lambda d: d["inputs"].update(size=float("nan")), r"plan\.json: not JSON \(Out of range"),
        (lambda d: d["inputs"].update(overrides=3), r"plan\.json: the overrides of 'inputs' must be a list, not 3"),
        (lambda d: d.update(group_size=64.5), r"plan\.json: 'group_size' must be a JSON number, or auto"),
        (lambda d: d.update(tensors=[]), "'tensors' must be a JSON dict"),
        (lambda d: d.update(group_size=100), r"plan\.json: group size 100.*power of two"),
        (lambda d: d.update(group_size=True), "power of two"),
        (
            lambda d: d["tensors"].update({Q: {"format": "tq9g128", "why": ""}}),
            r"plan\.json: .*q_proj\.weight: unknown format id 'tq9g128'",
        ),
        (lambda d: d["tensors"].update({Q: {"format": 3, "why": ""}}), r"q_proj\.weight: .*; an entry is"),
        (lambda d: d["tensors"].update({Q: {"bits": 3, "why": ""}}), r"q_proj\.weight: .*; an entry is"),
        (lambda d: d["tensors"].update({Q: 3}), r"q_proj\.weight: 3; an entry"),
    ],
)
def test_broken_plan_files(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    data = json.loads(plan().to_json())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_of_version_1_reads_as_what_it_meant(tmp_path: Path) -> None:
    made = plan(bits=4, overrides=[(OUT, 6)], group_size=64)
    old = made.record()
    data = json.loads(old)
    assert (data["plan_version"], data["group_size"]) == (1, 64)
    assert data["tensors"][OUT] == {"bits": 6, "why": f"set by {OUT!r}"}
    assert data["tensors"]["lm_head.weight"]["bits"] == 16
    (tmp_path / "plan.json").write_text(old)
    read = Plan.load(tmp_path / "plan.json")
    assert read == made
    assert read.record() == old
    assert read.format_of(OUT) == CodebookFormat(6, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["tensors"].update({Q: {"bits": 9, "why": ""}}), r"q_proj\.weight: bits = 9"),
        (lambda d: d["tensors"].update({Q: {"bits": "3", "why": ""}}), r"q_proj\.weight: bits = '3'"),
        (lambda d: d["tensors"].update({Q: {"bits": True, "why": ""}}), r"q_proj\.weight: bits = True"),
        (lambda d: d["tensors"].update({Q: {"format": "tq3g128", "why": ""}}), r"q_proj\.weight: .*; an entry is"),
        (lambda d: d.update(group_size="auto"), "'group_size' must be a JSON int"),
    ],
)
def test_broken_plan_files_of_version_1(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = json.loads(plan().record())
    change(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


def test_a_plan_of_several_groups_is_recorded_as_it_is() -> None:
    made = plan(group_size="auto", tensors=infos({Q: (256, 576), OUT: (256, 256)}))
    assert (made.choices[Q].format, made.choices[OUT].format) == ("tq3g64", "tq3g128")
    assert made.record() == made.to_json()
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan_version": 1, "plan_version": 1}', "\x80"])
def test_text_that_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=r"p\.json"):
        Plan.load(tmp_path / "p.json")


def test_missing_plan_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.json"):
        Plan.load(tmp_path / "absent.json")


def test_check_names_unknown_and_missing_tensors() -> None:
    made = plan()
    made.check(TENSORS, QWEN)
    with pytest.raises(PlanError, match=r"lm_head\.weight: the plan names 1 tensor the source does not have"):
        made.check({name: info for name, info in TENSORS.items() if name != "lm_head.weight"})
    with pytest.raises(PlanError, match=r"extra\.0, extra\.1: the plan leaves out 2 tensors"):
        made.check({**TENSORS, **infos({"extra.1": (1,), "extra.0": (1,)})})
    with pytest.raises(PlanError, match=r"^x: the plan does not name"):
        made.bits("x")


def test_check_refuses_bits_on_what_cannot_have_them() -> None:
    name = PREFIX + "input_layernorm.weight"
    made = plan()
    edited = replace(made, choices={**made.choices, name: choice(3)})
    with pytest.raises(PlanError, match=r"input_layernorm\.weight: the plan stores it as tq3g128"):
        edited.check(TENSORS, QWEN)
