"""Roles, checked against the tensors that transformers' own tiny models have and write."""

import re

import pytest
from headers import MODELS, in_memory, infos, saved, tiny
from torch import nn

from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.architectures.base import registered
from kappaquant.models.roles import (
    ROLES,
    Role,
    family_of,
    fused_among,
    fused_groups,
    kind_of,
    known_architecture,
    layer_of,
    name_patterns,
    role_of,
    tied_embeddings,
)


def one(name, shape, config, dtype="BF16"):
    return kind_of(name, TensorInfo(name, dtype, tuple(shape)), config)


def test_every_known_architecture_is_modelled_here():
    assert MODELS.keys() == registered().keys()
    for arch, (model_class, config_class, _) in MODELS.items():
        assert config_class.model_type == arch
        assert registered()[arch].classes == (model_class.__name__,)


@pytest.mark.parametrize("arch", MODELS)
def test_no_tensor_is_unknown(arch, tmp_path):
    for tensors, config in (in_memory(arch), saved(arch, tmp_path)):
        assert known_architecture(config)
        unknown = [name for name, info in tensors.items() if role_of(name, info, config) is Role.UNKNOWN]
        assert not unknown


@pytest.mark.parametrize("arch", MODELS)
def test_what_may_be_quantized_is_exactly_linear_weights_embeddings_and_experts(arch):
    model, config = tiny(arch)
    expected = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    expected |= {name for name, _ in model.named_parameters() if name.endswith("embed_tokens.weight")}
    expected |= {name for name, tensor in model.named_parameters() if ".experts." in name and tensor.ndim == 3}
    if tied_embeddings(config):
        expected.discard("lm_head.weight")
    tensors, _ = in_memory(arch)
    assert {name for name, info in tensors.items() if not kind_of(name, info, config).refuse} == expected


@pytest.mark.parametrize("arch", MODELS)
def test_names_in_memory_and_on_disk_mean_the_same(arch, tmp_path):
    def tally(tensors, config):
        """Weights by family and layer: fused and per-expert layouts must agree."""
        sums = {}
        for name, info in tensors.items():
            key = family_of(name, info, config), layer_of(name)
            sums[key] = sums.get(key, 0) + info.numel
        return sums

    ram = tally(*in_memory(arch))
    disk = tally(*saved(arch, tmp_path))
    if tied_embeddings(tiny(arch)[1]):
        ram.pop(("lm_head", None))
    assert ram == disk


L = "model.layers.2."
ML = "model.language_model.layers.10."
CASES = [
    (L + "self_attn.q_proj.weight", (256, 128), Role.ATTENTION_Q),
    (L + "self_attn.k_proj.weight", (64, 128), Role.ATTENTION_K),
    (L + "self_attn.v_proj.weight", (64, 128), Role.ATTENTION_V),
    (L + "self_attn.qkv_proj.weight", (384, 128), Role.ATTENTION_QKV),
    (ML + "self_attn.o_proj.weight", (128, 128), Role.ATTENTION_O),
    (L + "self_attn.q_proj.bias", (128,), Role.BIAS),
    (L + "self_attn.q_norm.weight", (32,), Role.NORM),
    (L + "mlp.gate_proj.weight", (128, 128), Role.MLP_GATE),
    (L + "mlp.up_proj.weight", (128, 128), Role.MLP_UP),
    (L + "mlp.gate_up_proj.weight", (256, 128), Role.MLP_GATE_UP),
    ("language_model.model.layers.0.mlp.down_proj.weight", (128, 128), Role.MLP_DOWN),
    (L + "mlp.gate.weight", (8, 128), Role.ROUTER),
    (L + "block_sparse_moe.gate.weight", (8, 128), Role.ROUTER),
    (L + "mlp.experts.gate_up_proj", (8, 256, 128), Role.ROUTED_GATE_UP),
    (ML + "mlp.experts.down_proj", (8, 128, 128), Role.ROUTED_DOWN),
    (L + "mlp.experts.7.gate_proj.weight", (128, 128), Role.ROUTED_GATE),
    (L + "mlp.experts.7.up_proj.weight", (128, 128), Role.ROUTED_UP),
    (L + "mlp.experts.7.down_proj.weight", (128, 128), Role.ROUTED_DOWN),
    (L + "block_sparse_moe.experts.7.w1.weight", (128, 128), Role.ROUTED_GATE),
    (L + "block_sparse_moe.experts.7.w3.weight", (128, 128), Role.ROUTED_UP),
    (L + "block_sparse_moe.experts.7.w2.weight", (128, 128), Role.ROUTED_DOWN),
    (L + "mlp.shared_expert.gate_proj.weight", (128, 128), Role.SHARED_GATE),
    (L + "mlp.shared_expert.up_proj.weight", (128, 128), Role.SHARED_UP),
    (L + "mlp.shared_expert.down_proj.weight", (128, 128), Role.SHARED_DOWN),
    (L + "mlp.shared_expert_gate.weight", (1, 128), Role.SHARED_EXPERT_GATE),
    (L + "linear_attn.in_proj_qkv.weight", (256, 128), Role.GDN_QKV),
    (L + "linear_attn.in_proj_z.weight", (128, 128), Role.GDN_Z),
    (L + "linear_attn.in_proj_qkvz.weight", (384, 128), Role.GDN_QKVZ),
    (L + "linear_attn.in_proj_a.weight", (4, 128), Role.GDN_A),
    (L + "linear_attn.in_proj_b.weight", (4, 128), Role.GDN_B),
    (L + "linear_attn.in_proj_ba.weight", (8, 128), Role.GDN_BA),
    (L + "linear_attn.out_proj.weight", (128, 128), Role.GDN_OUT),
    (L + "linear_attn.conv1d.weight", (256, 1, 4), Role.GDN_CONV),
    (L + "linear_attn.A_log", (4,), Role.GDN_A_LOG),
    (L + "linear_attn.dt_bias", (4,), Role.GDN_DT_BIAS),
    (L + "linear_attn.norm.weight", (32,), Role.GDN_NORM),
    (L + "pre_feedforward_layernorm.weight", (128,), Role.NORM),
    ("model.norm.weight", (128,), Role.NORM),
    ("model.embed_tokens.weight", (160, 128), Role.EMBEDDING),
    ("embed_tokens.weight", (160, 128), Role.EMBEDDING),
    ("lm_head.weight", (160, 128), Role.LM_HEAD),
    ("model.visual.blocks.3.mlp.linear_fc1.weight", (128, 64), Role.VISION),
    ("model.visual.merger.linear_fc2.weight", (128, 256), Role.VISION),
    ("vision_tower.vision_model.encoder.layers.3.self_attn.out_proj.weight", (64, 64), Role.VISION),
    ("multi_modal_projector.mm_input_projection_weight", (64, 128), Role.VISION),
    ("mtp.layers.0.mlp.experts.gate_up_proj", (8, 256, 128), Role.MTP),
    ("mtp.fc.weight", (128, 256), Role.MTP),
    ("mtp.norm.weight", (128,), Role.MTP),
    ("score.weight", (2, 128), Role.UNKNOWN),
    (L + "self_attn.my_q_proj.weight", (128, 128), Role.UNKNOWN),
    (L + "mlp.experts.gate_up_proj_extra", (8, 256, 128), Role.UNKNOWN),
]
QWEN = {"model_type": "qwen3_5_moe", "tie_word_embeddings": False}
MIXTRAL = {"model_type": "mixtral"}
DECIDED = {  # roles whose bits the policies choose; every other role has a reason to be kept
    *(Role.ROUTED_GATE, Role.ROUTED_UP, Role.ROUTED_GATE_UP, Role.ROUTED_DOWN),
    *(Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN),
    *(Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_QKV, Role.ATTENTION_O),
    *(Role.MLP_GATE, Role.MLP_UP, Role.MLP_GATE_UP, Role.MLP_DOWN),
    *(Role.GDN_QKV, Role.GDN_Z, Role.GDN_QKVZ, Role.GDN_OUT),
}


@pytest.mark.parametrize(("name", "shape", "role"), CASES, ids=[name for name, *_ in CASES])
def test_role_and_default(name, shape, role):
    kind = one(name, shape, MIXTRAL if "block_sparse_moe" in name else QWEN)
    assert kind.role is role
    assert bool(kind.keep) == (role not in DECIDED)
    number = re.search(r"(?:layers|blocks)\.(\d+)", name)
    assert layer_of(name) == kind.layer == (int(number[1]) if number else None)
    expert = re.search(r"experts\.(\d+)", name)
    assert kind.expert == (int(expert[1]) if expert else None)


def test_cases_cover_every_role():
    by_structure = {Role.LINEAR, Role.RECURRENT, Role.TOWER}  # see test_structure
    assert {role for *_, role in CASES} | by_structure == set(Role) == set(ROLES)


def test_mtp_tensors_keep_their_part():
    kind = one("mtp.layers.0.self_attn.q_proj.weight", (256, 128), QWEN)
    assert (kind.role, kind.part, kind.refuse) == (Role.MTP, Role.ATTENTION_Q, "")
    assert one("mtp.layers.0.mlp.gate.weight", (8, 128), QWEN).refuse
    assert one("mtp.pre_fc_norm_hidden.weight", (128,), QWEN).part is Role.NORM


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((128,), "BF16", "1-D"),
        ((2, 128, 128), "BF16", "3-D"),
        ((0, 128), "BF16", "no elements"),
        ((128, 128), "I32", "I32"),
        ((128, 128), "F64", "F64"),
        ((128, 128), "F8_E4M3", "F8_E4M3"),
    ],
)
def test_what_can_never_be_quantized(shape, dtype, reason):
    kind = one(L + "self_attn.q_proj.weight", shape, QWEN, dtype)
    assert reason in kind.refuse
    assert kind.keep == kind.refuse


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_float_weights_can(dtype):
    assert not one(L + "self_attn.q_proj.weight", (128, 128), QWEN, dtype).refuse


def test_tied_head_is_refused_and_an_untied_one_only_kept():
    for config, tied in (
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "llama", "tie_word_embeddings": False}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma3_text"}, True),
        ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, False),
        ({"model_type": "qwen3_5_moe", "text_config": {"tie_word_embeddings": True}}, True),
    ):
        kind = one("lm_head.weight", (160, 128), config)
        assert bool(kind.refuse) == tied == tied_embeddings(config)
        assert kind.keep


def test_an_unknown_relative_of_gemma3_is_taken_to_tie_too():
    assert tied_embeddings({"model_type": "gemma3n"})
    assert not tied_embeddings({"model_type": "gemma3n", "tie_word_embeddings": False})
    assert not tied_embeddings({"model_type": "llama4"})
    assert not tied_embeddings({})


def test_a_known_architecture_is_read_by_its_own_patterns_alone():
    assert one(L + "block_sparse_moe.experts.7.w1.weight", (128, 128), QWEN).role is Role.UNKNOWN
    assert one(L + "mlp.experts.7.gate_proj.weight", (128, 128), {"model_type": "llama"}).keep
    unknown = one(L + "block_sparse_moe.experts.7.w1.weight", (128, 128), {"model_type": "phi9"})
    assert (unknown.role, unknown.expert, unknown.keep) == (Role.ROUTED_GATE, 7, "")


def test_architecture_is_known_by_model_type_else_by_class():
    assert known_architecture({"architectures": ["MixtralForCausalLM"]})
    assert not known_architecture({"model_type": "phi9", "architectures": ["LlamaForCausalLM"]})
    assert not known_architecture({})


def test_unknown_architecture_quantizes_only_plain_projections_of_layers():
    config = {"model_type": "phi9"}
    tensors = infos(
        {
            "model.layers.0.self_attn.q_proj.weight": (128, 128),
            "decoder.layers.3.attention.kv_b_proj.weight": (256, 128),
            "model.layers.0.mlp.experts.3.gate_proj.weight": (128, 128),
            "model.layers.0.self_attn.k_proj.weight": (64, 128),
            "model.layers.0.mlp.router.weight": (128, 128),
            "model.layers.0.mlp.experts.gate_up_proj": (8, 128, 256),
            "model.layers.0.mlp.experts.down_proj": (8, 128, 128),
            "h.0.attn.c_attn.weight": (128, 384),
            "model.final_proj.weight": (128, 128),
            "model.embed_tokens.weight": (160, 128),
            "lm_head.weight": (160, 128),
            "model.norm.weight": (128,),
            "mtp.layers.0.self_attn.q_proj.weight": (128, 128),
            "vision_tower.layers.0.self_attn.q_proj.weight": (128, 128),
        }
    )
    decided = [name for name, info in tensors.items() if not kind_of(name, info, config).keep]
    assert decided == list(tensors)[:3]
    # experts may be stored [E, in, out] there: not even an override may group along the wrong axis
    assert one("model.layers.0.mlp.experts.gate_up_proj", (8, 128, 256), config).refuse


def test_fused_groups():
    tensors, config = in_memory("qwen3_5_moe_text")
    groups = {tuple(sorted(group)) for group in fused_groups(tensors, config)}
    gdn, full = "model.layers.0.linear_attn.", "model.layers.3.self_attn."
    assert (gdn + "in_proj_qkv.weight", gdn + "in_proj_z.weight") in groups
    assert (gdn + "in_proj_a.weight", gdn + "in_proj_b.weight") in groups
    assert tuple(full + f"{x}_proj.weight" for x in "kqv") in groups
    assert fused_among({name: kind_of(name, info, config) for name, info in tensors.items()}, config) == fused_groups(
        tensors, config
    )
    assert len(groups) == 3 * 2 + 1 + 4  # and every layer's shared expert gate/up


def test_fused_groups_of_separate_experts(tmp_path):
    tensors, config = saved("mixtral", tmp_path)
    groups = [group for group in fused_groups(tensors, config) if "experts" in group[0]]
    assert sorted(map(len, groups)) == [4] * 4 + [8] * 4  # four layers: w2 of 4 experts, w1 and w3 of 4 experts
    assert all(len({layer_of(name) for name in group}) == 1 for group in groups)


def test_name_patterns_count_what_they_fold():
    assert name_patterns(["a.0.b", "a.11.b", "c2.d"]) == ["a.*.b (2)", "c2.d"]
