"""Gemma 3, with and without its vision tower: Llama's projections between four norms, and a tied head it does not mention."""

from __future__ import annotations

from kappaquant.models.architectures.base import Architecture
from kappaquant.models.architectures.patterns import ATTENTION, FUSED_ATTENTION, FUSED_MLP, MLP

ARCHITECTURES = tuple(
    Architecture(
        model_type,
        (name,),
        in_layer={**ATTENTION, **MLP},
        fused=FUSED_ATTENTION + FUSED_MLP,
        tied_embeddings=True,
    )
    for model_type, name in (
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "Gemma3ForCausalLM"),
    )
)
