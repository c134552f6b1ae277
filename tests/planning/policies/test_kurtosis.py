"""The kurtosis policy: thresholds and their ladder, roles that are kept whatever they measure, tensors without a number."""

from __future__ import annotations

import pytest
from planned import DOWN, GATE_UP, OUT, TENSORS, Q, plan, quantized

from kappaquant.errors import PlanError


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
