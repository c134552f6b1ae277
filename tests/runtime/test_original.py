"""Sources stored quantized as transformers models: the models of their bf16, in memory, calibrated and evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import digests
from encoded_sources import KINDS, MXFP4_EXPERTS, encode_folder
from safetensors.torch import load_file, save_file
from tiny_models import character_tokenizer, save_tiny

import kappaquant
from kappaquant import UnsupportedError
from kappaquant.evaluate.documents.markdown import markdown
from kappaquant.evaluate.runs.against import Options, evaluate_against
from kappaquant.evaluate.runs.pair import open_pair
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.runtime import bench
from kappaquant.runtime.original import original_model


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def gpt_oss(folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=3, num_experts_per_tok=2, sliding_window=16, max_position_embeddings=128,
        initial_context_length=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval().bfloat16()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["fp8 blocks", "nvfp4"])
def test_split_experts(kind: str, tmp_path: Path) -> None:
    """Per-expert tensors, each with scales of its own, are merged into the model's as plain ones are."""
    stored = save_tiny("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    plain = encode_folder(stored, KINDS[kind], is_linear)
    assert compared(stored, plain) == 0


def test_mxfp4_experts(tmp_path: Path) -> None:
    """The orientation is the model's own."""
    stored = gpt_oss(tmp_path / "model")
    plain = encode_folder(stored, MXFP4_EXPERTS, lambda name: name.endswith(("gate_up_proj", "down_proj")))
    assert compared(stored, plain) == 0


def compared(stored: Path, plain: Path) -> float:
    tokens = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    models = [original_model(kappaquant.open_source(folder), torch.float32) for folder in (stored, plain)]
    assert models[0].dtype == torch.float32
    assert getattr(models[0].config, "quantization_config", None) is None
    with torch.no_grad():
        first, second = (model(tokens).logits for model in models)
    assert second.std() > 0.01
    return float((first - second).abs().max())


def test_a_text_is_read_by_layers_decoded_alike(tmp_path: Path) -> None:
    stored = save_tiny("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    plain = encode_folder(stored, KINDS["fp8 blocks"], is_linear)
    windows = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(windows, {"file": "text.txt", "tokens": 128, "window": 32, "tokens_sha256": "a"})
    made = []
    for folder in (stored, plain):
        source = kappaquant.open_source(folder)
        plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3, group_size=32)
        out = kappaquant.quantize(source, tmp_path / f"{folder.name}-out", plan, calibration=calibration)
        made.append(digests(out))
        made[-1].pop("kappaquant.json")  # names its source
    assert made[0] == made[1]


def test_a_checkpoint_is_evaluated_against_it(tmp_path: Path) -> None:
    stored = save_tiny("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    encode_folder(stored, KINDS["fp8 blocks"], is_linear)
    character_tokenizer().save_pretrained(stored)
    source = kappaquant.open_source(stored)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=8, group_size=32)
    out = kappaquant.quantize(source, tmp_path / "out", plan)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    found = evaluate_against(open_pair(out, stored), text, tmp_path / "logits", Options(window=64, by_layer=True))
    assert 0 < found.divergence.mean < 0.01
    assert found.source.stored_as == KINDS["fp8 blocks"].label
    assert "stored as fp8, blocks of 128x128" in markdown(found)
    assert found.source.bytes == (stored / "model.safetensors").stat().st_size


def test_speed_is_measured_of_the_decoded_model(tmp_path: Path) -> None:
    stored = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    plain = encode_folder(stored, KINDS["fp8 tensors"], is_linear)
    models = [bench.load_original(str(folder), "cpu") for folder in (stored, plain)]
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


def test_a_generation_config_comes_along(tmp_path: Path) -> None:
    stored = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    encode_folder(stored, KINDS["fp8 tensors"], is_linear)
    (stored / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert original_model(kappaquant.open_source(stored)).generation_config.max_new_tokens == 7


def test_streamed_and_unknown(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    source = kappaquant.open_source(folder)
    source.folder = None  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="leave out --stream"):
        original_model(source)
    state = load_file(folder / "model.safetensors")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(UnsupportedError, match="no configuration that transformers can load"):
        original_model(kappaquant.open_source(folder))
