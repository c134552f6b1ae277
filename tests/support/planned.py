"""Plans of one tensor of each kind, of headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headers import infos

from kappaquant.files.safetensors import TensorInfo
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import Plan

QWEN = {"model_type": "qwen3_5_moe", "tie_word_embeddings": False, "text_config": {"num_experts_per_tok": 2}}
PREFIX = "model.language_model.layers.0."
SHAPES = {
    PREFIX + "self_attn.q_proj.weight": (256, 256),
    PREFIX + "self_attn.o_proj.weight": (256, 256),
    PREFIX + "mlp.experts.gate_up_proj": (4, 256, 256),
    PREFIX + "mlp.experts.down_proj": (4, 256, 128),
    PREFIX + "mlp.shared_expert.down_proj.weight": (256, 64),
    PREFIX + "mlp.gate.weight": (4, 256),
    PREFIX + "input_layernorm.weight": (256,),
    "model.language_model.embed_tokens.weight": (160, 256),
    "lm_head.weight": (160, 256),
    "model.visual.blocks.0.mlp.linear_fc1.weight": (256, 128),
    "model.visual.patch_embed.proj.weight": (64, 3, 2, 16, 16),
    "mtp.layers.0.self_attn.q_proj.weight": (256, 256),
}
TENSORS = infos(SHAPES)
Q, OUT, GATE_UP, DOWN, SHARED_DOWN = list(SHAPES)[:5]


def plan(
    policy: str = "uniform",
    tensors: Mapping[str, TensorInfo] = TENSORS,
    config: Mapping[str, Any] = QWEN,
    **options: Any,
) -> Plan:
    return make_plan(tensors, config, policy, **{"group_size": 128, **options})


def quantized(made: Plan) -> dict[str, int]:
    """Bits of the tensors that are not kept."""
    return {name: made.bits(name) for name in made.choices if made.bits(name) != 16}
