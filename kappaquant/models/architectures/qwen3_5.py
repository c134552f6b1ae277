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

_DENSE = {**ATTENTION, **GATED_DELTA_NET, **MLP}
_DENSE_FUSED = FUSED_ATTENTION + FUSED_GATED_DELTA_NET + FUSED_MLP
_MOE = {**_DENSE, **EXPERTS, **SHARED_EXPERT}
_MOE_FUSED = _DENSE_FUSED + FUSED_EXPERTS + FUSED_SHARED_EXPERT

ARCHITECTURES = (
    Architecture("qwen3_5", ("Qwen3_5ForConditionalGeneration",), in_layer=_DENSE, fused=_DENSE_FUSED),
    Architecture("qwen3_5_text", ("Qwen3_5ForCausalLM",), in_layer=_DENSE, fused=_DENSE_FUSED),
    Architecture("qwen3_5_moe", ("Qwen3_5MoeForConditionalGeneration",), in_layer=_MOE, fused=_MOE_FUSED),
    Architecture("qwen3_5_moe_text", ("Qwen3_5MoeForCausalLM",), in_layer=_MOE, fused=_MOE_FUSED),
)
