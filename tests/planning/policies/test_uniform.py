"""The uniform policy: the same bits for every tensor that may have them."""

from __future__ import annotations

import pytest
from planned import DOWN, GATE_UP, OUT, QWEN, TENSORS, Q, plan, quantized

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.planning.make import make_plan


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform(bits: int) -> None:
    made = plan(bits=bits)
    assert quantized(made) == dict.fromkeys((Q, OUT, GATE_UP, DOWN), bits)
    assert made.choices.keys() == TENSORS.keys()
    assert all(choice.why for choice in made.choices.values())
    assert made.format_of(Q) == CodebookFormat(bits, 128)
    assert made.format_of("lm_head.weight") is None


def test_uniform_16_keeps_everything() -> None:
    assert quantized(plan(bits=16)) == {}


def test_trellis_codes_take_the_widths_that_they_have() -> None:
    for bits, kinds, expected in ((3, "kt", "t3g128"), (3, "t", "t3g128"), (6, "kt", "tq6g128"), (3, "k", "tq3g128")):
        made = make_plan(TENSORS, QWEN, "uniform", bits=bits, kinds=kinds, group_size=128, overrides=[(OUT, 4)])
        assert made.choice(Q).format == expected
        assert made.choice(OUT).format == ("t4g128" if "t" in kinds else "tq4g128")
        assert made.inputs.get("formats") == (None if kinds == "k" else list(kinds))
    with pytest.raises(PlanError, match=r"q_proj\.weight: formats t have no width of 6 bits"):
        make_plan(TENSORS, QWEN, "uniform", bits=6, kinds="t")
