"""Qwen3.5, dense and MoE: GatedDeltaNet in three layers of four, a vision tower, a multi-token-prediction head."""

from __future__ import annotations

from kappaquant.models.architectures.base import Architecture
from kappaquant.models.architectures.patterns import (
    ATTENTION,
    EXPERTS,
    FUSED_ATTENTION,
    FUSED_EXPERTS,
    FUSED_GATED_DELTA_NET,
    FUSED_MLP,
    FUSED_SHARED_EXPERT,
    GATED_DELTA_NET,
    MLP,
    SHARED_EXPERT,
)
from kappaquant.models.role_defaults import Role

_DENSE = {**ATTENTION, **GATED_DELTA_NET, **MLP}
_DENSE_FUSED = FUSED_ATTENTION + FUSED_GATED_DELTA_NET + FUSED_MLP
_MOE = {**_DENSE, **EXPERTS, **SHARED_EXPERT}
_MOE_FUSED = _DENSE_FUSED + FUSED_EXPERTS + FUSED_SHARED_EXPERT

ARCHITECTURES = tuple(
    Architecture(model_type, (name,), in_layer=in_layer, fused=fused, unpacked_in_vllm=(Role.EMBEDDING,))
    for model_type, name, in_layer, fused in (
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", _DENSE, _DENSE_FUSED),
        ("qwen3_5_text", "Qwen3_5ForCausalLM", _DENSE, _DENSE_FUSED),
        ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", _MOE, _MOE_FUSED),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _MOE, _MOE_FUSED),
    )
)
