"""The words for what a tensor is: its role in the model, and each role's default, whatever the architecture."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """The job of a tensor in the model. Everything under the vision tower is VISION, under the MTP head MTP.

    LINEAR, RECURRENT and TOWER are for architectures without a table, where modules tell more than names.
    """

    ROUTER = "router"
    ROUTED_GATE = "routed_expert.gate"
    ROUTED_UP = "routed_expert.up"
    ROUTED_GATE_UP = "routed_expert.gate_up"
    ROUTED_DOWN = "routed_expert.down"
    SHARED_GATE = "shared_expert.gate"
    SHARED_UP = "shared_expert.up"
    SHARED_DOWN = "shared_expert.down"
    SHARED_EXPERT_GATE = "shared_expert_gate"
    ATTENTION_Q = "attention.q"
    ATTENTION_K = "attention.k"
    ATTENTION_V = "attention.v"
    ATTENTION_QKV = "attention.qkv"
    ATTENTION_O = "attention.o"
    MLP_GATE = "mlp.gate"
    MLP_UP = "mlp.up"
    MLP_GATE_UP = "mlp.gate_up"
    MLP_DOWN = "mlp.down"
    GDN_QKV = "gated_delta_net.in_proj_qkv"
    GDN_Z = "gated_delta_net.in_proj_z"
    GDN_QKVZ = "gated_delta_net.in_proj_qkvz"
    GDN_A = "gated_delta_net.in_proj_a"
    GDN_B = "gated_delta_net.in_proj_b"
    GDN_BA = "gated_delta_net.in_proj_ba"
    GDN_OUT = "gated_delta_net.out_proj"
    GDN_CONV = "gated_delta_net.conv1d"
    GDN_A_LOG = "gated_delta_net.A_log"
    GDN_DT_BIAS = "gated_delta_net.dt_bias"
    GDN_NORM = "gated_delta_net.norm"
    NORM = "norm"
    BIAS = "bias"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    LINEAR = "linear"
    RECURRENT = "recurrence"
    VISION = "vision"
    TOWER = "tower"
    MTP = "mtp"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class RoleFacts:
    """One row of the defaults table.

    Attributes:
        family: the name reports group it under.
        packable: it may be quantized at all: it is the weight of an nn.Linear, or routed experts.
        keep: why the policies leave it in 16 bits; empty when they choose its bits.
    """

    family: str
    packable: bool
    keep: str = ""


# family, its roles, packable, why kept (empty: policies choose)
_FAMILIES: list[tuple[str, tuple[Role, ...], bool, str]] = [
    ("routed gate_proj / up_proj", (Role.ROUTED_GATE, Role.ROUTED_UP, Role.ROUTED_GATE_UP), True, ""),
    ("routed down_proj", (Role.ROUTED_DOWN,), True, ""),
    ("shared expert gate_proj", (Role.SHARED_GATE,), True, ""),
    ("shared expert up_proj", (Role.SHARED_UP,), True, ""),
    ("shared expert down_proj", (Role.SHARED_DOWN,), True, ""),
    (
        "attention q/k/v/o",
        (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_QKV, Role.ATTENTION_O),
        True,
        "",
    ),
    ("mlp gate_proj / up_proj", (Role.MLP_GATE, Role.MLP_UP, Role.MLP_GATE_UP), True, ""),
    ("mlp down_proj", (Role.MLP_DOWN,), True, ""),
    ("GatedDeltaNet in_proj_qkv / in_proj_z", (Role.GDN_QKV, Role.GDN_Z, Role.GDN_QKVZ), True, ""),
    ("GatedDeltaNet out_proj", (Role.GDN_OUT,), True, ""),
    (
        "GatedDeltaNet in_proj_a / in_proj_b",
        (Role.GDN_A, Role.GDN_B, Role.GDN_BA),
        True,
        "decides how every head forgets and writes, and is tiny",
    ),
    (
        "GatedDeltaNet conv1d / A_log / dt_bias",
        (Role.GDN_CONV, Role.GDN_A_LOG, Role.GDN_DT_BIAS),
        False,
        "parameter of the GatedDeltaNet recurrence: tiny, and its error compounds over the sequence",
    ),
    ("router", (Role.ROUTER,), False, "router: a small error sends tokens to other experts, and it is tiny"),
    ("shared_expert_gate", (Role.SHARED_EXPERT_GATE,), True, "one row that scales the whole shared expert"),
    ("norms", (Role.NORM, Role.GDN_NORM), False, "norm gain: one-dimensional"),
    ("biases", (Role.BIAS,), False, "bias: one-dimensional"),
    ("embeddings", (Role.EMBEDDING,), True, "embedding: a token reads one row of it, so packing saves no time"),
    ("lm_head", (Role.LM_HEAD,), True, "lm_head: its error goes straight into the logits"),
    ("other linear layers", (Role.LINEAR,), True, ""),
    (
        "projections of recurrences",
        (Role.RECURRENT,),
        True,
        "steers a recurrence: its error compounds over the sequence",
    ),
    ("other towers", (Role.TOWER,), True, "encoder of other things than text: idle while text is decoded"),
    ("vision", (Role.VISION,), True, "vision tower: idle while text is decoded, and its κ reaches the hundreds"),
    ("mtp", (Role.MTP,), True, "multi-token-prediction head: only speculative decoding reads it"),
    ("unknown", (Role.UNKNOWN,), True, "not recognized"),
]
ROLES: dict[Role, RoleFacts] = {
    role: RoleFacts(family, packable, keep) for family, roles, packable, keep in _FAMILIES for role in roles
}
