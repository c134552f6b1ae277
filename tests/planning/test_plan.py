"""Plans: policies by role, thresholds, overrides, JSON, errors, and the exact arithmetic of the dry run."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from headers import in_memory, infos, saved
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import Format, TensorInfo
from kappaquant.models.roles import Role, fused_groups, role_of
from kappaquant.planning.plan import Choice, Plan, check_legacy, make_plan, parse_override
from kappaquant.planning.sizes import summary

QWEN = {"model_type": "qwen3_5_moe", "tie_word_embeddings": False, "text_config": {"num_experts_per_tok": 2}}
PREFIX = "model.language_model.layers.0."
SHAPES = {
    PREFIX + "self_attn.q_proj.weight": (256, 256),
    PREFIX + "self_attn.o_proj.weight": (256, 256),
    PREFIX + "mlp.experts.gate_up_proj": (4, 256, 256),
    PREFIX + "mlp.experts.down_proj": (4, 256, 128),
    PREFIX + "mlp.shared_expert.down_proj.weight": (256, 64),
    PREFIX + "mlp.gate.weight": (4, 256),
    PREFIX + "input_layernorm.weight": (256,),
    "model.language_model.embed_tokens.weight": (160, 256),
    "lm_head.weight": (160, 256),
    "model.visual.blocks.0.mlp.linear_fc1.weight": (256, 128),
    "model.visual.patch_embed.proj.weight": (64, 3, 2, 16, 16),
    "mtp.layers.0.self_attn.q_proj.weight": (256, 256),
}
TENSORS = infos(SHAPES)
Q, OUT, GATE_UP, DOWN, SHARED_DOWN = list(SHAPES)[:5]


def plan(policy="uniform", tensors=TENSORS, config=QWEN, **options):
    return make_plan(tensors, config, policy, **options)


def quantized(made):
    return {name: choice.bits for name, choice in made.choices.items() if choice.bits != 16}


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform(bits):
    made = plan(bits=bits)
    assert quantized(made) == dict.fromkeys((Q, OUT, GATE_UP, DOWN), bits)
    assert made.choices.keys() == TENSORS.keys()
    assert all(choice.why for choice in made.choices.values())
    assert made.format_of(Q) == Format(bits, 128)
    assert made.format_of("lm_head.weight") is None


def test_uniform_16_keeps_everything():
    assert quantized(plan(bits=16)) == {}


def test_an_input_axis_below_the_group_is_kept_unless_overridden_or_the_group_is_smaller():
    assert "group size 128" in plan().choices[SHARED_DOWN].why
    assert plan(group_size=64).bits(SHARED_DOWN) == 3
    assert plan(overrides=[(SHARED_DOWN, 4)]).bits(SHARED_DOWN) == 4


FOUR = {Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O, Role.ROUTED_DOWN, Role.MLP_DOWN}
SHARED = {Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN}
THREE = {Role.ROUTED_GATE, Role.ROUTED_UP, Role.ROUTED_GATE_UP, Role.GDN_QKV, Role.GDN_Z, Role.MLP_GATE, Role.MLP_UP}
SENSITIVE = {Role.ATTENTION_O, Role.GDN_OUT, Role.ROUTED_DOWN, Role.SHARED_DOWN, Role.MLP_DOWN}
RECIPES = {
    "apex": {4: SENSITIVE, 3: (FOUR | SHARED | THREE) - SENSITIVE},
    "apex2": {4: FOUR | SHARED, 3: THREE},
    "apex3": {4: (FOUR | SHARED) - {Role.SHARED_DOWN}, 3: THREE},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("arch", ["qwen3_5_moe", "qwen3_5_text", "mixtral", "gemma3"])
def test_recipes_by_role(arch, layout, recipe, tmp_path):
    tensors, config = in_memory(arch) if layout == "fused" else saved(arch, tmp_path)
    made = plan("recipe", tensors, config, recipe=recipe)
    for name, info in tensors.items():
        role = role_of(name, info, config)
        expected = next((bits for bits, roles in RECIPES[recipe].items() if role in roles), 16)
        if expected != 16 and info.shape[-1] < 128:
            expected = 16
        assert made.bits(name) == expected, name


def test_kurtosis_thresholds():
    profile = {Q: 3.99, OUT: 4.0, GATE_UP: 14.999, DOWN: 15.0}
    assert quantized(plan("kurtosis", profile=profile)) == {Q: 3, OUT: 4, GATE_UP: 5}
    made = plan("kurtosis", profile=profile, thresholds=(4, 15.5), ladder=(2, 6))
    assert quantized(made) == {Q: 2, OUT: 6, GATE_UP: 6, DOWN: 6}
    assert made.inputs["thresholds"] == [4, 15.5]
    assert made.choices[OUT].why == "κ 4 < 15.5"
    assert "≥ 15" in plan("kurtosis", profile=profile).choices[DOWN].why


def test_kurtosis_keeps_the_known_roles_whatever_they_measure():
    made = plan("kurtosis", profile=dict.fromkeys(TENSORS, -0.5))
    assert quantized(made) == dict.fromkeys((Q, OUT, GATE_UP, DOWN), 3)


@pytest.mark.parametrize("kappa", [None, float("nan"), float("inf")])
def test_kurtosis_without_a_number_names_the_tensor(kappa):
    profile = {Q: 0.0, OUT: kappa, GATE_UP: 0.0, DOWN: 0.0}
    with pytest.raises(PlanError, match=r"self_attn\.o_proj\.weight: κ = "):
        plan("kurtosis", profile=profile)
    assert plan("kurtosis", profile=profile, overrides=[(OUT, 4)]).bits(OUT) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "kurtosis"}, "needs a profile"),
        ({"policy": "kurtosis", "profile": {Q: 1.0}}, r"o_proj\.weight: the profile has no κ"),
        ({"policy": "kurtosis", "profile": {}, "thresholds": (4, 4, 8)}, "ascending"),
        ({"policy": "kurtosis", "profile": {}, "thresholds": (4, 8)}, "2 thresholds for 3 bit widths"),
        ({"policy": "kurtosis", "profile": {}, "ladder": (3, 4, 9)}, "bits = 9"),
        ({"policy": "budget"}, "uniform, recipe, kurtosis"),
        ({"policy": "recipe", "recipe": "apex9"}, "apex, apex2, apex3"),
        ({"bits": 1}, "bits = 1"),
        ({"bits": 9}, "bits = 9"),
        ({"group_size": 96}, "power of two"),
        ({"overrides": [("*q_proj*", 12)]}, r"'\*q_proj\*': bits = 12"),
        ({"overrides": [("*nothing*", 4)]}, "matches no tensor"),
        ({"overrides": [("*layernorm*", 4)]}, r"input_layernorm\.weight: override .* role norm"),
        ({"overrides": [("*mlp.gate.weight", 4)]}, r"mlp\.gate\.weight: override .* role router"),
        ({"overrides": [("*mlp.gate.weight", 4)]}, "role router"),
        ({"overrides": [("*patch_embed*", 4)]}, "no nn.Linear"),
        ({"overrides": [("*", 4)]}, "more"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(PlanError, match=message):
        plan(**options)


def test_overrides_last_match_wins_and_may_force_linear_weights():
    rules = [("*", 5), ("*proj.weight", 6), (OUT, 7), ("*layernorm*", 16), ("*embed*", 16), ("*mlp.gate.*", 16)]
    made = plan(overrides=rules)
    assert (made.bits(Q), made.bits(OUT), made.bits(GATE_UP)) == (6, 7, 5)
    assert made.bits("lm_head.weight") == made.bits("model.visual.blocks.0.mlp.linear_fc1.weight") == 5
    assert made.bits("mtp.layers.0.self_attn.q_proj.weight") == 6
    assert made.choices[OUT].why == f"set by {OUT!r}"
    assert made.inputs["overrides"] == [list(rule) for rule in rules]


def test_override_of_a_tied_head_is_refused():
    with pytest.raises(PlanError, match=r"lm_head\.weight.*tied"):
        plan(config={**QWEN, "tie_word_embeddings": True}, overrides=[("lm_head.weight", 4)])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((256,), "BF16"), ((0, 256), "BF16"), ((256, 256), "I32"), ((2, 2, 256, 256), "BF16")]
)
def test_override_of_what_cannot_be_quantized(shape, dtype):
    tensors = {**TENSORS, Q: TensorInfo(Q, dtype, shape)}
    with pytest.raises(PlanError, match=r"q_proj\.weight: override"):
        plan(tensors=tensors, overrides=[("*layers.0.self_attn.q_proj.weight", 4)])
    assert plan(tensors=tensors).bits(Q) == 16


@pytest.mark.parametrize("text", ["*q_proj*", "=4", "a=", "a=four", "a=-4"])
def test_parse_override_rejects(text):
    with pytest.raises(PlanError, match="PATTERN=BITS"):
        parse_override(text)


def test_parse_override():
    assert parse_override("*a=b*=16") == ("*a=b*", 16)


@pytest.mark.parametrize("arch", ["qwen3_5_moe_text", "mixtral"])
def test_fuse_levels_every_group_up(arch, tmp_path):
    tensors, config = saved(arch, tmp_path)
    profile = {name: float(i % 17) for i, name in enumerate(tensors)}
    loose = plan("kurtosis", tensors, config, profile=profile)
    tight = plan("kurtosis", tensors, config, profile=profile, fuse=True)
    groups = fused_groups(tensors, config)
    assert any(len({loose.bits(name) for name in group}) > 1 for group in groups)
    for group in groups:
        assert {tight.bits(name) for name in group} == {max(loose.bits(name) for name in group)}
    fused = {name for group in groups for name in group}
    assert all(tight.choices[name] == loose.choices[name] for name in tensors.keys() - fused)


def test_unknown_architecture_warns_with_a_list(caplog):
    with caplog.at_level(logging.WARNING, "kappaquant"):
        made = plan(config={"model_type": "phi9"})
    assert quantized(made) == {Q: 3, OUT: 3}
    assert made.warnings == (caplog.messages[0],)
    for pattern in ("'phi9'", "layers.*.mlp.experts.gate_up_proj", "lm_head.weight"):
        assert pattern in made.warnings[0]
    assert "q_proj" not in made.warnings[0].replace("mtp.layers.*.self_attn.q_proj.weight", "")


def test_unrecognized_tensor_of_a_known_architecture_is_kept_with_a_warning():
    made = plan(tensors={**TENSORS, **infos({"score.weight": (256, 256)})})
    assert made.bits("score.weight") == 16
    assert "score.weight" in made.warnings[0]
    assert plan().warnings == ()


def test_json_round_trip_and_order(tmp_path):
    tensors = infos({f"model.layers.{i}.self_attn.q_proj.weight": (128, 128) for i in (10, 2, 0)})
    made = plan(tensors=tensors, overrides=[("*.2.*", 7)])
    text = made.to_json()
    assert Plan.from_json(text) == made
    assert list(json.loads(text)["tensors"]) == sorted(tensors, key=lambda name: int(name.split(".")[2]))
    assert plan(tensors=dict(reversed(tensors.items())), overrides=[("*.2.*", 7)]).to_json() == text
    assert sum("q_proj" in line for line in text.splitlines()) == 3
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_empty_plan_is_still_json():
    made = plan(tensors={})
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(plan_version=2), "plan_version is 2"),
        (lambda d: d.pop("plan_version"), "plan_version is None"),
        (lambda d: d.update(tensors=[]), "'tensors' must be a JSON dict"),
        (lambda d: d.update(group_size=100), "power of two"),
        (lambda d: d.update(group_size=True), "power of two"),
        (lambda d: d["tensors"].update({Q: {"bits": 9, "why": ""}}), r"q_proj\.weight: bits = 9"),
        (lambda d: d["tensors"].update({Q: {"bits": "3", "why": ""}}), r"q_proj\.weight: bits = '3'"),
        (lambda d: d["tensors"].update({Q: {"bits": True, "why": ""}}), r"q_proj\.weight: bits = True"),
        (lambda d: d["tensors"].update({Q: 3}), r"q_proj\.weight: 3; an entry"),
    ],
)
def test_broken_plan_files(change, message, tmp_path):
    data = json.loads(plan().to_json())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan_version": 1, "plan_version": 1}', "\x80"])
def test_text_that_is_no_plan(text, tmp_path):
    (tmp_path / "p.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=r"p\.json"):
        Plan.load(tmp_path / "p.json")


def test_missing_plan_file(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.json"):
        Plan.load(tmp_path / "absent.json")


def test_check_names_unknown_and_missing_tensors():
    made = plan()
    made.check(TENSORS, QWEN)
    with pytest.raises(PlanError, match=r"lm_head\.weight: the plan names 1 tensor the source does not have"):
        made.check({name: info for name, info in TENSORS.items() if name != "lm_head.weight"})
    with pytest.raises(PlanError, match=r"extra\.0, extra\.1: the plan leaves out 2 tensors"):
        made.check({**TENSORS, **infos({"extra.1": (1,), "extra.0": (1,)})})
    with pytest.raises(PlanError, match=r"^x: the plan does not name"):
        made.bits("x")


def test_check_refuses_bits_on_what_cannot_have_them():
    name = PREFIX + "input_layernorm.weight"
    made = plan()
    edited = replace(made, choices={**made.choices, name: Choice(3, "by hand")})
    with pytest.raises(PlanError, match=r"input_layernorm\.weight: the plan gives it 3 bits"):
        edited.check(TENSORS, QWEN)


def test_check_legacy():
    check_legacy(plan(overrides=[(Q, 2), (OUT, 4)]))
    check_legacy(plan(bits=7))
    with pytest.raises(PlanError, match="keeps every tensor"):
        check_legacy(plan(bits=16))
    with pytest.raises(PlanError, match=r"q_proj\.weight: 5 bits beside other widths"):
        check_legacy(plan(overrides=[(Q, 5)]))
    with pytest.raises(PlanError, match="6 bits beside"):
        check_legacy(plan(bits=5, overrides=[(Q, 6)]))


def test_summary_is_exact():
    made = plan(bits=3, overrides=[(SHARED_DOWN, 4)])
    got = summary(made, TENSORS, QWEN)
    by_name = {row.name: row for row in got.per_tensor}
    assert by_name[Q].output_bytes == 256 * 2 * (48 + 2)
    assert by_name[GATE_UP].output_bytes == 4 * 256 * 2 * 50
    assert by_name[SHARED_DOWN].output_bytes == 256 * (64 + 2)  # 64 columns padded to one group of 128
    assert by_name["lm_head.weight"].output_bytes == 160 * 256 * 2
    assert got.output_bytes == sum(row.output_bytes for row in got.per_tensor)
    assert got.total.source_bytes == sum(info.nbytes for info in TENSORS.values())
    assert got.total.params == sum(info.numel for info in TENSORS.values())
    assert got.bits_per_weight == 8 * got.output_bytes / got.total.params
    assert got.families["routed down_proj"].bits_per_weight == 3.125
    assert sum(total.output_bytes for total in got.families.values()) == got.output_bytes
    assert list(got.by_bits) == [3, 4, 16]
    assert got.by_bits[4].tensors == 1
    idle = ("model.visual", "mtp.")
    whole = [r for r in got.per_tensor if not r.name.startswith(idle) and "experts." not in r.name]
    active = sum(r.output_bytes for r in whole if "embed" not in r.name) + 256 * 2
    active += (by_name[GATE_UP].output_bytes + by_name[DOWN].output_bytes) * 2 // 4
    assert got.active_bytes_per_token == active


def test_active_bytes_agree_between_expert_layouts_and_count_a_tied_embedding_whole(tmp_path):
    fused, config = in_memory("mixtral")
    separate, saved_config = saved("mixtral", tmp_path)
    first = summary(plan(tensors=fused, config=config), fused, config)
    second = summary(plan(tensors=separate, config=saved_config), separate, saved_config)
    assert first.total.active_bytes == second.total.active_bytes
    assert first.output_bytes == second.output_bytes
    assert {k: v.output_bytes for k, v in first.families.items()} == {
        k: v.output_bytes for k, v in second.families.items()
    }
    tied = {**config, "tie_word_embeddings": True}
    headless = {name: info for name, info in fused.items() if name != "lm_head.weight"}
    third = summary(plan(tensors=headless, config=tied), headless, tied)
    assert third.total.active_bytes == first.total.active_bytes - 128 * 2  # the head's bytes, without the one row


def test_qwen3_6_35b_a3b_matches_the_published_sizes():
    with torch.device("meta"):
        model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig())
    tensors = infos({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    config = Qwen3_5MoeConfig().to_dict()
    sizes = {r: summary(plan("recipe", tensors, config, recipe=r), tensors, config) for r in ("apex", "apex2", "apex3")}
    sizes["uniform"] = summary(plan(tensors=tensors, config=config), tensors, config)
    total = sizes["apex2"].total
    assert round(total.params / 1e9, 1) == 35.1
    assert round(total.active_params / 1e9, 2) == 2.95
    got = {name: round(size.output_bytes / 1e9, 2) for name, size in sizes.items()}
    # published, with fp32 norms and rounded: 16, 17 and 18 GB
    assert got == {"uniform": 16.13, "apex": 17.51, "apex2": 17.92, "apex3": 17.98}
