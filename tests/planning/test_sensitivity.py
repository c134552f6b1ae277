"""Evidence as data: what other formats would lose, its JSON, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kappaquant.errors import PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.inventory import Inventory
from kappaquant.planning.sensitivity import Sensitivities, TensorErrors, Unit, decided, units_of

ERRORS = {"tq2g64": 0.1, "tq3g64": 0.03, "tq4g64": 0.008}
UNIT = Unit(0, "routed experts", "routed_expert.down", ("a", "b"), 3, 0.012, (0.01, 0.014), 7)
FOUND = Sensitivities(
    "calibration", "model", "abc", "0" * 64, {"tokens": 8}, "calibrated", "auto", (UNIT,),
    {"a": TensorErrors(2.0, ERRORS), "b": TensorErrors(6.0, {k: 2 * v for k, v in ERRORS.items()})}, {"a": 0.1, "b": None},
)  # fmt: skip


def test_a_part_loses_in_proportion_to_the_error_of_its_outputs() -> None:
    assert FOUND.loss(UNIT, {"a": "tq3g64", "b": "tq3g64"}) == pytest.approx(0.012)
    assert FOUND.loss(UNIT, {"a": "tq4g64", "b": "tq4g64"}) == pytest.approx(0.012 * 8 / 30)
    assert FOUND.loss(UNIT, {"a": None, "b": "tq3g64"}) == pytest.approx(0.012 * 12 / 14)
    assert FOUND.loss(UNIT, {"a": None, "b": None}) == 0


def test_what_was_measured_in_trellis_codes_tells_of_codebooks() -> None:
    both = {"tq3g64": 0.03, "t3g64": 0.021, "tq4g64": 0.008}
    found = replace(FOUND, tensors={name: TensorErrors(2.0, both) for name in "ab"}, units=(replace(UNIT, kind="t"),))
    (unit,) = found.units
    assert found.loss(unit, {"a": "t3g64", "b": "t3g64"}) == pytest.approx(0.012)
    assert found.loss(unit, {"a": "tq4g64", "b": "tq4g64"}) == pytest.approx(0.012 * 8 / 21)


def test_evidence_from_before_there_were_kinds_is_of_codebooks(tmp_path: Path) -> None:
    data = json.loads(FOUND.to_json())
    del data["units"][0]["kind"]
    (tmp_path / "evidence.json").write_text(json.dumps(data))
    assert Sensitivities.load(tmp_path / "evidence.json") == FOUND


def test_without_a_measured_divergence_it_is_the_error_itself() -> None:
    unit = Unit(0, "routed experts", "routed_expert.down", ("a", "b"), None, None, None, None)
    assert FOUND.loss(unit, {"a": "tq2g64", "b": "tq2g64"}) == pytest.approx((2 * 0.1 + 6 * 0.2) / 8)


def test_json_and_back(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "evidence.json")
    assert Sensitivities.load(tmp_path / "evidence.json") == FOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(evidence_version=2), "no evidence that this version reads"),
        (lambda d: d.pop("units"), "not evidence as calibrate writes it"),
        (lambda d: d.update(more=1), "not evidence as calibrate writes it"),
        (lambda d: d.update(group_size=48), "group size 48: must be .*; calibrate again"),
        (lambda d: d["units"][0].update(kld=-1), "routed experts of layer 0: -1 is no sensitivity"),
        (lambda d: d["units"][0].update(kld="x"), "routed experts of layer 0: 'x' is no sensitivity"),
        (lambda d: d["units"][0].update(kind=["t"]), r"layer 0: was measured in formats \['t'\], which this version"),
        (lambda d: d["tensors"]["a"]["errors"].update(tq3g64=float("nan")), "a: nan is no sensitivity"),
        (lambda d: d["tensors"].pop("b"), "routed experts of layer 0: names b, of which there are no errors"),
    ],
)
def test_what_is_refused(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    data = json.loads(FOUND.to_json())
    change(data)
    (tmp_path / "evidence.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as refused:
        Sensitivities.load(tmp_path / "evidence.json")
    assert str(refused.value).startswith(str(tmp_path / "evidence.json"))


def test_what_was_not_measured_is_named() -> None:
    with pytest.raises(PlanError, match="c: the evidence does not have it"):
        FOUND.loss(UNIT, {"c": "tq3g64"})
    with pytest.raises(PlanError, match="a: the evidence has no error for tq3g128, only for tq2g64, tq3g64, tq4g64"):
        FOUND.loss(UNIT, {"a": "tq3g128"})
    with pytest.raises(PlanError, match="a: the evidence has no error at 8 bits in codebooks, in which"):
        FOUND.format_at("a", 8, "k")
    with pytest.raises(PlanError, match="a: the evidence has no error at 3 bits in trellis codes, in which"):
        FOUND.format_at("a", 3, "t")
    FOUND.check_measured("ab", ["k"])
    message = (
        r"a: the evidence has no error in trellis codes \(t\); calibrate with --formats k,t, or plan with --formats k$"
    )
    with pytest.raises(PlanError, match=message):
        FOUND.check_measured("ab", ["k", "t"])


def test_kinds_are_those_in_which_every_tensor_was_measured() -> None:
    assert FOUND.kinds == ("k",)
    tensors = {name: replace(each, errors={**each.errors, "t3g64t": 0.02}) for name, each in FOUND.tensors.items()}
    assert replace(FOUND, tensors=tensors).kinds == ("k", "t")
    assert replace(FOUND, tensors={**tensors, "b": FOUND.tensors["b"]}).kinds == ("k",)
    assert replace(FOUND, tensors={"a": TensorErrors(1.0, {"t2g64": 0.1})}).kinds == ("t",)
    none_of_both = {"a": FOUND.tensors["a"], "b": TensorErrors(1.0, {"t2g64": 0.1})}
    assert replace(FOUND, tensors=none_of_both).kinds == ("k",)


def test_parts_are_what_one_layer_has_of_one_role_and_embeddings_may_shrink() -> None:
    names = [
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight",
        *(f"model.layers.{layer}.{what}" for layer in (0, 1) for what in (
            "self_attn.q_proj.weight", "mlp.experts.0.up_proj.weight", "mlp.experts.1.up_proj.weight",
        )),
    ]  # fmt: skip
    tensors = {name: TensorInfo(name, "BF16", (256, 256) if "norm" not in name else (256,)) for name in names}
    kinds = Inventory(tensors, {"model_type": "qwen3_moe", "tie_word_embeddings": False}).kinds
    chosen = [name for name in names if decided(kinds[name])]
    assert set(names) - set(chosen) == {"model.norm.weight", "model.layers.0.mlp.gate.weight"}
    units = units_of(kinds, chosen, 4)
    assert [(unit.layer, unit.role, len(unit.tensors)) for unit in units] == [
        (None, "embedding", 1), (None, "lm_head", 1), (0, "attention.q", 1), (0, "routed_expert.up", 2),
        (1, "attention.q", 1), (1, "routed_expert.up", 2),
    ]  # fmt: skip
    assert {unit.bits for unit in units} == {4}
