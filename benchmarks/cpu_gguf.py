"""Random layers of Qwen3.6-35B-A3B's exact shape as GGUF files, in the types that llama.cpp itself gives the whole model.

Which tensor gets which type is asked of llama.cpp: its own ``llama_model_quantize`` is given the whole model with few rows in each matrix,
for it looks at names, numbers of layers, experts and heads, and columns. Layers of the exact shape then repeat rows that it has encoded,
in random order, as fast to read as any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_model import empty
from benchmarks.real_llamacpp import encoded_rows, quantize_file

WHOLE = 40  # layers of the published model
# The layers that are measured are the published ones from here on. Of these four half have the larger types, as half of all 40; and the
# first two are one of each kind, without which llama.cpp runs no model of this architecture.
FIRST, FEWEST = 7, 2
FEW = 2  # rows of each matrix in the model whose types are asked for
SAMPLE = 256  # rows that are encoded
PERIOD = 4  # three of GatedDeltaNet and one of full attention


def write(path: Path, config: Any, types: Mapping[str, Any], seed: int = 0) -> int:
    """A file of this configuration's model, whose layers are ``pattern(…, FIRST)``; bytes of weights that decoding one token reads.

    Args:
        types: of the whole model's tensors, by ``llama_types``.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    random = np.random.default_rng(seed)
    chosen = {name: _borrowed(name, types) for name, _ in tensors(config)}
    writer = _opened(path, config)
    sizes = {}
    for name, shape in tensors(config):
        block, nbytes = GGML_QUANT_SIZES[chosen[name]]
        sizes[name] = math.prod(shape) // block * nbytes
        dtype = np.dtype(np.uint8 if block > 1 else np.float32)
        packed = (*shape[:-1], shape[-1] // block * nbytes) if block > 1 else shape
        writer.add_tensor_info(name, packed, dtype, sizes[name], raw_dtype=chosen[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    known: dict[tuple[int, Any], np.ndarray] = {}
    for name, shape in tensors(config):
        kind = chosen[name]
        if kind == GGMLQuantizationType.F32:
            writer.write_tensor_data(_values(name, shape, random))
            continue
        key = shape[-1], kind
        if key not in known:
            known[key] = encoded_rows(_values(name, (SAMPLE, shape[-1]), random), kind)
        writer.write_tensor_data(known[key][random.integers(SAMPLE, size=shape[:-1])])
    writer.close()
    top_k, experts = config.num_experts_per_tok, config.num_experts
    shares = {"_exps.weight": top_k / experts, "token_embd.weight": 1 / config.vocab_size}
    return round(sum(n * next((s for end, s in shares.items() if name.endswith(end)), 1) for name, n in sizes.items()))


def llama_types(config: Any, ftype: str, work: Path) -> dict[str, Any]:
    """GGUF name -> type, of the whole model quantized as ``ftype``, such as "Q4_K_M", without an importance matrix.

    Args:
        config: of the model; its layers are counted anew.
        work: a folder for two small files, which are removed again.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    whole = type(config)(**config.to_dict() | {"num_hidden_layers": WHOLE, "layer_types": pattern(WHOLE)})
    random, floats, packed = np.random.default_rng(0), work / "thin.gguf", work / f"thin-{ftype}.gguf"
    writer = _opened(floats, whole)
    for name, shape in tensors(whole):
        values = _values(name, (*(min(n, FEW) for n in shape[:-1]), shape[-1]), random)
        stays = len(shape) < 2 or "ffn_gate_inp" in name or "ssm_conv1d" in name  # as its converter has it
        kind = GGMLQuantizationType.F32 if stays else GGMLQuantizationType.F16
        writer.add_tensor(name, values if stays else values.astype(np.float16), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize_file(floats, packed, ftype, {})
    found = {tensor.name: tensor.tensor_type for tensor in GGUFReader(packed).tensors}
    floats.unlink()
    packed.unlink()
    return found


def pattern(layers: int, first: int = 0) -> list[str]:
    """Kinds of so many layers of the published model."""
    numbers = range(first, first + layers)
    return ["full_attention" if number % PERIOD == PERIOD - 1 else "linear_attention" for number in numbers]


def tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(GGUF name, shape as in PyTorch) of each tensor, as llama.cpp's converter makes them."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.QWEN35MOE, config.num_hidden_layers)
    for name, parameter in empty(config).named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("gate_up_proj"):
            halves = (shape[0], shape[1] // 2, shape[2])
            pieces = [(name.replace("gate_up_proj", half), halves) for half in ("gate_proj", "up_proj")]
        else:
            # a vector for one output, and kernels of one channel, lose the axis of 1
            renamed = name.replace("dt_bias", "dt_proj.bias")
            pieces = [(renamed, tuple(n for n in shape if n > 1))]
        for piece, size in pieces:
            found = known.get_name(piece, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise SystemExit(f"{piece}: GGUF has no name for it in a model of type qwen35moe")
            yield found if piece.endswith(("A_log", ".weight", ".bias")) else f"{found}.weight", size


def _borrowed(name: str, types: Mapping[str, Any]) -> Any:
    """The type of a tensor: that of the published layer whose place it takes."""
    head, _, rest = name.partition(".")
    if head != "blk":
        return types[name]
    number, _, tensor = rest.partition(".")
    return types[f"blk.{FIRST + int(number) % PERIOD}.{tensor}"]


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Float32 weights for which states and activations stay finite."""
    if name.endswith("ssm_a"):
        return -random.uniform(1, 16, shape).astype(np.float32)
    if len(shape) < 2:
        return np.ones(shape, np.float32)
    return random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)


def _opened(path: Path, config: Any) -> Any:
    """A writer that has the metadata which llama.cpp's converter writes."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "qwen35moe")
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope.get("mrope_section", [11, 11, 10]), 0])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    recurrent = [kind == "linear_attention" for kind in config.layer_types]
    writer.add_array("qwen35moe.attention.recurrent_layers", recurrent)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    return writer
