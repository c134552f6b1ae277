"""Tables that architectures share: regular expressions over names -> role, sets that engines fuse, names of towers.

Rows of a layer match what follows ``layers.N.`` whole; a group, where there is one, is the expert's number.
"""

from __future__ import annotations

from collections.abc import Mapping

from kappaquant.models.role_defaults import Role

ATTENTION: Mapping[str, Role] = {
    r"self_attn\.q_proj\.weight": Role.ATTENTION_Q,
    r"self_attn\.k_proj\.weight": Role.ATTENTION_K,
    r"self_attn\.v_proj\.weight": Role.ATTENTION_V,
    r"self_attn\.qkv_proj\.weight": Role.ATTENTION_QKV,
    r"self_attn\.o_proj\.weight": Role.ATTENTION_O,
}
MLP: Mapping[str, Role] = {
    r"mlp\.gate_proj\.weight": Role.MLP_GATE,
    r"mlp\.up_proj\.weight": Role.MLP_UP,
    r"mlp\.gate_up_proj\.weight": Role.MLP_GATE_UP,
    r"mlp\.down_proj\.weight": Role.MLP_DOWN,
}
EXPERTS: Mapping[str, Role] = {
    r"mlp\.experts\.(\d+)\.gate_proj\.weight": Role.ROUTED_GATE,
    r"mlp\.experts\.(\d+)\.up_proj\.weight": Role.ROUTED_UP,
    r"mlp\.experts\.(\d+)\.down_proj\.weight": Role.ROUTED_DOWN,
    r"mlp\.experts\.gate_up_proj": Role.ROUTED_GATE_UP,
    r"mlp\.experts\.down_proj": Role.ROUTED_DOWN,
    r"mlp\.gate\.weight": Role.ROUTER,
}
SHARED_EXPERT: Mapping[str, Role] = {
    r"mlp\.shared_expert\.gate_proj\.weight": Role.SHARED_GATE,
    r"mlp\.shared_expert\.up_proj\.weight": Role.SHARED_UP,
    r"mlp\.shared_expert\.down_proj\.weight": Role.SHARED_DOWN,
    r"mlp\.shared_expert_gate\.weight": Role.SHARED_EXPERT_GATE,
}
GATED_DELTA_NET: Mapping[str, Role] = {
    r"linear_attn\.in_proj_qkv\.weight": Role.GDN_QKV,
    r"linear_attn\.in_proj_z\.weight": Role.GDN_Z,
    r"linear_attn\.in_proj_qkvz\.weight": Role.GDN_QKVZ,
    r"linear_attn\.in_proj_a\.weight": Role.GDN_A,
    r"linear_attn\.in_proj_b\.weight": Role.GDN_B,
    r"linear_attn\.in_proj_ba\.weight": Role.GDN_BA,
    r"linear_attn\.out_proj\.weight": Role.GDN_OUT,
    r"linear_attn\.conv1d\.weight": Role.GDN_CONV,
    r"linear_attn\.A_log": Role.GDN_A_LOG,
    r"linear_attn\.dt_bias": Role.GDN_DT_BIAS,
    r"linear_attn\.norm\.weight": Role.GDN_NORM,
}
# In a layer, where no row of it matches, or outside of one.
ANYWHERE: Mapping[str, Role] = {
    r"(?:.*\.)?[a-z_]*norm(?:_[a-z]+)?\.weight": Role.NORM,
    r"(?:.*\.)?bias": Role.BIAS,
    r"embed_tokens\.weight": Role.EMBEDDING,
    r"lm_head\.weight": Role.LM_HEAD,
}

STACKED = (Role.ROUTED_GATE_UP, Role.ROUTED_DOWN)

FUSED_ATTENTION = ((Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V),)
FUSED_MLP = ((Role.MLP_GATE, Role.MLP_UP),)
FUSED_EXPERTS = ((Role.ROUTED_GATE, Role.ROUTED_UP), (Role.ROUTED_DOWN,))
FUSED_SHARED_EXPERT = ((Role.SHARED_GATE, Role.SHARED_UP),)
FUSED_GATED_DELTA_NET = ((Role.GDN_QKV, Role.GDN_Z), (Role.GDN_A, Role.GDN_B))

VISION_TOWERS = ("visual", "vision_tower", "vision_model", "multi_modal_projector")
# nn.Linear weights below such a tower; its convolutions, position tables and pooling heads are other things
VISION_LINEAR = (
    r".*\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12]|mlp\.fc[12]|self_attn\.(?:q|k|v|out)_proj)\.weight",
    r"(?:.*\.)?merger\.linear_fc[12]\.weight",
)
MTP_HEADS = ("mtp",)
