"""The kurtosis policy: thresholds and their ladder, roles that are kept whatever they measure, tensors without a number."""

from __future__ import annotations

import re

import pytest
from measured import evidence_of
from planned import DOWN, GATE_UP, OUT, QWEN, TENSORS, Q, plan, quantized

from kappaquant.errors import BudgetError, PlanError
from kappaquant.planning.plan import Plan
from kappaquant.planning.sizes import file_bytes

PROFILE = {Q: 3.0, OUT: 9.0, GATE_UP: 1.0, DOWN: 6.0}


def files(made: Plan) -> int:
    return file_bytes({"model.safetensors": TENSORS}, made.format_of)


def test_kurtosis_thresholds() -> None:
    profile = {Q: 3.99, OUT: 4.0, GATE_UP: 14.999, DOWN: 15.0}
    assert quantized(plan("kurtosis", profile=profile)) == {Q: 3, OUT: 4, GATE_UP: 5}
    made = plan("kurtosis", profile=profile, thresholds=(4, 15.5), ladder=(2, 6))
    assert quantized(made) == {Q: 2, OUT: 6, GATE_UP: 6, DOWN: 6}
    assert made.inputs["thresholds"] == [4, 15.5]
    assert made.choices[OUT].why == "κ 4 < 15.5"
    assert "≥ 15" in plan("kurtosis", profile=profile).choices[DOWN].why


def test_kurtosis_keeps_the_known_roles_whatever_they_measure() -> None:
    made = plan("kurtosis", profile=dict.fromkeys(TENSORS, -0.5))
    assert quantized(made) == dict.fromkeys((Q, OUT, GATE_UP, DOWN), 3)


@pytest.mark.parametrize("kappa", [None, float("nan"), float("inf")])
def test_kurtosis_without_a_number_names_the_tensor(kappa: float | None) -> None:
    profile = {Q: 0.0, OUT: kappa, GATE_UP: 0.0, DOWN: 0.0}
    with pytest.raises(PlanError, match=r"self_attn\.o_proj\.weight: κ = "):
        plan("kurtosis", profile=profile)
    assert plan("kurtosis", profile=profile, overrides=[(OUT, 4)]).bits(OUT) == 4


def test_thresholds_follow_the_size_to_the_largest_plan_that_fits() -> None:
    every = [
        plan("kurtosis", profile=PROFILE, thresholds=(f * 4, f * 8, f * 15)) for f in (n / 500 for n in range(1, 2000))
    ]
    sizes = sorted({files(made) for made in every})
    assert len(sizes) > 6
    for size in (*sizes, *(size + 1000 for size in sizes[:-1])):
        made = plan("kurtosis", profile=PROFILE, size=size)
        assert files(made) == max(taken for taken in sizes if taken <= size)
        factor = made.inputs["factor"]
        same = plan("kurtosis", profile=PROFILE, thresholds=tuple(factor * limit for limit in (4, 8, 15)))
        assert quantized(same) == quantized(made)
        assert made.inputs == {
            "thresholds": [4, 8, 15],
            "ladder": [3, 4, 5],
            "factor": factor,
            "size": size,
            **NOTHING_SET,
        }
    for size, where in ((sizes[0] - 1, "below the smallest"), (sizes[-1] + 1, "above the largest")):
        with pytest.raises(BudgetError, match=rf"size {size:,} .*{where} plan; .*{sizes[0]:,} bytes .*{sizes[-1]:,} "):
            plan("kurtosis", profile=PROFILE, size=size)


NOTHING_SET = {"overrides": [], "fuse": False}


def test_a_size_needs_thresholds_that_it_can_scale() -> None:
    for options in ({"thresholds": (-1, 8, 15)}, {"ladder": (5, 4, 3)}):
        with pytest.raises(PlanError, match=re.escape("thresholds must be above 0 and the ladder ascending")):
            plan("kurtosis", profile=PROFILE, size=10**6, **options)


def test_a_size_where_no_tail_is_heavier_than_a_gaussians() -> None:
    flat = dict.fromkeys(PROFILE, -0.5)
    only = files(plan("kurtosis", profile=flat))
    assert quantized(plan("kurtosis", profile=flat, size=only)) == dict.fromkeys(PROFILE, 3)
    with pytest.raises(BudgetError, match="above the largest"):
        plan("kurtosis", profile=flat, size=only + 1)


def test_the_kurtosis_of_evidence_stands_in_for_a_profile() -> None:
    known = evidence_of(TENSORS, QWEN)
    assert quantized(plan("kurtosis", sensitivity=known)) == quantized(plan("kurtosis", profile=known.kurtosis))
