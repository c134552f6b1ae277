"""Llama and Mistral: attention and a gated MLP, nothing else."""

from __future__ import annotations

from kappaquant.models.architectures.base import Architecture
from kappaquant.models.architectures.patterns import ATTENTION, FUSED_ATTENTION, FUSED_MLP, MLP
from kappaquant.models.role_defaults import Role

ARCHITECTURES = tuple(
    Architecture(
        model_type,
        (name,),
        in_layer={**ATTENTION, **MLP},
        fused=FUSED_ATTENTION + FUSED_MLP,
        unpacked_in_vllm=(Role.EMBEDDING,),
    )
    for model_type, name in (("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"))
)
