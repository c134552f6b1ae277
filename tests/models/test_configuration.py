"""Configurations that transformers writes and reads in its own way, and those of which it makes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from any_model import small_model
from tiny_checkpoints import quantize
from tiny_models import save_tiny

import kappaquant
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.errors import UnsupportedError
from kappaquant.exports.plain import dequantize
from kappaquant.models.configuration import of_content, of_folder
from kappaquant.models.skeleton import parameter_shapes


@pytest.mark.parametrize("written", ["tagged", "bare"])
def test_infinity(tmp_path: Path, written: str) -> None:
    """mamba2's time_step_limit ends in infinity, which transformers writes as an object, and wrote as a word before."""
    source, folder = tmp_path / "source", tmp_path / "quantized"
    small_model("mamba2").save_pretrained(source)
    text = (source / "config.json").read_text()
    if written == "bare":
        text = json.dumps({**json.loads(text), "time_step_limit": [0.0, math.inf]})
        (source / "config.json").write_text(text)
    assert of_folder(source).time_step_limit[1] == math.inf
    assert of_content(json.loads(text)).time_step_limit[1] == math.inf
    quantize(source, folder, container="tq3_native")
    opened = open_checkpoint(folder)
    assert set(opened.keys()) == set(parameter_shapes(source))
    model, _ = kappaquant.load(folder)
    assert model.config.time_step_limit[1] == math.inf
    plain = dequantize(opened, tmp_path / "plain") / "config.json"
    strict = json.loads(plain.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert strict["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_parameters": 7}, "makes no|cannot|can load"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": None}, "None"),
    ],
)
def test_what_transformers_makes_nothing_of(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    content = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(content))
    for read in (lambda: of_content(content), lambda: of_folder(folder)):
        with pytest.raises(UnsupportedError, match=said) as caught:
            read()
        assert "\n" not in str(caught.value)
