"""Plans by made-up evidence within bytes, of one tensor of each kind unless others are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from measured import evidence_of
from planned import QWEN, TENSORS

from kappaquant.errors import BudgetError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import Plan
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.planning.sizes import file_bytes

Tensors = Mapping[str, TensorInfo]
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
KNOWN = evidence_of(TENSORS, QWEN, group_size=128)


def plan(
    size: int | None, known: Sensitivities = KNOWN, tensors: Tensors = TENSORS, config: Any = QWEN, **options: Any
) -> Plan:
    options = {"group_size": 128, "sensitivity": known, **options}
    return make_plan(tensors, config, "sensitivity", size=size, **options)


def files(made: Plan, tensors: Tensors = TENSORS) -> int:
    return file_bytes({"model.safetensors": tensors}, made.format_of)


def predicted(made: Plan, known: Sensitivities = KNOWN) -> float:
    formats = {n: fmt.id if (fmt := made.format_of(n)) else None for n in made.choices}
    return sum(known.loss(unit, {name: formats[name] for name in unit.tensors}) for unit in known.units)


def ends(known: Sensitivities = KNOWN, tensors: Tensors = TENSORS, config: Any = QWEN, **options: Any) -> list[int]:
    """Bytes of the smallest and the largest plan, as an error says them."""
    with pytest.raises(BudgetError) as raised:
        plan(1, known, tensors, config, **options)
    said = re.search(r"smallest takes ([\d,]+) bytes .* largest, .*?, ([\d,]+) \(", str(raised.value))
    assert said
    return [int(text.replace(",", "")) for text in said.groups()]
