"""Layers of vLLM outside an engine, on a small quantized checkpoint of mixed widths; needs vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import vllm_checkpoints as tiny
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
from vllm.utils.network_utils import get_open_port

from kappaquant.engines.vllm.config import KappaquantConfig
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX

ATTENTION, MLP, MOE = "model.layers.0.self_attn.", "model.layers.1.mlp.", "model.layers.0.mlp."
QKV = ["q_proj", "k_proj", "v_proj"]
WIDTHS = (
    (f"{ATTENTION}q_proj.weight", 3),
    (f"{ATTENTION}k_proj.weight", 16),
    (f"{ATTENTION}v_proj.weight", "t4g32"),
    (f"{ATTENTION}o_proj.weight", "t3g32"),
)


def quantized(root: Path) -> Path:
    source = tiny.save_source("qwen3_moe", root / "source")
    return tiny.quantize(
        source,
        root / "quantized",
        "apex2",
        (*WIDTHS, ("*experts.3.*", "t3g32"), ("*embed_tokens.weight", 8), ("lm_head.weight", 6)),
    )


@contextmanager
def one_process() -> Iterator[None]:
    """vLLM's layers want a process group and a configuration to exist."""
    with set_current_vllm_config(VllmConfig()):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
            initialize_model_parallel(1)
        yield


def config_of(folder: Path) -> KappaquantConfig:
    made = KappaquantConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    made.packed_modules_mapping = {"qkv_proj": QKV}
    made.maybe_update_config(str(folder))
    return made


def stored(config: KappaquantConfig, name: str) -> list[tuple[str, torch.Tensor]]:
    """(what vLLM calls the layer's parameter, the tensor) for the tensors of one parameter."""
    checkpoint = config.checkpoint
    if checkpoint.format_of(name) is None:
        return [("weight", checkpoint.tensor(name))]
    return [
        ("weight_tq_packed", checkpoint.parts(name)[PACKED_SUFFIX]),
        ("weight_tq_norms", checkpoint.parts(name)[NORMS_SUFFIX]),
    ]
