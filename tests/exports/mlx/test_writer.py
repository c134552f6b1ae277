"""Exported folders in stock mlx_lm: what they compute, what they say of themselves."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlx_exports import (
    CASES,
    KEEP,
    MIXED,
    config_of,
    dequantized,
    export,
    mlx_logits,
    original,
    save,
    stored,
    tokens,
    torch_logits,
)
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant.checkpoints import layout
from kappaquant.exports.mlx import Options, export_mlx, plan_of

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.utils import _get_classes  # noqa: E402


@dataclass
class Exported:
    architecture: str
    source: Path
    kept: Path
    mixed: Path
    report: dict[str, Any]
    kept_report: dict[str, Any]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}{'-tied' if c[2] else ''}")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    architecture, experts, tied = request.param
    folder = tmp_path_factory.mktemp("mlx")
    source = save(architecture, folder / "source", experts=experts, tied=tied)
    kept_report = export(source, folder / "kept", KEEP)
    report = export(source, folder / "mixed", MIXED)
    return Exported(architecture, source, folder / "kept", folder / "mixed", report, kept_report)


def test_folding_changes_no_logits_and_no_words(exported: Exported) -> None:
    model, tokenizer = mlx_lm.load(str(exported.kept))[:2]
    source = original(exported.source)
    expected = torch_logits(source)
    assert np.abs(mlx_logits(model) - expected).max() <= 1e-4 * np.abs(expected).max()
    prompt = tokens()[:1, :9]
    wanted = source.generate(prompt, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)[0, 9:]
    text = mlx_lm.generate(model, tokenizer, prompt=prompt[0].tolist(), max_tokens=6)
    assert text[:3] == tokenizer.decode(wanted.tolist())[:3]
    folded = not exported.architecture.startswith("gemma3")
    assert exported.kept_report["rotated"] == folded
    assert (exported.kept_report["exactness"] is not None) == folded
    if not folded:
        assert any("not rotated" in note and "norms after attention" in note for note in exported.kept_report["notes"])


def test_quantized_logits_are_those_of_the_decoded_weights(exported: Exported) -> None:
    model, tokenizer = mlx_lm.load(str(exported.mixed))[:2]
    got, expected = mlx_logits(model), mlx_logits(dequantized(exported.mixed, exported.kept))
    assert np.abs(got - expected).max() <= 1e-3
    assert np.abs(got - mlx_logits(mlx_lm.load(str(exported.kept))[0])).max() > 1e-2  # it is quantized at all
    assert isinstance(mlx_lm.generate(model, tokenizer, prompt="ab", max_tokens=4), str)


def test_every_path_has_the_bits_of_the_plan(exported: Exported) -> None:
    formats = config_of(exported.mixed)["quantization"]
    assert config_of(exported.mixed)["quantization_config"] == formats
    model = dict(mlx_lm.load(str(exported.mixed))[0].named_modules())
    wanted = {
        "embed_tokens": 6, "o_proj": 4, "k_proj": 5, "in_proj_z": 2, "down_proj": 8, "gate_proj": 3, "q_proj": 3, "in_proj_qkv": 3,
    }  # fmt: skip
    seen = set()
    for path, fmt in formats.items():
        leaf = path.rpartition(".")[2]
        if isinstance(fmt, dict) and leaf in wanted:
            assert fmt["bits"] == wanted[leaf], path
            assert (model[path].bits, model[path].group_size) == (fmt["bits"], fmt["group_size"])
            seen.add(leaf)
    assert {"embed_tokens", "o_proj", "down_proj", "gate_proj"} <= seen
    for path, module in model.items():
        assert ("scales" in module) == (path in formats), path


def test_sanitize_changes_nothing(exported: Exported) -> None:
    """MLX would add 1 to norms beside a conv1d in transformers' layout, and stack or rename experts."""
    config = config_of(exported.mixed)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))  # sanitize comes before any module is quantized
    arrays = stored(exported.mixed)
    sanitized = model.sanitize(dict(arrays))
    assert sanitized.keys() == arrays.keys()
    for name, array in sanitized.items():
        assert array.shape == arrays[name].shape
        assert bool(mx.array_equal(array, arrays[name])), name


def test_what_is_left_out_is_listed(exported: Exported) -> None:
    dropped = {entry["tensors"].partition(".layers")[0]: entry["why"] for entry in exported.report["dropped"]}
    multimodal = exported.architecture in ("qwen3_5_moe", "gemma3_multimodal")
    assert any("vision" in why for why in dropped.values()) == multimodal
    assert set(map(str, config_of(exported.mixed))).isdisjoint({"vision_config", "image_token_id"})


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("qwen3_5", "bfloat16"), ("llama", "float16"), ("gemma3", "bfloat16")]
)
def test_nothing_turns_float32(architecture: str, dtype: str, tmp_path: Path) -> None:
    """One float32 scale would widen all that follows."""
    source = save(architecture, tmp_path / "source", dtype=getattr(torch, dtype))
    report = export(source, tmp_path / "out", MIXED)
    for name, array in stored(tmp_path / "out").items():
        assert array.dtype in (getattr(mx, dtype), mx.uint32), name
    model = mlx_lm.load(str(tmp_path / "out"))[0]
    assert model(mx.array(tokens().numpy())).dtype == getattr(mx, dtype)
    assert any("rounded to" in note for note in report["notes"]) == report["rotated"]


def test_a_log_keeps_its_precision(tmp_path: Path) -> None:
    source = save("qwen3_5", tmp_path / "source", dtype=torch.bfloat16)
    state = load_file(source / "model.safetensors")
    log = "model.layers.0.linear_attn.A_log"
    state[log] = state[log].float() + 1e-4
    save_file(state, source / "model.safetensors", {"format": "pt"})
    export(source, tmp_path / "out", KEEP)
    array = stored(tmp_path / "out")[f"language_model.{log}"]
    assert array.dtype == mx.float32
    assert np.array_equal(np.array(array), state[log].numpy())


def test_no_rotation_leaves_kept_weights_alone(tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "source", dtype=torch.bfloat16)
    report = export(source, tmp_path / "out", KEEP, rotate=False)
    arrays, state = stored(tmp_path / "out"), load_file(source / "model.safetensors")
    assert report["rotated"] is False
    assert report["exactness"] is None
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"):
        assert np.array_equal(np.array(arrays[name].astype(mx.float32)), state[name].float().numpy())
    up = arrays["model.layers.0.mlp.switch_mlp.up_proj.weight"].astype(mx.float32)
    assert np.array_equal(np.array(up[3]), state["model.layers.0.mlp.experts.3.up_proj.weight"].float().numpy())
    assert "quantization" not in config_of(tmp_path / "out")


def test_tied_models_stay_tied_unless_rotated(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", tied=True)
    export(source, tmp_path / "turned", MIXED)
    export(source, tmp_path / "plain", MIXED, rotate=False)
    assert config_of(tmp_path / "turned")["tie_word_embeddings"] is False
    assert config_of(tmp_path / "turned")["quantization"]["lm_head"]["bits"] == 6
    assert config_of(tmp_path / "plain")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in stored(tmp_path / "plain")


def test_bits_and_groups_that_mlx_has_not(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source")
    groups = (("*", 128), ("*.q_proj.weight", 32))
    report = export(source, tmp_path / "out", [("*.up_proj.weight", 7)], groups=groups)
    formats = config_of(tmp_path / "out")["quantization"]
    assert formats["model.layers.0.mlp.up_proj"]["bits"] == 8
    assert formats["model.layers.0.self_attn.q_proj"]["group_size"] == 32
    assert formats["model.layers.0.mlp.down_proj"]["group_size"] == 64  # 192 inputs
    assert any("groups of 64, for 128 does not divide its 192 inputs" in note for note in report["notes"])
    assert report["tensors"]["model.layers.0.mlp.up_proj.weight"]["relative_mse"] < 1e-4
    for fmt in (f for f in formats.values() if isinstance(f, dict)):
        assert fmt["mode"] == "affine"


def test_experts_of_unequal_bits_share_the_most(tmp_path: Path) -> None:
    source = save("mixtral", tmp_path / "source")
    report = export(source, tmp_path / "out", [("*.experts.2.w1.weight", 5)])
    formats = config_of(tmp_path / "out")["quantization"]
    assert formats["model.layers.0.block_sparse_moe.switch_mlp.gate_proj"]["bits"] == 5
    assert formats["model.layers.0.block_sparse_moe.switch_mlp.up_proj"]["bits"] == 3
    assert any("gate_proj: 5 bits for all its experts; the plan has 3, 5" in note for note in report["notes"])


def test_mtp_and_stale_tables_are_left_out(tmp_path: Path) -> None:
    source = save("qwen3_5_moe", tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(256, 128)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    report = export(source, tmp_path / "out", MIXED)
    assert {
        "tensors": "mtp.layers.*.self_attn.q_proj.weight",
        "why": "multi-token prediction, which mlx_lm does not have",
    } in report["dropped"]
    mlx_lm.load(str(tmp_path / "out"))


@pytest.mark.parametrize("target", ["kappaquant", "tq3_native"])
def test_a_quantized_checkpoint_is_exported_as_it_decodes(target: str, tmp_path: Path) -> None:
    source = kappaquant.open_source(save("qwen3_5_moe", tmp_path / "source", experts="fused"))
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4)
    kappaquant.quantize(source, tmp_path / "checkpoint", plan, kappaquant.Options(container=target))  # type: ignore[arg-type]
    checkpoint = kappaquant.open_checkpoint(tmp_path / "checkpoint")
    tensors = {name: checkpoint.entry(name).info for name in checkpoint.keys()}
    keep = kappaquant.make_plan(tensors, checkpoint.config, "uniform", overrides=KEEP)
    report = export_mlx(checkpoint, tmp_path / "kept", keep, Options(dtype="F32"))
    assert report["quantized_twice"] is True
    assert report["notes"][0].startswith(f"quantized twice: the source is a {target} checkpoint")
    model = mlx_lm.load(str(tmp_path / "kept"))[0]
    loaded, _ = kappaquant.load(tmp_path / "checkpoint", dtype=torch.float32, activations="float32")
    expected = torch_logits(loaded)
    assert np.abs(mlx_logits(model) - expected).max() <= 2e-3 * np.abs(expected).max()  # kept tensors may be float16
    export_mlx(checkpoint, tmp_path / "out", plan_of(checkpoint))
    formats = config_of(tmp_path / "out")["quantization"]
    assert formats["language_model.model.layers.0.mlp.switch_mlp.up_proj"]["bits"] == 4
    assert not list((tmp_path / "out").glob("kappaquant.json"))


def test_large_models_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save("qwen3_moe", tmp_path / "source")
    export(source, tmp_path / "one", MIXED)
    monkeypatch.setattr(layout, "SHARD_BYTES", 60_000)
    export(source, tmp_path / "many", MIXED)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(bool(mx.array_equal(one[name], many[name])) for name in one)
    mlx_lm.load(str(tmp_path / "many"))


def test_searching_and_rotating_bring_it_nearer(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", hidden_size=256)
    state = load_file(source / "model.safetensors")
    for name in [n for n in state if n.endswith("_layernorm.weight")]:
        state[name][::37] /= 20.0  # channels of outliers behind a small gain, as trained models have them
        readers = ("self_attn.q", "self_attn.k", "self_attn.v") if "input" in name else ("mlp.gate", "mlp.up")
        for reader in readers:
            state[f"{name[: name.index('.', 13)]}.{reader}_proj.weight"][:, ::37] *= 20.0
    save_file(state, source / "model.safetensors", {"format": "pt"})
    expected = torch_logits(original(source))
    errors = {}
    for effort in ("best", "fast"):
        for rotate in (True, False):
            out = tmp_path / f"{effort}-{rotate}"
            export(source, out, [], effort=effort, rotate=rotate)
            errors[effort, rotate] = np.square(mlx_logits(mlx_lm.load(str(out))[0]) - expected).mean()
    assert errors["best", True] < errors["fast", True] < errors["fast", False]
    assert errors["best", True] < errors["best", False]


def test_stock_server_answers(tmp_path: Path) -> None:
    source = save("qwen3_5_moe_text", tmp_path / "source")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    export(source, tmp_path / "out", MIXED)
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(tmp_path / "out"), "--port", str(port)]
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}).encode()
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    asked = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    answer = json.load(urllib.request.urlopen(asked, timeout=60))
                    break
                except (ConnectionError, urllib.error.URLError):
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
        finally:
            process.terminate()
    assert answer["usage"]["completion_tokens"] == 5
    assert isinstance(answer["choices"][0]["message"]["content"], str)
