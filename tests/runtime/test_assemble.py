"""quantize -> load: logits equal those of the plain architecture that carries the dequantized weights."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import preparations
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import quantize
from tiny_models import LAYOUTS, WITH_EXPERTS, save_tiny

import kappaquant
from kappaquant.checkpoints.side_files import MANIFEST_NAME
from kappaquant.engines.transformers.hooks import KappaquantConfig, KappaquantQuantizer
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.planning.plan import Plan
from kappaquant.runtime.assemble import set_activations
from kappaquant.runtime.experts import QuantExperts
from kappaquant.runtime.packed import PackedWeight, QuantEmbedding, QuantLinear


def _reference(folder: Path, target: Path) -> Any:
    """The architecture as transformers loads it from the dequantized tensors."""
    checkpoint = kappaquant.open_checkpoint(folder)
    target.mkdir()
    state = {name: checkpoint.dequantize(name).contiguous() for name in checkpoint.keys()}
    save_file(state, target / "model.safetensors", {"format": "pt"})
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config))
    cls = getattr(transformers, config["architectures"][0])
    model, info = cls.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def _logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    if not inputs:
        inputs = {"input_ids": torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        return model(**inputs).logits


def _assert_equal(model: Any, reference: Any, **inputs: torch.Tensor) -> None:
    actual, expected = _logits(model, **inputs), _logits(reference, **inputs)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-4  # the bar is 1e-3
    assert float(expected.std()) > 0.1  # logits that could tell a difference


@pytest.fixture
def any_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quantize write what the planner would refuse: a loader must take what others may have written."""
    monkeypatch.setattr(Plan, "check", lambda *args: None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("architecture", "experts"), LAYOUTS)
def test_logits_equal_the_dequantized_model(architecture: str, experts: Any, tied: bool, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source", experts=experts, tied=tied)
    folder = quantize(source, tmp_path / "quantized")
    model, tokenizer = kappaquant.load(folder, activations="float32")
    assert tokenizer is None
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    assert any(isinstance(m, QuantExperts) for m in model.modules()) == (architecture in WITH_EXPERTS)
    _assert_equal(model, _reference(folder, tmp_path / "reference"))
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert held <= 1.1 * sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))


@pytest.mark.usefixtures("any_plan")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_5_moe_text"])
def test_packed_embeddings_heads_and_routers(architecture: str, tied: bool, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source", tied=tied)
    bits = {"*embed_tokens.weight": 8}
    if not tied:
        bits["lm_head.weight"] = 5
    if architecture in WITH_EXPERTS:
        bits["*mlp.gate.weight"] = 6
    folder = quantize(source, tmp_path / "quantized", bits)
    model, _ = kappaquant.load(folder, activations="float32")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert (embedding.weight is head.weight) == tied
    _assert_equal(model, _reference(folder, tmp_path / "reference"))


@pytest.mark.usefixtures("any_plan")
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "qwen3_5_moe"])
def test_experts_of_one_layer_may_differ(architecture: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source")
    gate, up, down = ("w1", "w3", "w2") if architecture == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    bits = {f"*experts.0.{gate}.weight": 16, f"*experts.1.{up}.weight": 6, f"*experts.2.{down}.weight": 2}
    folder = quantize(source, tmp_path / "quantized", bits | {f"*experts.3.{down}.weight": 16})
    model, _ = kappaquant.load(folder, activations="float32")
    blocks = next(m for m in model.modules() if isinstance(m, QuantExperts)).gate_up_proj.blocks
    assert len(blocks) == 5  # experts 2-4 whole; of 0 and 1 the gate and the up rows each
    _assert_equal(model, _reference(folder, tmp_path / "reference"))


@pytest.mark.parametrize(("kept", "other"), [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")])
def test_one_of_two_fused_projections_may_be_kept(kept: str, other: str, tmp_path: Path) -> None:
    source = save_tiny("qwen3_5_moe_text", tmp_path / "source", experts="fused")
    folder = quantize(source, tmp_path / "quantized", {f"*experts.{kept}": 16, f"*experts.{other}": 4})
    _assert_equal(kappaquant.load(folder, activations="float32")[0], _reference(folder, tmp_path / "reference"))


def test_auto_model_loads_after_import_alone(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source")
    folder = quantize(source, tmp_path / "quantized")
    model, _ = kappaquant.load(folder)
    torch.save(_logits(model), tmp_path / "expected.pt")
    code = f"""
import kappaquant, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
ids = torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    assert torch.equal(model(ids).logits, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("any_plan")
def test_transformers_has_nothing_to_report(tmp_path: Path) -> None:
    source = save_tiny("qwen3_5_moe", tmp_path / "source")
    folder = quantize(source, tmp_path / "quantized", {"*experts.0.up_proj.weight": 16, "*embed_tokens.weight": 8})
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_the_manifest_of_a_hub_snapshot_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    quantize(save_tiny("llama", tmp_path / "source"), snapshot)
    shutil.move(snapshot / MANIFEST_NAME, tmp_path / MANIFEST_NAME)
    fetched = []

    def download(repo: str, name: str, revision: str, cache_dir: Path) -> None:
        fetched.append((repo, name, revision, cache_dir))
        shutil.copy(tmp_path / name, snapshot / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config = transformers.AutoConfig.from_pretrained(snapshot)
    quantizer = KappaquantQuantizer(KappaquantConfig(**config.quantization_config))
    model = types.SimpleNamespace(config=types.SimpleNamespace(name_or_path="owner/name"))
    assert quantizer._open(model, [str(snapshot / "model.safetensors")]).keys()
    assert fetched == [("owner/name", MANIFEST_NAME, "0123abc", tmp_path / "cache")]


def test_multimodal_with_an_image(tmp_path: Path) -> None:
    source = save_tiny("qwen3_5_moe", tmp_path / "source", experts="fused")
    folder = quantize(source, tmp_path / "quantized")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    set_activations(model, "float32")
    ids = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 7, 8]])
    image = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    inputs = {
        "input_ids": ids,
        "pixel_values": image,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 90).int(),
    }
    reference = _reference(folder, tmp_path / "reference")
    _assert_equal(model, reference, **inputs)
    blind = _logits(reference, **{**inputs, "pixel_values": torch.zeros_like(image)})
    assert not torch.allclose(blind, _logits(reference, **inputs))  # the image reaches the logits


def test_the_language_model_alone_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    source = save_tiny("qwen3_5_moe", tmp_path / "source")
    folder = quantize(source, tmp_path / "quantized")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    text = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(text, transformers.Qwen3_5MoeForCausalLM)
    assert torch.allclose(_logits(text), _logits(whole), atol=1e-5)


def test_a_device_map_places_packed_weights(tmp_path: Path) -> None:
    folder = quantize(save_tiny("qwen3_moe", tmp_path / "source"), tmp_path / "quantized")
    mapped = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert torch.equal(_logits(mapped).cpu(), _logits(kappaquant.load(folder, device=mapped.device)[0]).cpu())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dtype(dtype: torch.dtype | None, tmp_path: Path) -> None:
    folder = quantize(save_tiny("mixtral", tmp_path / "source", dtype=torch.bfloat16), tmp_path / "quantized")
    model, _ = kappaquant.load(folder, dtype=dtype, activations="float32")
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    assert _logits(model).dtype == (dtype or torch.bfloat16)


@pytest.mark.parametrize(("architecture", "experts"), LAYOUTS)
def test_tq3_native(architecture: str, experts: Any, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source", experts=experts, dtype=torch.bfloat16)
    folder = quantize(source, tmp_path / "quantized", container="tq3_native")
    model, _ = kappaquant.load(folder, dtype=torch.float32, activations="float32")
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    _assert_equal(model, _reference(folder, tmp_path / "reference"))


def test_tq3_native_with_a_stale_index_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = quantize(save_tiny("llama", tmp_path / "source"), tmp_path / "quantized", container="tq3_native")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    shutil.move(next(folder.glob("*.safetensors")), folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING, "kappaquant"):
        model, _ = kappaquant.load(folder, dtype=torch.float32, activations="float32")
    assert "stale" in caplog.text
    _assert_equal(model, _reference(folder, tmp_path / "reference"))


def test_q_k_v_and_gate_up_share_rotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = kappaquant.load(
        quantize(save_tiny("llama", tmp_path / "source"), tmp_path / "quantized"), activations="float32"
    )
    counted = preparations.counted(monkeypatch)
    _logits(model)
    assert len(counted) == 2 * 4  # a layer: q/k/v, o, gate/up, down
    assert model.model.layers[0].self_attn.q_proj.shared._last is None  # nothing outlives the pass


def test_a_deep_copy_and_a_state_dict_round_trip(tmp_path: Path) -> None:
    model, _ = kappaquant.load(
        quantize(save_tiny("mixtral", tmp_path / "source"), tmp_path / "quantized"), activations="float32"
    )
    expected = _logits(model)
    twin = copy.deepcopy(model)
    for weight in (m for m in twin.modules() if isinstance(m, PackedWeight)):
        weight.get_buffer("tq_packed").zero_()
    assert not torch.equal(_logits(twin), expected)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(_logits(twin), expected)


def test_saving_a_loaded_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, _ = kappaquant.load(
        quantize(save_tiny("llama", tmp_path / "source"), tmp_path / "quantized"), activations="float32"
    )
    with pytest.raises(UnsupportedError, match="copy its checkpoint folder"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("plainly", [True, False])
def test_a_table_of_older_checkpoints_is_no_obstacle(plainly: bool, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = quantize(source, tmp_path / "out")
    if plainly:
        model, _ = kappaquant.load(out, activations="float32")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())


def test_unquantized_models_still_load(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    assert transformers.AutoModelForCausalLM.from_pretrained(source).model.layers[0].mlp.up_proj.weight.dim() == 2
    with pytest.raises(FormatError, match="not quantized"):
        kappaquant.load(source)
