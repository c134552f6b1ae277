"""The shapes that an architecture gives its parameters are those of its checkpoints, in either layout of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import LAYOUTS, save_tiny

import kappaquant
from kappaquant.errors import UnsupportedError
from kappaquant.models.skeleton import parameter_shapes


@pytest.mark.parametrize(("architecture", "experts"), LAYOUTS)
def test_parameter_shapes(architecture: str, experts: Any, tmp_path: Path) -> None:
    source = kappaquant.open_source(save_tiny(architecture, tmp_path / "source", experts=experts))
    expected = {name: info.shape for name, info in source.tensors.items()}
    assert parameter_shapes(source.config, expected) == expected


def test_parameter_shapes_of_a_multi_token_prediction_layer(tmp_path: Path) -> None:
    config = kappaquant.open_source(save_tiny("qwen3_5_moe", tmp_path / "source")).config
    names = ["mtp.layers.0.mlp.experts.4.up_proj.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight", "x"]
    assert parameter_shapes(config, names) == {names[0]: (128, 128), names[1]: (256, 128), names[2]: (128, 256)}


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedError, match="model_type 'nothing'"):
        parameter_shapes({"model_type": "nothing"}, [])
