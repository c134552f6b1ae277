"""Qwen3, dense: Llama's projections, with norms of q and k."""

from __future__ import annotations

from kappaquant.models.architectures.base import Architecture
from kappaquant.models.architectures.patterns import ATTENTION, FUSED_ATTENTION, FUSED_MLP, MLP

ARCHITECTURES = (
    Architecture("qwen3", ("Qwen3ForCausalLM",), in_layer={**ATTENTION, **MLP}, fused=FUSED_ATTENTION + FUSED_MLP),
)
