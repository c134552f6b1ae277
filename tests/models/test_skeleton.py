"""The shapes that an architecture gives its parameters are those of its checkpoints, in either layout of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import LAYOUTS, save_tiny

import kappaquant
from kappaquant.errors import UnsupportedError
from kappaquant.models.skeleton import parameter_shapes, place_mtp


@pytest.mark.parametrize(("architecture", "experts"), LAYOUTS)
def test_parameter_shapes(architecture: str, experts: Any, tmp_path: Path) -> None:
    source = kappaquant.open_source(save_tiny(architecture, tmp_path / "source", experts=experts))
    expected = {name: info.shape for name, info in source.tensors.items()}
    assert parameter_shapes(source.config, expected) == expected


def test_parameter_shapes_of_a_multi_token_prediction_layer(tmp_path: Path) -> None:
    config = kappaquant.open_source(save_tiny("qwen3_5_moe", tmp_path / "source")).config
    names = ["mtp.layers.0.mlp.experts.4.up_proj.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight", "x"]
    assert parameter_shapes(config, names) == {names[0]: (128, 128), names[1]: (256, 128), names[2]: (128, 256)}


@pytest.mark.parametrize("experts", ["split", "fused"])
@pytest.mark.parametrize("architecture", ["qwen3_5_moe_text", "qwen3_5_moe"])
def test_a_multi_token_prediction_head_is_accounted_for(architecture: str, experts: Any, tmp_path: Path) -> None:
    source = kappaquant.open_source(save_tiny(architecture, tmp_path / "source", experts=experts))
    prefix = next(name.partition("self_attn.")[0] for name in source.tensors if "self_attn." in name)
    layer = [name.removeprefix(prefix) for name in source.tensors if name.startswith(prefix)]
    names = [f"mtp.layers.0.{name}" for name in layer]
    names += [f"mtp.{name}.weight" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")]
    whole = place_mtp(source.config, [*source.tensors, *names])
    assert not whole.missing
    assert not whole.unexpected
    assert sorted(whole.places) == sorted(names)
    for name in layer:
        assert whole.places[f"mtp.layers.0.{name}"].shape == source.tensors[prefix + name].shape
    assert whole.places["mtp.fc.weight"].shape == (128, 256)

    norm, router = "mtp.pre_fc_norm_hidden.weight", "mtp.layers.0.mlp.gate.weight"
    strange = ["mtp.bias", "mtp.layers.0.mlp.extra.weight", "mtp.layers.1.mlp.gate.weight"]
    broken = place_mtp(source.config, [*(name for name in names if name not in (norm, router)), *strange])
    assert broken.missing == [norm, router]
    assert broken.unexpected == strange
    source.config.get("text_config", source.config)["mtp_num_hidden_layers"] = 2
    assert router.replace("layers.0", "layers.1") in place_mtp(source.config, names).missing


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedError, match="model_type 'nothing'"):
        parameter_shapes({"model_type": "nothing"}, [])
