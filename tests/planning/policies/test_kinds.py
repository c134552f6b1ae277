"""The sensitivity policy with formats of several kinds: never worse than codebooks alone, and the best of all plans that fit."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from budgeted import KNOWN, ends, files, plan, predicted
from headers import in_memory, infos
from measured import evidence_of, with_trellis
from planned import DOWN, GATE_UP, OUT, QWEN, TENSORS, Q

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import BITS
from kappaquant.formats.kinds import name_of
from kappaquant.models.roles import fused_groups
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import rank_of


def test_a_unit_gets_the_kind_in_which_it_loses_less() -> None:
    low, high = ends()
    size = round(low + 0.2 * (high - low))
    scalar = plan(size)
    better, worse = (plan(size, with_trellis(KNOWN, lambda _, f=f: f), kinds="kt") for f in (0.64, 1.1))
    used = {choice.format[:-4] for choice in better.choices.values() if choice.format != "kept"}
    assert used & {"t2", "t3", "t4"}
    assert not used & {"tq2", "tq3", "tq4"}
    assert better.inputs["predicted_kld"] < 0.8 * scalar.inputs["predicted_kld"]
    assert files(better) <= size
    assert worse.choices == scalar.choices
    mixed = plan(low, with_trellis(KNOWN, lambda name: 0.7 if name in (Q, DOWN) else 1.2), kinds="kt")
    assert [mixed.choices[name].format for name in (Q, DOWN, OUT, GATE_UP)] == [
        "t2g128",
        "t2g128",
        "tq2g128",
        "tq2g128",
    ]


@pytest.mark.parametrize("wish", [{}, {"fuse": True}])
def test_more_kinds_never_predict_more(wish: dict[str, Any]) -> None:
    """Whatever was measured of them, unit by unit; and what is fused gets one kind."""
    tensors, config = in_memory("llama")
    draw = random.Random(5)
    known = with_trellis(evidence_of(tensors, config), lambda _: draw.uniform(0.5, 1.5))
    low, high = ends(known, tensors, config, group_size="auto", **wish)
    kinds = set()
    for share in (0, 0.1, 0.3):
        size = round(low + share * (high - low))
        scalar = plan(size, known, tensors, config, group_size="auto", **wish)
        made = plan(size, known, tensors, config, group_size="auto", kinds="kt", **wish)
        assert made.inputs["predicted_kld"] <= scalar.inputs["predicted_kld"]
        assert made.inputs["predicted_kld"] == pytest.approx(predicted(made, known), rel=1e-5)
        assert files(made, tensors) <= size
        for group in (*(unit.tensors for unit in known.units), *(fused_groups(tensors, config) if wish else ())):
            assert len({rank_of(made.choices[name], name) for name in group}) == 1
        kinds |= {name_of(fmt)[0] for name in tensors if (fmt := made.format_of(name)) and fmt.bits < 5}
    assert kinds == {"k", "t"}


def test_it_is_the_best_of_all_plans_of_both_kinds() -> None:
    few = infos({Q: (256, 256), OUT: (256, 128), DOWN: (2, 128, 128)})
    factors = {Q: 0.7, OUT: 1.2, DOWN: 0.9}
    known = with_trellis(evidence_of(few, QWEN, group_size=128, seed=3), factors.__getitem__)
    settings = [*(f"k{bits}" for bits in BITS), "t2", "t3", "t4", 16]
    every = [
        made
        for chosen in product(settings, repeat=3)
        if (made := make_plan(few, QWEN, overrides=list(zip(few, chosen, strict=True)), group_size=128))
    ]
    low, high = ends(known, few)
    for share in (0, 0.03, 0.1, 0.37):
        size = round(low + share * (high - low))
        best = min(predicted(made, known) for made in every if files(made, few) <= size)
        assert predicted(plan(size, known, few, kinds="kt"), known) == pytest.approx(best, rel=1e-9)


def test_all_that_were_measured_are_chosen_from_by_default() -> None:
    both = with_trellis(KNOWN, lambda _: 0.7)
    low, high = ends(both)
    size = low + (high - low) // 5
    made = plan(size, both)
    assert made == plan(size, both, kinds="kt")
    assert made.kinds == ("k", "t")
    assert {name_of(fmt) for name in TENSORS if (fmt := made.format_of(name))} & {"t2", "t3", "t4"}
    before = plan(size)
    assert before == plan(size, kinds="k")
    assert "formats" not in before.inputs


@pytest.mark.parametrize("policy", ["uniform", "recipe", "kurtosis"])
def test_rules_keep_to_codebooks_whatever_was_measured(policy: str) -> None:
    both = with_trellis(KNOWN, lambda _: 0.7)
    made = make_plan(TENSORS, QWEN, policy, sensitivity=both, overrides=[("lm_head.weight", 3)])
    assert (
        made.choices
        == make_plan(TENSORS, QWEN, policy, sensitivity=both, overrides=[("lm_head.weight", 3)], kinds="k").choices
    )
    assert {choice.format[:2] for choice in made.choices.values()} <= {"tq", "ke"}
    assert "formats" not in made.inputs


def test_trellis_codes_alone() -> None:
    known = with_trellis(KNOWN, lambda _: 0.7)
    low, high = ends(known)
    made = plan(low + (high - low) // 3, known, kinds="t")
    assert {name_of(fmt) for name in TENSORS if (fmt := made.format_of(name))} <= {"t2", "t3", "t4"}
    assert made.inputs["formats"] == ["t"]


def test_kinds_that_were_not_measured_are_named() -> None:
    with pytest.raises(
        PlanError, match=r"no error in trellis codes \(t\); calibrate with --formats k,t, or plan with --formats k$"
    ):
        plan(10**6, kinds="kt")
    alone = {n: replace(e, errors={"t3g128": 0.02}) for n, e in KNOWN.tensors.items()}
    with pytest.raises(
        PlanError, match=r"no error in codebooks \(k\); calibrate with --formats k, or plan with --formats t$"
    ):
        plan(10**6, replace(KNOWN, tensors=alone), kinds="k")
