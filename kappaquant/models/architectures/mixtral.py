"""Mixtral: routed experts, which checkpoints call ``block_sparse_moe`` and w1, w3, w2; newer code calls them as Qwen does."""

from __future__ import annotations

from kappaquant.models.architectures.base import Architecture
from kappaquant.models.architectures.patterns import ATTENTION, FUSED_ATTENTION, FUSED_EXPERTS
from kappaquant.models.role_defaults import Role

_BLOCK = r"(?:mlp|block_sparse_moe)\."
_EXPERTS = {
    _BLOCK + r"experts\.(\d+)\.(?:gate_proj|w1)\.weight": Role.ROUTED_GATE,
    _BLOCK + r"experts\.(\d+)\.(?:up_proj|w3)\.weight": Role.ROUTED_UP,
    _BLOCK + r"experts\.(\d+)\.(?:down_proj|w2)\.weight": Role.ROUTED_DOWN,
    _BLOCK + r"experts\.gate_up_proj": Role.ROUTED_GATE_UP,
    _BLOCK + r"experts\.down_proj": Role.ROUTED_DOWN,
    _BLOCK + r"gate\.weight": Role.ROUTER,
}

ARCHITECTURES = (
    Architecture(
        "mixtral",
        ("MixtralForCausalLM",),
        in_layer={**ATTENTION, **_EXPERTS},
        fused=FUSED_ATTENTION + FUSED_EXPERTS,
        unpacked_in_vllm=(Role.EMBEDDING,),
    ),
)
