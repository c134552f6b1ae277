"""The sensitivity policy: least predicted divergence within the bytes of the files, ties, overrides, and what it refuses."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from budgeted import EMBEDDING, HEAD, KNOWN, ends, files, plan, predicted
from headers import in_memory, infos, saved
from measured import evidence_of, of_weights
from planned import DOWN, GATE_UP, OUT, QWEN, SHARED_DOWN, TENSORS, Q

from kappaquant.errors import BudgetError, PlanError
from kappaquant.formats.codebook import BITS
from kappaquant.models.roles import Role, fused_groups, role_of
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import Plan
from kappaquant.planning.sizes import active_shares, file_bytes, summary


def test_it_is_the_best_of_all_plans_that_fit() -> None:
    few = infos({Q: (256, 256), OUT: (256, 128), DOWN: (2, 128, 128)})
    known = evidence_of(few, QWEN, group_size=128, seed=3)
    every = [
        made
        for widths in product((*BITS, 16), repeat=3)
        if (made := make_plan(few, QWEN, overrides=list(zip(few, widths, strict=True)), group_size=128))
    ]
    low, high = ends(known, few)
    assert (low, high) == (min(files(made, few) for made in every), max(files(made, few) for made in every))
    for share in (0, 0.1, 0.37, 0.8, 1):
        size = round(low + share * (high - low))
        found = plan(size, known, few)
        fitting = [made for made in every if files(made, few) <= size]
        best = min(predicted(made, known) for made in fitting)
        assert files(found, few) <= size
        assert predicted(found, known) == pytest.approx(best, rel=1e-9)
        assert found.inputs["predicted_kld"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("arch", ["qwen3_5_moe", "qwen3_moe", "llama", "gemma3"])
@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_files_never_exceed_the_size(arch: str, layout: str, tmp_path: Path) -> None:
    tensors, config = in_memory(arch) if layout == "fused" else saved(arch, tmp_path)
    known = evidence_of(tensors, config)
    names = list(tensors)
    shards = {f"{part}.safetensors": {name: tensors[name] for name in names[part::3]} for part in range(3)}
    low, high = ends(known, tensors, config, group_size="auto", shards=shards)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        size = round(low + share * (high - low))
        made = plan(size, known, tensors, config, group_size="auto", shards=shards)
        taken = file_bytes(shards, made.format_of)
        assert 0.9 * size < taken <= size
        for unit in known.units:
            assert (
                len({made.bits(name) for name in unit.tensors if "below the group" not in made.choices[name].why}) <= 1
            )


def test_embedding_and_head_shrink_where_the_evidence_has_them() -> None:
    low, _ = ends()
    made = plan(low)
    assert {made.bits(name) for name in (Q, OUT, GATE_UP, DOWN, EMBEDDING, HEAD)} == {2}
    without = replace(KNOWN, units=tuple(u for u in KNOWN.units if u.role not in ("embedding", "lm_head")))
    smallest = plan(ends(without)[0], without)
    assert {smallest.bits(name) for name in (EMBEDDING, HEAD)} == {16}
    assert "a token reads one row" in smallest.choices[EMBEDDING].why


def test_a_tied_head_is_the_embedding() -> None:
    config = {**QWEN, "tie_word_embeddings": True}
    known = evidence_of(TENSORS, config, group_size=128)
    made = plan(ends(known, config=config)[0], known, config=config)
    assert (made.bits(EMBEDDING), made.bits(HEAD)) == (2, 16)


def test_each_choice_says_its_share_and_the_plan_what_it_rests_on() -> None:
    low, high = ends()
    size = (low + high) // 2
    made = plan(size)
    total = made.inputs["predicted_kld"]
    assert total == pytest.approx(predicted(made), rel=1e-5)
    assert made.inputs["relaxed_kld"] <= total
    shares = {}
    for unit in KNOWN.units:
        for name in unit.tensors:
            if made.choices[name].why.startswith("predicted"):
                said = re.fullmatch(r"predicted (\S+) of (\S+) nats", made.choices[name].why)
                assert said
                shares[unit] = float(said[1])
                assert float(said[2]) == pytest.approx(total, rel=5e-3)
    assert sum(shares.values()) == pytest.approx(total, rel=0.06)
    assert made.inputs["evidence"] == {
        "kind": "calibration", "model": "made-up", "revision": None, "sha256": "0" * 64, "effort": "best"
    }  # fmt: skip
    assert (made.inputs["size"], made.warnings) == (size, ())
    assert Plan.from_json(made.to_json()) == made


def test_a_second_budget_of_what_a_token_reads(tmp_path: Path) -> None:
    tensors, config = in_memory("qwen3_5_moe")
    known = evidence_of(tensors, config)
    size = sum(ends(known, tensors, config, group_size="auto")) // 2
    free = plan(size, known, tensors, config, group_size="auto")
    reads = summary(free, tensors, config).active_bytes_per_token
    shares = active_shares(tensors, config)
    for share in (0.8, 0.95):
        active = round(share * reads)
        made = plan(size, known, tensors, config, group_size="auto", active=active)
        assert summary(made, tensors, config).active_bytes_per_token <= active
        assert files(made, tensors) <= size
        assert made.inputs["active"] == active
        assert made.inputs["predicted_kld"] >= free.inputs["predicted_kld"]
    alone = plan(None, known, tensors, config, group_size="auto", active=round(0.8 * reads))
    assert all(alone.bits(name) == 16 for name in tensors if not shares[name])
    with pytest.raises(BudgetError, match=r"active size 1 \(1 bytes\): below the smallest plan; the smallest takes"):
        plan(size, known, tensors, config, group_size="auto", active=1)


@pytest.mark.parametrize("wish", [{"fuse": True}, {"target": "vllm"}])
def test_what_engines_fuse_is_one_choice(wish: dict[str, Any], tmp_path: Path) -> None:
    tensors, config = saved("qwen3_moe", tmp_path)
    known = evidence_of(tensors, config, seed=1)
    size = sum(ends(known, tensors, config, group_size="auto")) // 3
    groups = fused_groups(tensors, config)
    loose = plan(size, known, tensors, config, group_size="auto")
    made = plan(size, known, tensors, config, group_size="auto", **wish)
    assert any(len({loose.bits(name) for name in group}) > 1 for group in groups)
    assert all(len({made.bits(name) for name in group}) == 1 for group in groups)
    assert loose.inputs["predicted_kld"] <= made.inputs["predicted_kld"]
    assert files(made, tensors) <= size
    assert made.warnings == ()


@pytest.mark.parametrize(
    ("arch", "packs"), [("qwen3", True), ("qwen3_moe", True), ("llama", False), ("qwen3_5", False)]
)
def test_vllm_keeps_an_embedding_that_its_model_cannot_pack(arch: str, packs: bool) -> None:
    tensors, config = in_memory(arch)
    known = evidence_of(tensors, config)
    options = {"group_size": "auto", "target": "vllm"}
    made = plan(ends(known, tensors, config, **options)[0], known, tensors, config, **options)
    embedding = next(name for name, info in tensors.items() if role_of(name, info, config) is Role.EMBEDDING)
    assert (made.bits(embedding) == 2) is packs
    if not packs:
        assert (
            f"vllm's {config['model_type']} model holds it in a layer that cannot be packed"
            in made.choices[embedding].why
        )
    assert made.bits("lm_head.weight") == 2


def test_overrides_are_fixed_and_their_bytes_and_losses_counted() -> None:
    low, high = ends(overrides=[(OUT, 8)])
    assert low > ends()[0]
    made = plan((low + high) // 2, overrides=[(OUT, 8), (EMBEDDING, 16)])
    assert (made.bits(OUT), made.bits(EMBEDDING)) == (8, 16)
    assert files(made) <= (low + high) // 2
    assert made.inputs["predicted_kld"] == pytest.approx(predicted(made), rel=1e-5)


def test_an_override_of_what_was_not_measured_is_named() -> None:
    low, high = ends()
    made = plan((low + high) // 2, overrides=[(OUT, "tq4g64")])
    assert f"{OUT}: overridden to a format that was not measured" in made.warnings[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [("*experts.1.gate_proj.weight", 5)],
            r"experts\.1\.gate_proj\.weight: set by .* to k5, which breaks a tie",
        ),
        (
            [("*layers.0.*experts.*.up_proj.weight", 4), ("*layers.0.*experts.2.up_proj.weight", 5)],
            r"breaks a tie.*\(k4\)",
        ),
        ([("*layers.1.self_attn.q_proj.weight", 6)], None),
        ([("*layers.0.*experts.*.up_proj.weight", 4)], None),
    ],
)
def test_overrides_that_break_a_tie(overrides: list[tuple[str, int]], message: str | None, tmp_path: Path) -> None:
    tensors, config = saved("qwen3_moe", tmp_path)
    known = evidence_of(tensors, config)
    size = sum(ends(known, tensors, config, group_size="auto")) // 2
    if message:
        with pytest.raises(PlanError, match=message):
            plan(size, known, tensors, config, group_size="auto", overrides=overrides)
    else:
        plan(size, known, tensors, config, group_size="auto", overrides=overrides)
        with pytest.raises(PlanError, match=r"breaks a tie: it gets one width and kind with model\.layers\.\d\."):
            plan(size, known, tensors, config, group_size="auto", overrides=overrides, fuse=True)


def test_evidence_of_weights_says_that_nothing_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    known = of_weights(KNOWN)
    low, high = ends(known)
    with caplog.at_level(logging.WARNING, "kappaquant"):
        made = plan((low + high) // 2, known)
    assert "nothing was measured on text" in caplog.text
    assert made.warnings[0] == caplog.messages[0]
    assert "predicted_kld" not in made.inputs
    assert made.inputs["predicted_error"] == pytest.approx(predicted(made, known), rel=1e-5)
    assert made.choices[Q].why.endswith("of relative squared error")


def test_a_unit_without_a_divergence_takes_that_of_the_others() -> None:
    units = tuple(replace(u, kld=None, interval_95=None) if u.role == "embedding" else u for u in KNOWN.units)
    low, high = ends()
    made = plan((low + high) // 2, replace(KNOWN, units=units))
    assert "1 of 7 units have no measured divergence, such as model.language_model.embed_tokens" in made.warnings[0]
    assert made.choices[EMBEDDING].why.endswith("nats")


def test_only_widths_that_were_measured_are_chosen() -> None:
    known = evidence_of(TENSORS, QWEN, group_size=128, bits=(3, 4, 6))
    low, high = ends(known)
    for size in (low, (2 * low + high) // 3, (low + high) // 2):
        made = plan(size, known)
        assert {made.bits(name) for name in (Q, OUT, GATE_UP, DOWN, EMBEDDING, HEAD)} <= {3, 4, 6, 16}


def test_a_budget_below_the_smallest_or_above_the_largest_says_both() -> None:
    low, high = ends()
    assert files(plan(low)) == low
    assert files(plan(high)) == high
    for size, where in ((low - 1, "below the smallest"), (high + 1, "above the largest")):
        with pytest.raises(BudgetError, match=rf"size {size:,} .*{where} plan; .*{low:,} bytes .*{high:,} "):
            plan(size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": None}, "needs evidence; run calibrate first"),
        ({"size": None}, "needs a budget of bytes"),
        ({"group_size": 64}, r"has no error for tq2g64, only for tq2g128.*calibrate with this group size"),
        ({"policy": "uniform", "active": 5, "size": None}, "active size 5: the uniform policy keeps to no active size"),
        ({"policy": "kurtosis", "active": 5}, "active size 5: the kurtosis policy keeps to no active size"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    given = {"policy": "sensitivity", "group_size": 128, "sensitivity": KNOWN, "size": 10**6, **options}
    with pytest.raises(PlanError, match=message):
        make_plan(TENSORS, QWEN, **given)


def test_evidence_that_lacks_a_tensor_or_has_another_models() -> None:
    lacking = replace(KNOWN, units=tuple(u for u in KNOWN.units if OUT not in u.tensors))
    with pytest.raises(PlanError, match=r"o_proj\.weight: the evidence does not have it; calibrate this very model"):
        plan(10**6, lacking)
    assert plan(10**6, lacking, overrides=[(OUT, 4), (EMBEDDING, 16)]).bits(OUT) == 4
    fewer = {name: info for name, info in TENSORS.items() if name != OUT}
    with pytest.raises(PlanError, match=r"o_proj\.weight: in the evidence .* but not in the source"):
        plan(10**6, tensors=fewer)


def test_what_is_short_of_a_group_stays_kept() -> None:
    low, _ = ends()
    assert "group size 128" in plan(low).choices[SHARED_DOWN].why
