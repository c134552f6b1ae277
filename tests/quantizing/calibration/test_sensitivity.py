"""Sensitivities of one pass are those of whole models with one part quantized, and errors those of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import kappaquant
from kappaquant.errors import NonFiniteError
from kappaquant.formats import codec
from kappaquant.formats.registry import format_by_id
from kappaquant.models.skeleton import load_config, model_class
from kappaquant.planning.sensitivity import Sensitivities, Unit
from kappaquant.quantizing.calibration import sensitivity
from kappaquant.quantizing.calibration.sensitivity import sensitivities
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.quantizing.calibration.trials import Trial

WINDOWS = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(0))
ROUNDING, JUDGING = WINDOWS[:6], WINDOWS[6:]
RECORD = {"file": "text.txt", "tokens": 256, "window": 32, "tokens_sha256": "a"}
TEXT = Calibration(WINDOWS, RECORD)


def measured(folder: Path, **trial: Any) -> Sensitivities:
    return sensitivities(kappaquant.open_source(folder), TEXT, Trial(**{"group_size": 32, **trial}), "cpu", jobs=1)


def divergence(folder: Path, unit: Unit, effort: str) -> float:
    """Of a checkpoint with only this unit quantized by the first windows, loaded whole, on the last."""
    source = kappaquant.open_source(folder)
    overrides = [("*", 16), *((name, f"{unit.kind}{unit.bits}") for name in unit.tensors)]
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3, group_size=32, overrides=overrides)
    packed = {name for name, choice in plan.choices.items() if choice.format != "kept"}
    assert packed == set(unit.tensors)
    out = folder.parent / f"{unit.layer}-{unit.role}-{effort}"
    opened = kappaquant.open_checkpoint(
        kappaquant.quantize(
            source,
            out,
            plan,
            kappaquant.Options(device="cpu", jobs=1),
            calibration=Calibration(ROUNDING, RECORD) if effort == "calibrated" else None,
        )
    )
    config = load_config(folder)
    state = {name: opened.dequantize(name).float() for name in opened.keys()}
    made = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    original = model_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = (torch.log_softmax(model(JUDGING).logits, -1) for model in (original, made))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("effort", ["best", pytest.param("calibrated", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("architecture", "experts", "roles"),
    [
        ("llama", "split", ("embedding", "attention.v", "mlp.down")),
        ("qwen3_moe", "split", ("routed_expert.gate", "attention.q")),
        pytest.param("qwen3_5_moe", "fused", ("routed_expert.gate_up", "lm_head"), marks=pytest.mark.slow),
    ],
)
def test_one_pass_measures_what_whole_models_lose(
    architecture: str, experts: tiny_models.Experts, roles: tuple[str, ...], effort: str, tmp_path: Path
) -> None:
    folder = tiny_models.save_tiny(architecture, tmp_path / "source", experts=experts)
    found = measured(folder, effort=effort)
    units = [unit for unit in found.units if unit.role in roles]
    assert {unit.role for unit in units} >= set(roles) - {"lm_head"}
    for unit in units:
        assert unit.kld == pytest.approx(divergence(folder, unit, effort), rel=1e-4, abs=1e-7)


def test_a_pass_in_trellis_codes_measures_what_whole_models_lose(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    found = measured(folder, effort="best", kinds=("t",), kind="t")
    unit = next(unit for unit in found.units if unit.role == "attention.v")
    assert (unit.kind, unit.bits) == ("t", 3)
    assert unit.kld == pytest.approx(divergence(folder, unit, "best"), rel=1e-4, abs=1e-7)
    assert found.loss(unit, dict.fromkeys(unit.tensors, "t3g32")) == pytest.approx(unit.kld)
    assert all(list(known.errors) == ["t2g32", "t3g32", "t4g32"] for known in found.tensors.values())


def test_every_tensor_that_plans_decide_has_its_errors(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny("qwen3_moe", tmp_path / "source", experts="split")
    source, found = kappaquant.open_source(folder), measured(folder, effort="best", bits=4)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3, group_size=32)
    decided = {name for name, choice in plan.choices.items() if choice.format != "kept"}
    embeddings = {name for name in source.tensors if "embed_tokens" in name or "lm_head" in name}
    assert decided <= set(found.tensors) <= decided | embeddings
    assert sorted(name for unit in found.units for name in unit.tensors) == sorted(found.tensors)
    assert all(
        unit.bits == 4 and unit.interval_95 and unit.interval_95[0] <= unit.kld <= unit.interval_95[1]
        for unit in found.units
    )
    assert set(found.kurtosis) == set(found.tensors)
    assert all((unit.tokens is not None) == unit.role.startswith("routed") for unit in found.units)
    for known in found.tensors.values():
        errors = list(known.errors.values())
        assert len(errors) == 7
        assert errors == sorted(errors, reverse=True)


def test_errors_are_those_of_outputs(tmp_path: Path) -> None:
    """Of the first layer's value projection, by the inputs themselves."""
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    found, inputs = measured(folder, effort="best"), []
    model = model_class(load_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    layer = model.model.layers[0].self_attn.v_proj
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ROUNDING)
    known = found.tensors["model.layers.0.self_attn.v_proj.weight"]
    x, weight = torch.cat(inputs), layer.weight.detach()
    assert known.energy == pytest.approx(float((x @ weight.T).square().sum()), rel=1e-3)
    for fmt, error in known.errors.items():
        one = format_by_id(fmt, "v")
        decoded = one.decode(codec.encode(weight, one, "best").parts, weight.shape[-1])
        expected = (x @ (weight - decoded).T).square().sum() / (x @ weight.T).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3)


def test_a_quarter_of_the_windows_judges() -> None:
    windows = torch.arange(64).view(32, 2)
    rounding, judging = sensitivity.split(windows)
    assert torch.equal(torch.cat([rounding, judging]), windows)
    assert len(judging) == 8
    for few, judges in ((2, 1), (3, 1), (7, 1), (8, 2)):
        rounding, judging = sensitivity.split(windows[:few])
        assert (len(rounding), len(judging)) == (few - judges, judges)
    assert all(torch.equal(part, windows[:1]) for part in sensitivity.split(windows[:1]))
    rounding, judging = sensitivity.split(torch.zeros(128, 1024))
    assert judging.numel() == sensitivity.JUDGED_TOKENS


def test_what_judges_has_no_part_in_rounding(tmp_path: Path) -> None:
    """Other windows to judge by change divergences, and no error of outputs; the evidence says how many tokens judged."""
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    source = kappaquant.open_source(folder)
    others = Calibration(torch.cat([ROUNDING, JUDGING.flip(0, 1)]), RECORD)
    one, other = (sensitivities(source, text, Trial(group_size=32), "cpu", jobs=1) for text in (TEXT, others))
    assert one.tensors == other.tensors
    assert all(a.kld != b.kld for a, b in zip(one.units, other.units, strict=True))
    assert one.text == RECORD | {"judged_by": 64}


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    model = model_class(load_config(folder)).from_pretrained(folder)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        measured(folder, effort="best")
