"""What the page knows: exact bytes by width, predicted losses, what is fixed and why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from headers import in_memory, infos
from synthetic_evidence import evidence

from kappaquant.errors import PlanError
from kappaquant.formats.registry import format_by_id
from kappaquant.planning.explorer.contents import Contents, Mark
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import KEPT, Choice, Plan
from kappaquant.planning.sizes import summary

TENSORS, CONFIG = in_memory("qwen3_5_moe_text")
EVIDENCE = evidence(TENSORS, CONFIG)
Q = next(name for name in TENSORS if name.endswith("q_proj.weight"))


def gathered(found: Any = EVIDENCE, measured: tuple[Mark, ...] = (), **options: Any) -> dict[str, Any]:
    return Contents(make_plan(TENSORS, CONFIG, "uniform", **options), TENSORS, CONFIG, found).gathered(measured)


def plan_at(contents: dict[str, Any], width: int) -> Plan:
    """The plan that gives every unit one width."""
    names, choices = contents["names"], {}
    for row in contents["fixed"]:
        choices |= {names[number]: Choice(row["format"], row["why"]) for number in row["names"]}
    for unit in contents["units"]:
        for row in unit["tensors"]:
            chosen = row["formats"][unit["widths"].index(width)]
            choices |= {names[number]: Choice(chosen, "") for number in row["names"]}
    return Plan(choices, contents["group_size"], "sensitivity", {})


@pytest.mark.parametrize("width", [2, 3, 8, 16])
@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"overrides": [(Q, 5)]}])
def test_bytes_and_active_bytes_are_those_of_the_plan(width: int, options: dict[str, Any]) -> None:
    contents = gathered(evidence(TENSORS, CONFIG, group_size=options.get("group_size", "auto")), **options)
    sizes = summary(plan_at(contents, width), TENSORS, CONFIG)
    at = [(unit, unit["widths"].index(width)) for unit in contents["units"]]
    for what, expected in (("bytes", sizes.output_bytes), ("active", sizes.active_bytes_per_token)):
        total = sum(unit[what][i] for unit, i in at) + sum(row[what] for row in contents["fixed"])
        assert round(total) == expected
    names = contents["names"]
    assert contents["weights"] == sizes.total.params
    for unit, i in at:
        stored = [(row["formats"][i], TENSORS[names[n]]) for row in unit["tensors"] for n in row["names"]]
        assert unit["bytes"][i] == sum(
            info.nbytes if fmt == KEPT else format_by_id(fmt, "").nbytes(info.shape) for fmt, info in stored
        )


def test_losses_and_kurtosis_are_those_of_the_evidence() -> None:
    contents = gathered()
    assert contents["divergence"] is True
    assert len(contents["units"]) == len(EVIDENCE.units)
    names = contents["names"]
    for unit in contents["units"]:
        own = next(u for u in EVIDENCE.units if (u.layer, u.role) == (unit["layer"], unit["role"]))
        for i, width in enumerate(unit["widths"]):
            formats = {names[n]: row["formats"][i] for row in unit["tensors"] for n in row["names"]}
            chosen = {name: None if fmt == KEPT else fmt for name, fmt in formats.items()}
            assert unit["loss"][i] == pytest.approx(EVIDENCE.loss(own, chosen))
            if width == own.bits:
                assert unit["loss"][i] == pytest.approx(own.kld)
        assert unit["loss"][unit["widths"].index(16)] == 0
        assert unit["kurtosis"] == max(EVIDENCE.kurtosis[name] for name in own.tensors)


def test_what_was_measured_is_free_and_the_rest_says_why_it_stays() -> None:
    contents = gathered()
    assert {"embedding", "lm_head"} < {unit["role"] for unit in contents["units"]}
    kept = make_plan(TENSORS, CONFIG, "uniform")
    for row in contents["fixed"]:
        assert row["format"] == KEPT
        assert {kept.choice(contents["names"][n]).why for n in row["names"]} == {row["why"]}
    plain = gathered(evidence(TENSORS, CONFIG, outer=False))
    assert not {"embedding", "lm_head"} & {unit["role"] for unit in plain["units"]}
    assert {"embeddings", "lm_head"} < {row["family"] for row in plain["fixed"]}


def test_what_is_set_by_hand_is_fixed_with_its_predicted_loss() -> None:
    contents = gathered(overrides=[(Q, 5)])
    row = next(row for row in contents["fixed"] if row["why"] == f"set by {Q!r}")
    own = next(unit for unit in EVIDENCE.units if Q in unit.tensors)
    assert (row["format"], [contents["names"][n] for n in row["names"]]) == ("tq5g128", [Q])
    assert row["loss"] == pytest.approx(EVIDENCE.loss(own, {Q: "tq5g128"}))
    assert contents["overrides"] == [[Q, 5]]
    unknown = gathered(overrides=[(Q, "tq5g32")])
    assert next(row for row in unknown["fixed"] if row["format"] == "tq5g32")["loss"] == 0  # nothing is known of it


def test_fused_layers_share_a_block_where_the_plan_fuses() -> None:
    alone = gathered()["units"]
    assert len({unit["block"] for unit in alone}) == len(alone)
    fused = gathered(fuse=True)["units"]
    blocks: dict[int, set[tuple[Any, str]]] = {}
    for unit in fused:
        blocks.setdefault(unit["block"], set()).add((unit["layer"], unit["role"]))
    assert {(3, "attention.q"), (3, "attention.k"), (3, "attention.v")} in blocks.values()


def test_an_engine_has_its_fused_layers_alike_and_keeps_what_it_cannot_pack() -> None:
    contents = gathered(target="vllm")
    assert contents["target"] == "vllm"
    fused = gathered(fuse=True)["units"]
    assert len({unit["block"] for unit in contents["units"]}) == len({unit["block"] for unit in fused}) - 1
    assert "embedding" not in {unit["role"] for unit in contents["units"]}
    row = next(row for row in contents["fixed"] if "vllm" in row["why"])
    assert (row["format"], row["loss"]) == (KEPT, 0)
    assert all("embed_tokens" in contents["names"][n] for n in row["names"])


def test_recipes_are_marked_with_their_bytes_and_predicted_loss() -> None:
    mark = Mark("measured", 123, 0.01, (0.009, 0.011), True)
    marks = {entry["name"]: entry for entry in gathered(measured=(mark,))["marks"]}
    assert marks.keys() == {"uniform 3", "uniform 4", "apex", "apex2", "apex3", "measured"}
    assert marks["measured"]["interval_95"] == (0.009, 0.011)
    for name, options in (("uniform 4", {"bits": 4}), ("apex2", {"recipe": "apex2"})):
        made = make_plan(TENSORS, CONFIG, "recipe" if "recipe" in options else "uniform", **options)
        lost = sum(
            EVIDENCE.loss(
                unit, {n: None if made.choice(n).format == KEPT else made.choice(n).format for n in unit.tensors}
            )
            for unit in EVIDENCE.units
        )
        assert marks[name]["loss"] == pytest.approx(lost)
        assert marks[name]["nbytes"] == summary(made, TENSORS, CONFIG).output_bytes


def test_only_widths_that_were_measured_are_offered() -> None:
    contents = gathered(evidence(TENSORS, CONFIG, widths=(3, 5)))
    assert {tuple(unit["widths"]) for unit in contents["units"]} == {(3, 5, 16)}
    assert [entry["name"] for entry in contents["marks"]] == ["uniform 3"]  # the others need 4 bits


def test_evidence_without_tokens_says_that_it_predicts_no_divergence() -> None:
    contents = gathered(evidence(TENSORS, CONFIG, kind="weights"))
    assert (contents["kind"], contents["divergence"]) == ("weights", False)


def test_the_same_input_gives_the_same_contents() -> None:
    assert json.dumps(gathered()) == json.dumps(gathered())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"units": tuple(unit for unit in EVIDENCE.units if Q not in unit.tensors)},
            f"{Q}: the evidence does not have it; calibrate this very model",
        ),
        ({"units": ()}, "the evidence has no unit"),
        (
            {"units": (replace(EVIDENCE.units[0], tensors=("elsewhere.weight",)), *EVIDENCE.units[1:])},
            "elsewhere.weight: the evidence names it, but the source has no such tensor",
        ),
        ({"tensors": evidence(TENSORS, CONFIG, group_size=32).tensors}, "has no error for tq2g128, only for tq2g32"),
    ],
)
def test_evidence_that_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        gathered(replace(EVIDENCE, **change))


def test_parts_of_a_unit_are_predicted_by_the_whole() -> None:
    shapes = {f"model.layers.0.mlp.experts.{n}.down_proj.weight": (64, 128) for n in range(4)}
    tensors, config = infos(shapes), {"model_type": "qwen3_moe", "num_experts_per_tok": 2}
    found = evidence(tensors, config)
    first = next(iter(shapes))
    plan = make_plan(tensors, config, "uniform", overrides=[(first, 4)])
    contents = Contents(plan, tensors, config, found).gathered()
    (unit,), (row,) = contents["units"], contents["fixed"]
    assert len(unit["tensors"][0]["names"]) == 3
    at = {bits: found.loss(found.units[0], dict.fromkeys(shapes, f"tq{bits}g128")) for bits in (2, 4)}
    assert unit["loss"][unit["widths"].index(4)] + row["loss"] == pytest.approx(at[4])
    assert unit["loss"][0] < at[2]
