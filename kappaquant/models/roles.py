"""What a tensor is: its role, by one table of patterns over the structural part of its name, and each role's default."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from kappaquant.formats.codebook import QUANTIZABLE_DTYPES, TensorInfo


class Role(StrEnum):
    """The job of a tensor in the model. Everything under the vision tower is VISION, under the MTP head MTP."""

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
    VISION = "vision"
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
    ("vision", (Role.VISION,), True, "vision tower: idle while text is decoded, and its κ reaches the hundreds"),
    ("mtp", (Role.MTP,), True, "multi-token-prediction head: only speculative decoding reads it"),
    ("unknown", (Role.UNKNOWN,), True, "not recognized"),
]
ROLES: dict[Role, RoleFacts] = {
    role: RoleFacts(family, packable, keep) for family, roles, packable, keep in _FAMILIES for role in roles
}

# model_type -> the class names config.json may give instead of it
KNOWN_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "gemma3": ("Gemma3ForConditionalGeneration",),
    "gemma3_text": ("Gemma3ForCausalLM",),
    "llama": ("LlamaForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "mixtral": ("MixtralForCausalLM",),
    "qwen3": ("Qwen3ForCausalLM",),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration",),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration",),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM",),
    "qwen3_5_text": ("Qwen3_5ForCausalLM",),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
}

_VISION = re.compile(r"(?:model\.)?(?:visual|vision_tower|vision_model|multi_modal_projector)\.")
_MTP = re.compile(r"(?:model\.)?mtp\.")
_TEXT = re.compile(r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?")
_LAYER = re.compile(r"layers\.(\d+)\.")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")

# nn.Linear weights of the vision towers; their convolutions, position tables and pooling heads are other things
_VISION_LINEAR = re.compile(
    r".*\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12]|mlp\.fc[12]|self_attn\.(?:q|k|v|out)_proj)\.weight"
    r"|(?:.*\.)?merger\.linear_fc[12]\.weight"
)
_EXPERTS = r"(?:mlp|block_sparse_moe)\.experts\."
# What follows "layers.N.", in any tower; matched whole, the first that fits wins.
_IN_LAYER: dict[str, Role] = {
    _EXPERTS + r"(\d+)\.(?:gate_proj|w1)\.weight": Role.ROUTED_GATE,
    _EXPERTS + r"(\d+)\.(?:up_proj|w3)\.weight": Role.ROUTED_UP,
    _EXPERTS + r"(\d+)\.(?:down_proj|w2)\.weight": Role.ROUTED_DOWN,
    _EXPERTS + r"gate_up_proj": Role.ROUTED_GATE_UP,
    _EXPERTS + r"down_proj": Role.ROUTED_DOWN,
    r"self_attn\.q_proj\.weight": Role.ATTENTION_Q,
    r"self_attn\.k_proj\.weight": Role.ATTENTION_K,
    r"self_attn\.v_proj\.weight": Role.ATTENTION_V,
    r"self_attn\.qkv_proj\.weight": Role.ATTENTION_QKV,
    r"self_attn\.o_proj\.weight": Role.ATTENTION_O,
    r"mlp\.gate_proj\.weight": Role.MLP_GATE,
    r"mlp\.up_proj\.weight": Role.MLP_UP,
    r"mlp\.gate_up_proj\.weight": Role.MLP_GATE_UP,
    r"mlp\.down_proj\.weight": Role.MLP_DOWN,
    r"mlp\.shared_expert\.gate_proj\.weight": Role.SHARED_GATE,
    r"mlp\.shared_expert\.up_proj\.weight": Role.SHARED_UP,
    r"mlp\.shared_expert\.down_proj\.weight": Role.SHARED_DOWN,
    r"mlp\.shared_expert_gate\.weight": Role.SHARED_EXPERT_GATE,
    r"(?:mlp|block_sparse_moe)\.gate\.weight": Role.ROUTER,
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
# Matched whole, in a layer or outside of one.
_ANYWHERE: dict[str, Role] = {
    r"(?:.*\.)?[a-z_]*norm(?:_[a-z]+)?\.weight": Role.NORM,
    r"(?:.*\.)?bias": Role.BIAS,
    r"embed_tokens\.weight": Role.EMBEDDING,
    r"lm_head\.weight": Role.LM_HEAD,
}
# Roles whose tensors hold all experts of a layer, [experts, out, in], unless the name has an expert's index.
STACKED = (Role.ROUTED_GATE_UP, Role.ROUTED_DOWN)
# Roles that serving engines store as one matrix; experts of a layer count as one set.
FUSED: tuple[tuple[Role, ...], ...] = (
    (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V),
    (Role.MLP_GATE, Role.MLP_UP),
    (Role.SHARED_GATE, Role.SHARED_UP),
    (Role.ROUTED_GATE, Role.ROUTED_UP),
    (Role.ROUTED_DOWN,),
    (Role.GDN_QKV, Role.GDN_Z),
    (Role.GDN_A, Role.GDN_B),
)


@dataclass(frozen=True)
class TensorKind:
    """What one tensor is.

    Attributes:
        role: its role; VISION and MTP for everything under those towers.
        part: its role inside the tower (an MTP layer's q_proj is ATTENTION_Q); equal to ``role`` elsewhere.
        layer: number of the layer or block it belongs to, in its tower.
        expert: index of the routed expert, for experts stored one by one.
        refuse: why it can never be quantized; empty when an override may.
        keep: why policies leave it at 16 bits; empty when they choose its bits. Never empty where ``refuse`` is not.
    """

    role: Role
    part: Role
    layer: int | None
    expert: int | None
    refuse: str
    keep: str

    @property
    def family(self) -> str:
        return ROLES[self.role].family


def known_architecture(config: Mapping[str, Any]) -> bool:
    """Whether the table was made for this config.json: by ``model_type``, else by ``architectures``."""
    model_type = config.get("model_type")
    if model_type is not None:
        return model_type in KNOWN_ARCHITECTURES
    named = {name for names in KNOWN_ARCHITECTURES.values() for name in names}
    return bool(named.intersection(config.get("architectures") or ()))


def tied_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether lm_head is the embedding matrix itself; Gemma 3 leaves its default, true, unsaid."""
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return str(config.get("model_type", "")).startswith("gemma3")


def kind_of(name: str, info: TensorInfo, config: Mapping[str, Any]) -> TensorKind:
    """What the tensor is and what may be done with it; what is not recognized is ``Role.UNKNOWN`` and kept.

    Args:
        name: parameter name in the checkpoint.
        info: its header entry.
        config: the checkpoint's config.json, possibly multimodal.
    """
    role, part, layer, expert, packable = _match(name)
    known = known_architecture(config)
    if not known and part in STACKED and len(info.shape) == 3:
        # GPT-OSS stores experts [E, in, out] under these very names: groups would run along the wrong axis
        role = part = Role.UNKNOWN
    refuse = _refusal(info, role, part, expert, packable)
    if not refuse and part is Role.LM_HEAD and tied_embeddings(config):
        refuse = "lm_head is tied to the embedding matrix, which the model also indexes row by row"
    keep = ROLES[role].keep
    if not keep or role is Role.UNKNOWN:
        keep = refuse or (keep if known else _doubt(name, info, role, layer))
    return TensorKind(role, part, layer, expert, refuse, keep)


def role_of(name: str, info: TensorInfo, config: Mapping[str, Any]) -> Role:
    """The tensor's role; see :func:`kind_of`."""
    return kind_of(name, info, config).role


def family_of(name: str, info: TensorInfo, config: Mapping[str, Any]) -> str:
    """The family that reports group the tensor under."""
    return kind_of(name, info, config).family


def layer_of(name: str) -> int | None:
    """Number of the layer (or vision block) the tensor belongs to."""
    return _match(name)[2]


def fused_groups(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Sets of tensors that serving engines store as one matrix, so that equal formats keep every loader possible.

    q/k/v, gate/up, GatedDeltaNet's qkv/z and a/b; of experts stored one by one, a layer's gates and ups, and its downs.
    """
    group_of = {role: index for index, roles in enumerate(FUSED) for role in roles}
    groups: dict[tuple[bool, int | None, int], list[str]] = {}
    for name, info in tensors.items():
        kind = kind_of(name, info, config)
        if kind.part in group_of and kind.role is not Role.VISION:
            groups.setdefault((kind.role is Role.MTP, kind.layer, group_of[kind.part]), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def name_patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by ``*``, each once with its count: a short list for a message."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [pattern if count == 1 else f"{pattern} ({count})" for pattern, count in counts.items()]


@cache
def _match(name: str) -> tuple[Role, Role, int | None, int | None, bool]:
    """(role, part, layer, expert, packable) from the name alone."""
    if vision := _VISION.match(name):
        block = _BLOCK.search(name)
        linear = bool(_VISION_LINEAR.fullmatch(name[vision.end() :]))
        return Role.VISION, Role.VISION, int(block[1]) if block else None, None, linear
    mtp = _MTP.match(name)
    prefix = mtp or _TEXT.match(name)
    rest = name[prefix.end() :] if prefix else name
    layer = _LAYER.match(rest)
    tail = rest[layer.end() :] if layer else rest
    part, expert = _find(tail, _IN_LAYER) if layer else (Role.UNKNOWN, None)
    if part is Role.UNKNOWN:
        part, _ = _find(tail, _ANYWHERE)
    if mtp and rest == "fc.weight":
        part = Role.MTP
    index = layer or _BLOCK.search(name)
    packable = ROLES[part].packable and (tail.endswith(".weight") or part in STACKED)
    return (Role.MTP if mtp else part), part, int(index[1]) if index else None, expert, packable


def _find(tail: str, rows: Mapping[str, Role]) -> tuple[Role, int | None]:
    for pattern, role in rows.items():
        if found := re.fullmatch(pattern, tail):
            return role, int(found[1]) if found.groups() else None
    return Role.UNKNOWN, None


def _refusal(info: TensorInfo, role: Role, part: Role, expert: int | None, packable: bool) -> str:
    """Why no plan may quantize the tensor; empty when one may."""
    ndim = len(info.shape)
    if info.dtype not in QUANTIZABLE_DTYPES:
        return f"dtype {info.dtype}: only {', '.join(QUANTIZABLE_DTYPES)} weights are quantized"
    if info.numel == 0:
        return f"shape {list(info.shape)} holds no elements"
    if not packable:
        what = "part of the vision tower that is no nn.Linear weight" if role is Role.VISION else f"role {part}"
        return f"{what}; only the weights of linear layers and of experts are quantized"
    stacked = part in STACKED and expert is None
    if ndim != (3 if stacked else 2):
        return f"{ndim}-D shape {list(info.shape)}: only linear weights (2-D) and stacked experts (3-D) are quantized"
    return ""


def _doubt(name: str, info: TensorInfo, role: Role, layer: int | None) -> str:
    """Why a tensor of an unknown architecture is kept; empty for a plain projection inside a numbered layer."""
    if layer is None or min(info.shape) < 128:
        return "unknown architecture: not a large matrix inside a numbered layer"
    if role is Role.UNKNOWN and not re.search(r"_proj\.weight$", name):
        return "unknown architecture: the name is not that of a known linear projection"
    return ""
