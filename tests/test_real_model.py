"""Real weights: a GGUF made here as a folder, names, rows and values; bytes counted; what is not installed says so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import real_calibrated, real_llamacpp, real_model, real_weights
from benchmarks.real_measure import Bench, Variant, sizes, split
from kappaquant.files.safetensors import TensorInfo

LAYERS, HEADS, KV_HEADS, HIDDEN, INNER = 2, 4, 2, 64, 96
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf is not installed: pip install '.[real-model]'"
)
needs_llamacpp = pytest.mark.skipif(
    real_llamacpp.absent() is not None, reason=f"{real_llamacpp.absent()}: pip install '.[real-model]'"
)


def letters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny llama as GGUF, matrices in Q4_1; and what its weights are after that rounding, in the Hub's order."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter
    from gguf.quants import dequantize, quantize

    path = tmp_path_factory.mktemp("packed") / "tiny.gguf"
    writer, random, true = GGUFWriter(path, "llama"), np.random.default_rng(0), {}
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    tokens = ["<|end|>", *letters(), "12", "th"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["1 2", "t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def add(name: str, other: str, shape: tuple[int, ...], kind: Kind, heads: int = 0) -> None:
        values = random.standard_normal(shape, dtype=np.float32)
        if heads:  # as llama.cpp orders rows for its rotary embedding
            raw = quantize(values.reshape(heads, 2, -1, shape[1]).swapaxes(1, 2).reshape(shape), kind)
        else:
            raw = quantize(values, kind)
        true[name] = dequantize(quantize(values, kind), kind)
        writer.add_tensor(other, raw, raw_dtype=kind)

    add("model.embed_tokens.weight", "token_embd.weight", (len(tokens), HIDDEN), Kind.Q8_0)
    add("model.norm.weight", "output_norm.weight", (HIDDEN,), Kind.F32)
    for layer in range(LAYERS):
        for name, other in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            add(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{other}.weight", (HIDDEN,), Kind.F32)
        for name, other in zip(
            SHAPES, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True
        ):
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(other, 0)
            add(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{other}.weight", SHAPES[name], Kind.Q4_1, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, true


@pytest.fixture(scope="module")
def folder(packed: tuple[Path, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("folder")
    real_weights.write_floats(packed[0], made / real_weights.FLOATS)
    real_weights.write_folder(made / real_weights.FLOATS, made)
    return made


@needs_gguf
def test_folder_holds_the_weights_of_the_file_and_nothing_else(
    packed: tuple[Path, dict[str, np.ndarray]], folder: Path
) -> None:
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    assert found.keys() == packed[1].keys()  # the head is the embedding, once
    for name, values in packed[1].items():
        assert found[name].dtype == torch.float32
        assert np.array_equal(found[name].numpy(), values), name


@needs_gguf
def test_folder_is_a_model_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert (len(info["missing_keys"]), len(info["unexpected_keys"])) == (0, 0)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (model.config.num_key_value_heads, model.config.rope_parameters["rope_theta"]) == (KV_HEADS, 10000.0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the 12<|end|>")["input_ids"])
    assert tokens == ["th", "e", "Ġ", "1", "2", "<|end|>"]  # digits singly, although the vocabulary has a pair
    assert bool(model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all())


@needs_gguf
def test_reading_back_undoes_names_and_rows(packed: tuple[Path, dict[str, np.ndarray]], folder: Path) -> None:
    names = real_weights.gguf_names([*packed[1]], LAYERS)
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    for path, kind in ((packed[0], "Q4_1"), (folder / real_weights.FLOATS, "F32")):
        read = real_weights.read_gguf(path, names, heads)
        assert read.keys() == packed[1].keys()
        for name, (values, nbytes, found) in read.items():
            assert np.array_equal(values, packed[1][name]), name
            if "_proj" in name:
                assert (found, nbytes) == (kind, values.size * 20 // 32 if kind == "Q4_1" else values.size * 4)


@needs_gguf
def test_dither_stays_within_half_a_step(packed: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    from gguf import GGUFReader

    target = tmp_path / "dithered.gguf"
    real_weights.write_floats(packed[0], target, dither=3)
    raw = {t.name: t for t in GGUFReader(packed[0]).tensors}
    plain = {t.name: t.data for t in GGUFReader(_floats(packed[0], tmp_path)).tensors}
    for tensor in GGUFReader(target).tensors:
        moved = np.abs(tensor.data - plain[tensor.name])
        kind = raw[tensor.name].tensor_type.name
        if kind == "F32":
            assert not moved.any()
        else:
            steps = np.abs(real_weights.block_steps(raw[tensor.name].data, real_weights.STEP_BYTES[kind])).repeat(
                32, -1
            )
            assert bool((moved <= steps * 0.5001).all())
            assert 0.2 < float((moved / steps).mean()) < 0.3  # uniform: a quarter


def _floats(packed: Path, folder: Path) -> Path:
    real_weights.write_floats(packed, folder / "floats.gguf")
    return folder / "floats.gguf"


@needs_llamacpp
@pytest.mark.parametrize(("name", "bits", "weighted"), [("Q4_K", 4.5, False), ("IQ3_XXS", 3.0625, True)])
def test_types_run_on_across_rows(name: str, bits: float, weighted: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 576), dtype=np.float32)
    squares = np.linspace(0.5, 2, 576, dtype=np.float32) if weighted else None
    made, nbytes = real_llamacpp.across_rows(weight, name, squares)
    assert made.shape == weight.shape
    assert nbytes == weight.size * bits / 8
    assert 0 < np.square(made - weight).sum() / np.square(weight).sum() < (0.01 if name == "Q4_K" else 0.06)


def test_bytes_of_matrices_and_of_the_model() -> None:
    infos = {
        name: TensorInfo(name, "F32", shape)
        for name, shape in {"embed": (10, 4), "norm": (4,), "a": (4, 4), "b": (2, 8)}.items()
    }
    found = sizes({"a": (torch.zeros(4, 4), 9)}, infos, ("a", "b"))
    assert found["matrix_bytes"] == 9 + 2 * 16  # b is kept: 16 bits
    assert found["matrix_bits_per_weight"] == 8 * 41 / 32
    assert found["model_bytes"] == 41 + 2 * 44
    assert found["model_bits_per_weight"] == 8 * 129 / 76
    with pytest.raises(ValueError, match=r"lm_head: \[4\], the source has no such tensor"):
        sizes({"lm_head": (torch.zeros(4), 9)}, infos, ("a",))


def test_halves_do_not_overlap() -> None:
    ids = list(range(60_000))
    first, second = split(ids, 24, 8)
    assert [len(w) for w in (*first, *second)] == [1024] * 32
    assert first[-1][-1] < 30_000 == second[0][0]
    with pytest.raises(SystemExit, match="the text has 100 tokens, 49152 are needed"):
        split(ids[:100], 24, 8)


def test_what_is_not_installed_is_a_row_that_says_so() -> None:
    variant = Variant("x", "peer", "as it comes", lambda bench: {}, absent=lambda bench: "x is not installed")
    row = Bench.row(None, variant)  # type: ignore[arg-type]
    assert row["absent"] == "x is not installed"
    assert "x is not installed" in real_model.line(row)


def test_rows_have_names_of_their_own_and_keep_their_order() -> None:
    names = [variant.name for variant in real_model.variants()]
    assert len(names) == len(set(names))
    rows = real_model.merged([{"name": names[5]}, {"name": names[1], "old": 1}], {"name": names[1]})
    assert rows == [{"name": names[1]}, {"name": names[5]}]
    with pytest.raises(SystemExit, match="no such row"):
        real_model.chosen(["uniform 99"])


def test_calibrated_methods_say_what_sets_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_calibrated, "PYTHON", Path("nowhere"))
    assert "scripts/calibrated_venv.sh" in (real_calibrated.absent(None) or "")
