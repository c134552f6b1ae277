"""The uniform policy: the same bits for every tensor that may have them."""

from __future__ import annotations

import pytest
from planned import DOWN, GATE_UP, OUT, TENSORS, Q, plan, quantized

from kappaquant.formats.codebook import CodebookFormat


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
