"""Qwen3-MoE: routed experts in most layers, a dense MLP in those that ``mlp_only_layers`` lists."""

from __future__ import annotations

from kappaquant.models.architectures.base import Architecture
from kappaquant.models.architectures.patterns import (
    ATTENTION,
    EXPERTS,
    FUSED_ATTENTION,
    FUSED_EXPERTS,
    FUSED_MLP,
    MLP,
)

ARCHITECTURES = (
    Architecture(
        "qwen3_moe",
        ("Qwen3MoeForCausalLM",),
        in_layer={**ATTENTION, **MLP, **EXPERTS},
        fused=FUSED_ATTENTION + FUSED_MLP + FUSED_EXPERTS,
    ),
)
