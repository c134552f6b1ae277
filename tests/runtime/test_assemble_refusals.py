"""What is not loaded: files that differ from the map, a map that differs from the architecture; refused by tensor name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import quantize
from tiny_models import save_tiny

import kappaquant
from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.errors import FormatError, UnsupportedError


def _edit_shard(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    shard = next(folder.glob("*.safetensors"))
    state = load_file(shard)
    edit(state)
    save_file(state, shard, {"format": "pt"})


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return quantize(save_tiny("qwen3_moe", tmp_path / "source"), tmp_path / "quantized")


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda s: s.pop(f"{EXPERT}.tq_norms"), rf"{EXPERT}\.tq_norms"),
        (lambda s: s.pop("model.norm.weight"), r"model\.norm\.weight"),
        (lambda s: s.update(stray=torch.zeros(3)), "stray"),
        (lambda s: s.update({f"{EXPERT}.tq_packed": s[f"{EXPERT}.tq_packed"][:-1].clone()}), rf"{EXPERT}\.tq_packed"),
    ],
    ids=["norms missing", "kept missing", "extra", "misshapen"],
)
@pytest.mark.parametrize("through", ["load", "from_pretrained"])
def test_files_against_the_map(quantized: Path, through: str, edit: Any, named: str) -> None:
    _edit_shard(quantized, edit)
    loader = kappaquant.load if through == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(FormatError, match=named):
        loader(quantized)


def _forget(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """A checkpoint consistent in itself, but not with the architecture."""
    before = Checkpoint.__init__

    def changed(self: Checkpoint, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        change(self.entries)

    monkeypatch.setattr(Checkpoint, "__init__", changed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (EXPERT, r"model\.layers\.0\.mlp\.experts\.gate_up_proj \(\d+ of \d+ elements are there\): .* needs it"),
        ("model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.up_proj\.weight: .* needs it"),
        ("model.norm.weight", r"model\.norm\.weight: .* needs it"),
    ],
)
def test_a_parameter_no_tensor_fills(quantized: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(monkeypatch, lambda entries: entries.pop(name))
    with pytest.raises(FormatError, match=message):
        kappaquant.load(quantized)


def test_a_tensor_the_model_has_no_place_for(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = "model.layers.0.input_layernorm.weight"
    _forget(monkeypatch, lambda e: e.update({"model.layers.0.other.weight": e[norm]}))
    with pytest.raises(FormatError, match=r"model\.layers\.0\.other\.weight: .* has no place for it"):
        kappaquant.load(quantized)


@pytest.mark.parametrize("through", ["load", "from_pretrained"])
def test_a_shape_the_architecture_does_not_have(tmp_path: Path, through: str) -> None:
    folder = quantize(save_tiny("llama", tmp_path / "source"), tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 256
    (folder / "config.json").write_text(json.dumps(config))
    loader = kappaquant.load if through == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.\w+_proj\.weight: has shape .* wants .*256"):
        loader(folder)


def _set(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(quantization: dict[str, Any]) -> None:
        for key in path[:-1]:
            quantization = quantization[key]
        if value is None:
            del quantization[path[-1]]
        else:
            quantization[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set(("format_version",), 2), "format_version 2"),
        (_set(("rotation",), "other/9"), "rotation 'other/9'"),
        (_set(("tensors", EXPERT), "tq3g77"), rf"{EXPERT}: unknown format id 'tq3g77'"),
        (_set(("codebooks", "tq3g64"), None), r"model\S+: .*no codebook .* for tq3g64"),
    ],
    ids=["version", "rotation", "format id", "codebook"],
)
@pytest.mark.parametrize("through", ["load", "from_pretrained"])
def test_a_quantization_config_not_known_here(quantized: Path, through: str, edit: Any, message: str) -> None:
    config = json.loads((quantized / "config.json").read_text())
    edit(config["quantization_config"])
    (quantized / "config.json").write_text(json.dumps(config))
    loader = kappaquant.load if through == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(FormatError, match=message):
        loader(quantized)


def test_offloading_to_disk_is_refused(quantized: Path) -> None:
    with pytest.raises(UnsupportedError, match="disk"):
        transformers.AutoModelForCausalLM.from_pretrained(quantized, device_map={"": "disk"})
