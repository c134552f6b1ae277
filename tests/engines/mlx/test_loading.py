"""Quantized checkpoints in mlx_lm: logits and greedy tokens are those of ``kappaquant.load`` in torch, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlx_models import LAYOUTS, TRELLIS, edit_json, edit_shard, quantize, save, tokenizer_to

import kappaquant
from kappaquant.planning.plan import Plan

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402

from kappaquant.engines.mlx import load  # noqa: E402
from kappaquant.engines.mlx.layers import PackedMatrix, PackedSwitchLinear  # noqa: E402

IDS = torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(1))


def open_mlx(folder: Path, dtype: Any = mx.float32) -> Any:
    tokenizer_to(folder)
    return load(folder, dtype)[0]


def torch_logits(model: Any, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=ids).logits.numpy()


def assert_same(folder: Path, dtype: Any = mx.float32) -> Any:
    """Logits within 1e-4 of the largest; returns the models of MLX and torch."""
    ours, theirs = open_mlx(folder, dtype), kappaquant.load(folder, dtype=torch.float32, activations="float32")[0]
    expected, actual = torch_logits(theirs, IDS), np.array(ours(mx.array(IDS.numpy())))
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    assert expected.std() > 0.1  # logits that could tell a difference
    return ours, theirs


def assert_same_tokens(ours: Any, theirs: Any) -> None:
    """Eight greedy tokens: each is the one that torch finds likeliest after the prompt and those before it."""
    found = [int(token) for token, _ in generate_step(mx.array(IDS[0].numpy()), ours, max_tokens=8)]
    logits = torch_logits(theirs, torch.cat([IDS[0], torch.tensor(found)])[None])[0]
    assert found == logits[len(IDS[0]) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(("architecture", "experts"), LAYOUTS)
def test_v1_equals_torch(architecture: str, experts: Any, tmp_path: Path) -> None:
    source = save(architecture, tmp_path / "source", experts=experts)
    model, reference = assert_same(quantize(source, tmp_path / "quantized"))
    assert_same_tokens(model, reference)
    blocks = [len(m.blocks) for m in model.modules() if isinstance(m, PackedSwitchLinear)]
    assert (max(blocks, default=1) > 1) == (experts == "split" and bool(blocks))


@pytest.mark.parametrize(
    ("architecture", "experts"), [("llama", "split"), ("qwen3_moe", "split"), ("qwen3_5_moe", "fused")]
)
def test_trellis_codes_equal_torch(architecture: str, experts: Any, tmp_path: Path) -> None:
    source = save(architecture, tmp_path / "source", experts=experts)
    model, reference = assert_same(quantize(source, tmp_path / "quantized", TRELLIS))
    assert_same_tokens(model, reference)
    held = {m.fmt.id for m in model.modules() if isinstance(m, PackedMatrix)}
    assert held >= {"tq3g64", "t2g128", "t3g64", "t3g256", "t4g32", "t4g64"}
    blocks = [len(m.blocks) for m in model.modules() if isinstance(m, PackedSwitchLinear)]
    assert max(blocks, default=0) == {"llama": 0, "qwen3_moe": 2, "qwen3_5_moe": 1}[architecture]


@pytest.mark.parametrize(("architecture", "experts"), LAYOUTS)
def test_tq3_native_equals_torch(architecture: str, experts: Any, tmp_path: Path) -> None:
    source = save(architecture, tmp_path / "source", experts=experts)
    bits = {"*.q_proj.weight": 4, "*down_proj*": 4, "*.w2.weight": 4, "*experts.1.up_proj.weight": 2}
    assert_same(quantize(source, tmp_path / "quantized", bits, container="tq3_native"))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_5", "qwen3_5_moe"])
def test_tied_heads(architecture: str, tmp_path: Path) -> None:
    assert_same(quantize(save(architecture, tmp_path / "source", tied=True), tmp_path / "quantized"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_5_moe_text"])
def test_packed_embeddings_heads_and_routers(
    architecture: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which policies never make, but a plan by hand may."""
    monkeypatch.setattr(Plan, "check", lambda *args: None)
    bits = {"*embed_tokens.weight": 8, "lm_head.weight": 5, "*mlp.gate.weight": 6, "*shared_expert_gate.weight": 4}
    if architecture == "gemma3":
        bits |= {"*embed_tokens.weight": "t4g64", "lm_head.weight": "t3g32"}
    folder = quantize(save(architecture, tmp_path / "source", tied=tied), tmp_path / "quantized", bits, every=True)
    model, _ = assert_same(folder)
    packed = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, PackedMatrix)}
    assert packed >= ({"embed_tokens"} if tied else {"embed_tokens", "lm_head"})
    assert ("gate" in packed) == (architecture != "gemma3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", ["gate_up_proj", "down_proj"])
def test_half_precision_is_kept(dtype: torch.dtype, kept: str, tmp_path: Path) -> None:
    """A projection of all experts may stay in 16 bits; the rest of the network must not turn to float32."""
    source = save("qwen3_5_moe_text", tmp_path / "source", experts="fused", dtype=dtype)
    model = open_mlx(quantize(source, tmp_path / "quantized", {f"*experts.{kept}": 16}), None)
    logits = model(mx.array(IDS.numpy()))
    assert logits.dtype == {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}[dtype]
    exact = torch_logits(kappaquant.load(tmp_path / "quantized", dtype=torch.float32, activations="float32")[0], IDS)
    error = np.abs(np.array(logits.astype(mx.float32)) - exact).mean() / np.abs(exact).max()
    assert error < {torch.bfloat16: 0.01, torch.float16: 0.002}[dtype]


def test_a_float32_tensor_in_a_bfloat16_checkpoint_does_not_turn_the_residual_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save("qwen3_5_moe", tmp_path / "source", dtype=torch.bfloat16)
    wide = ("A_log", "linear_attn.norm.weight", "input_layernorm.weight", "shared_expert_gate.weight")
    edit_shard(source, lambda s: s.update({n: t.float() for n, t in s.items() if n.endswith(wide)}))
    model = open_mlx(quantize(source, tmp_path / "quantized"), None)
    seen = []
    layer = type(model.layers[0])
    call = layer.__call__
    monkeypatch.setattr(layer, "__call__", lambda self, x, *a, **k: seen.append(x.dtype) or call(self, x, *a, **k))
    assert model(mx.array(IDS.numpy())).dtype == mx.bfloat16
    assert seen == [mx.bfloat16] * 2
    floats = {n.rpartition(".")[2]: a.dtype for n, a in tree_flatten(model.parameters()) if not n.endswith(".weight")}
    assert floats == {
        "A_log": mx.float32, "dt_bias": mx.bfloat16, "codebook": mx.float32, "tq_norms": mx.float16, "tq_packed": mx.uint8
    }  # fmt: skip


@pytest.mark.parametrize("target", ["kappaquant", "tq3_native"])
def test_parameters_count_what_is_held(target: str, tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "source", dtype=torch.float16)
    folder = quantize(source, tmp_path / "quantized", {"*_proj.weight": 5}, container=target)
    parameters = tree_flatten(open_mlx(folder, None).parameters())
    held = sum(array.nbytes for name, array in parameters if not name.endswith("codebook"))
    checkpoint = kappaquant.open_checkpoint(folder)
    stored = sum(checkpoint.nbytes(name) for name in checkpoint.keys())
    assert (
        held == stored if target == "kappaquant" else 0.6 * stored < held < 0.8 * stored
    )  # 5 bits, a byte each on disk


def test_a_marker_that_lies_about_bits_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save("llama", tmp_path / "source")
    folder = quantize(source, tmp_path / "quantized", {"*.q_proj.weight": 4}, container="tq3_native")
    expected = np.array(open_mlx(folder)(mx.array(IDS.numpy())))
    edit_json(folder / "tq_config.json", bits=2, sensitive_bits=4, sensitive_patterns=["k_proj", "mlp"])
    assert np.array_equal(np.array(open_mlx(folder)(mx.array(IDS.numpy()))), expected)
    model = open_mlx(folder)
    assert model.layers[0].self_attn.q_proj.fmt.bits == 4
    assert model.layers[0].self_attn.k_proj.fmt.bits == 3


def test_tq3_native_in_bytes_per_code(tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "source")
    folder = quantize(source, tmp_path / "quantized", {"*_proj.weight": 5}, container="tq3_native")
    assert_same(folder)


def test_multimodal_gemma3(tmp_path: Path) -> None:
    folder = quantize(save("gemma3_multimodal", tmp_path / "source"), tmp_path / "quantized")
    assert_same(folder)
