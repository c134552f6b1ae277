"""Plans as they are made: overrides, groups that fit, fused layers, warnings, and requests that are refused by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from headers import in_memory, infos, saved
from planned import GATE_UP, OUT, QWEN, SHARED_DOWN, TENSORS, Q, plan, quantized

import kappaquant
from kappaquant.errors import PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.models.roles import fused_groups
from kappaquant.planning.make import overridden, parse_override


def test_an_input_axis_below_the_group_is_kept_unless_overridden_or_the_group_is_smaller() -> None:
    assert "group size 128" in plan().choices[SHARED_DOWN].why
    assert plan(group_size=64).bits(SHARED_DOWN) == 3
    assert plan(overrides=[(SHARED_DOWN, 4)]).bits(SHARED_DOWN) == 4


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
        (
            {"overrides": [("*q_proj*", "t8")]},
            r"'\*q_proj\*': trellis codes have no width of 8 bits; there are t2, t3, t4",
        ),
        ({"overrides": [("*q_proj*", "q3")]}, r"'\*q_proj\*': unknown format id 'q3'"),
        ({"kinds": "t", "bits": 5}, r"proj\.weight: formats t have no width of 5 bits; allow k too \(--formats\)"),
        ({"kinds": "t", "overrides": [("*q_proj*", 5)]}, r"q_proj\.weight: formats t have no width of 5 bits"),
        (
            {"kinds": "t", "policy": "kurtosis", "profile": dict.fromkeys(TENSORS, 9.0)},
            "formats t have no width of 5 bits",
        ),
        ({"overrides": [("*nothing*", 4)]}, "matches no tensor"),
        ({"overrides": [("*layernorm*", 4)]}, r"input_layernorm\.weight: override .* role norm"),
        ({"overrides": [("*mlp.gate.weight", 4)]}, r"mlp\.gate\.weight: override .* role router"),
        ({"overrides": [("*mlp.gate.weight", 4)]}, "role router"),
        ({"overrides": [("*patch_embed*", 4)]}, "no nn.Linear"),
        ({"overrides": [("*", 4)]}, "more"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**options)


@pytest.mark.parametrize("group", [0, 3, 16, 96, 100, 512, -128])
def test_group_that_is_no_power_of_two(source: Path, group: int) -> None:
    opened = kappaquant.open_source(source)
    with pytest.raises(PlanError, match=rf"group size {group}.*32, 64, 128, 256"):
        kappaquant.make_plan(opened.tensors, opened.config, group_size=group)


@pytest.mark.parametrize("bits", [0, 1, 9, 15, 17, -3])
def test_bits_outside_2_to_8(source: Path, bits: int) -> None:
    opened = kappaquant.open_source(source)
    with pytest.raises(PlanError, match=rf"bits = {bits}"):
        kappaquant.make_plan(opened.tensors, opened.config, bits=bits)


def test_an_option_that_a_policy_does_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match="option 'recipe': the uniform policy has no such option; it has bits"):
        plan(recipe="apex2")
    with pytest.raises(PlanError, match="the uniform policy keeps to no size"):
        plan(size=10**9)


def test_overrides_last_match_wins_and_may_force_linear_weights() -> None:
    rules = [("*", 5), ("*proj.weight", 6), (OUT, 7), ("*layernorm*", 16), ("*embed*", 16), ("*mlp.gate.*", 16)]
    made = plan(overrides=rules)
    assert (made.bits(Q), made.bits(OUT), made.bits(GATE_UP)) == (6, 7, 5)
    assert made.bits("lm_head.weight") == made.bits("model.visual.blocks.0.mlp.linear_fc1.weight") == 5
    assert made.bits("mtp.layers.0.self_attn.q_proj.weight") == 6
    assert made.choices[OUT].why == f"set by {OUT!r}"
    assert made.inputs["overrides"] == [list(rule) for rule in rules]


def test_override_of_a_tied_head_is_refused() -> None:
    with pytest.raises(PlanError, match=r"lm_head\.weight.*tied"):
        plan(config={**QWEN, "tie_word_embeddings": True}, overrides=[("lm_head.weight", 4)])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((256,), "BF16"), ((0, 256), "BF16"), ((256, 256), "I32"), ((2, 2, 256, 256), "BF16")]
)
def test_override_of_what_cannot_be_quantized(shape: tuple[int, ...], dtype: str) -> None:
    tensors = {**TENSORS, Q: TensorInfo(Q, dtype, shape)}
    with pytest.raises(PlanError, match=r"q_proj\.weight: override"):
        plan(tensors=tensors, overrides=[("*layers.0.self_attn.q_proj.weight", 4)])
    assert plan(tensors=tensors).bits(Q) == 16


@pytest.mark.parametrize("text", ["*q_proj*", "=4", "a=", "a=four", "a=-4"])
def test_parse_override_rejects(text: str) -> None:
    with pytest.raises(PlanError, match="PATTERN=BITS"):
        parse_override(text)


def test_parse_override() -> None:
    assert parse_override("*a=b*=16") == ("*a=b*", 16)
    assert [parse_override(f"*={setting}")[1] for setting in ("t3", "k6", "tq4g64")] == ["t3", "k6", "tq4g64"]
    with pytest.raises(
        PlanError, match=r"override '\*=t5': trellis codes have no width of 5 bits; there are t2, t3, t4"
    ):
        parse_override("*=t5")


def test_overrides_name_a_kind_whose_groups_suit_the_tensor() -> None:
    tensors, rules = {**TENSORS, **infos({GATE_UP: (4, 64, 192)})}, [(Q, "t3"), (OUT, 4), (GATE_UP, "k2")]
    for kinds, four in (("k", "tq4g128"), ("kt", "t4g128")):
        made = plan(tensors=tensors, overrides=rules, group_size="auto", kinds=kinds)
        assert [made.choices[name].format for name in (Q, OUT, GATE_UP)] == ["t3g128", four, "tq2g64"]
        assert made.inputs["overrides"] == [list(rule) for rule in rules]
        more = overridden(made, tensors, QWEN, [(OUT, 2), (Q, "k5")])
        assert [more.choices[name].format for name in (Q, OUT)] == ["tq5g128", "tq2g128" if kinds == "k" else "t2g128"]


def test_fuse_makes_kinds_of_one_width_equal() -> None:
    tensors, config = in_memory("llama")
    made = plan(tensors=tensors, config=config, overrides=[("*.k_proj.weight", "t3")], fuse=True, group_size="auto")
    q, k = (next(choice for name, choice in made.choices.items() if f"{what}_proj" in name) for what in "qk")
    assert q.format == k.format
    assert q.format.startswith("t3g")
    assert "raised from k3 to fuse with" in q.why


@pytest.mark.parametrize("arch", ["qwen3_5_moe_text", "mixtral"])
def test_fuse_levels_every_group_up(arch: str, tmp_path: Path) -> None:
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


def test_unknown_architecture_warns_with_a_list(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kappaquant"):
        made = plan(config={"model_type": "phi9"})
    assert quantized(made) == {Q: 3, OUT: 3}
    assert made.warnings == (caplog.messages[0],)
    for pattern in ("'phi9'", "layers.*.mlp.experts.gate_up_proj", "lm_head.weight"):
        assert pattern in made.warnings[0]
    assert "q_proj" not in made.warnings[0].replace("mtp.layers.*.self_attn.q_proj.weight", "")


def test_unrecognized_tensor_of_a_known_architecture_is_kept_with_a_warning() -> None:
    made = plan(tensors={**TENSORS, **infos({"score.weight": (256, 256)})})
    assert made.bits("score.weight") == 16
    assert "score.weight" in made.warnings[0]
    assert plan().warnings == ()


@pytest.mark.parametrize(
    ("width", "bits", "group"),
    [
        (2048, 3, 128), (576, 4, 64), (96, 4, 32), (1120, 4, 128),  # 35 groups of 32 cost more than 9 of 128
        (352, 3, 128), (352, 4, 32), (200, 3, 128), (192, 8, 64), (32, 2, 32),
    ],
)  # fmt: skip
def test_groups_that_fit_the_axis(width: int, bits: int, group: int) -> None:
    made = plan(group_size="auto", bits=bits, tensors=infos({Q: (256, width)}))
    assert made.format_of(Q) == CodebookFormat(bits, group)
    every = {size: CodebookFormat(bits, size).nbytes((256, width)) for size in (32, 64, 128)}
    assert every[group] == min(every[size] for size in every if width % size == 0 or size == 128) or width % group == 0


def test_576_inputs_take_four_and_a_quarter_bits() -> None:
    tensors = infos({Q: (256, 576)})
    assert plan(group_size="auto", bits=4, tensors=tensors).format_of(Q).bits_per_weight((256, 576)) == 4.25
    assert plan(group_size=128, bits=4, tensors=tensors).format_of(Q).bits_per_weight((256, 576)) == pytest.approx(
        4.58, abs=0.005
    )


@pytest.mark.parametrize("width", [16, 48, 100])
def test_an_axis_that_no_group_fits_is_kept(width: int) -> None:
    made = plan(group_size="auto", tensors=infos({Q: (256, width)}))
    assert made.bits(Q) == 16
    assert f"input axis {width} is below the group size 128" in made.choices[Q].why
