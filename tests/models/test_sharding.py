"""Plans for serving engines: warnings of mixed widths, --fuse-legal and its price, and how many cards can share a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Format, Part
from kappaquant.formats.codebook import FORMATS
from kappaquant.formats.registry import format_by_id
from kappaquant.kernels.cuda import tiles
from kappaquant.models import sharding as parallel

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("source") / "tiny")


def plan(source: Path, **options: Any) -> kappaquant.Plan:
    opened = kappaquant.open_source(source)
    return kappaquant.make_plan(opened.tensors, opened.config, **options)


def test_a_plan_of_one_width_warns_of_nothing(source: Path) -> None:
    assert plan(source, bits=3, target="vllm").warnings == ()


def test_mixed_widths_are_named_with_their_layers_and_their_price(source: Path) -> None:
    overrides = [("*.k_proj.weight", 5), ("*.0.mlp.experts.3.gate_proj.weight", 16)]
    experts, attention = plan(source, bits=3, overrides=overrides, target="vllm").warnings
    assert attention == (
        "model.layers.*.self_attn.k_proj.weight, model.layers.*.self_attn.q_proj.weight, "
        "model.layers.*.self_attn.v_proj.weight: k3, k5 in layers 0, 1: vllm fuses these, and multiplies once for each; "
        "--fuse-legal makes them equal"
    )
    assert "experts.*.gate_proj.weight (5)" in experts
    assert "k3, kept in layers 0: vllm fuses these, and runs mixed experts slowly, once for each" in experts
    assert plan(source, bits=3, overrides=overrides).warnings == ()


def test_kinds_of_one_width_are_mixed_as_well(source: Path) -> None:
    (attention,) = plan(source, bits=3, overrides=[("*.k_proj.weight", "t3")], target="vllm").warnings
    assert "v_proj.weight: k3, t3 in layers 0, 1: vllm fuses these" in attention


def test_fuse_legal_raises_to_the_larger_width_and_silences_the_warnings(source: Path) -> None:
    made = plan(source, bits=3, overrides=[("*.0.self_attn.k_proj.weight", 5)], fuse=True, target="vllm")
    assert made.warnings == ()
    assert {made.bits(f"{LAYER}self_attn.{name}_proj.weight") for name in "qkv"} == {5}
    assert made.bits("model.layers.1.self_attn.q_proj.weight") == 3


def test_an_unknown_target(source: Path) -> None:
    with pytest.raises(PlanError, match="target 'sglang' is unknown; the targets are vllm"):
        plan(source, target="sglang")


def test_the_command_says_what_fusing_cost_and_how_many_cards(source: Path) -> None:
    arguments = ["plan", str(source), "--policy", "uniform", "--bits", "3", "--group-size", "32", "--target", "vllm"]
    mixed = CliRunner().invoke(app, [*arguments, "--set", "*.k_proj.weight=5", "--fuse-legal"])
    assert mixed.exit_code == 0, mixed.output
    freely, fused = (
        plan(source, bits=3, group_size=32, overrides=[("*.k_proj.weight", 5)], fuse=fuse) for fuse in (False, True)
    )
    tensors = kappaquant.open_source(source).tensors
    raised = [name for name in tensors if freely.bits(name) != fused.bits(name)]
    assert f"--fuse-legal raised {len(raised)} tensors, which cost 12.3 kB (3.96%)" in mixed.output
    assert "cards that can share it (--tensor-parallel-size): 1, 2\n" in mixed.output


def shares(config: dict[str, Any], **tensors: tuple[tuple[int, ...], Format | None]) -> Any:
    infos = {name: TensorInfo(name, "BF16", shape) for name, (shape, _) in tensors.items()}
    return infos, lambda name: tensors[name][1], {"model_type": "qwen3_5_moe_text", **config}


G128, G64 = FORMATS["tq3g128"], FORMATS["tq3g64"]
OUT, DOWN, EXPERTS = (
    LAYER + name for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.experts.down_proj")
)


@pytest.mark.parametrize(
    ("config", "tensors", "sizes"),
    [
        ({"num_attention_heads": 8}, {}, [1, 2, 4, 8]),
        ({"num_attention_heads": 16, "num_key_value_heads": 2}, {}, [1, 2, 4, 8, 16]),  # k and v are repeated
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, {}, [1, 2, 4, 12]),
        ({}, {OUT: ((64, 512), G128)}, [1, 2, 4]),  # whole groups
        ({"num_attention_heads": 64}, {DOWN: ((64, 192), G128)}, [1]),  # the last group is padded
        ({"num_attention_heads": 64}, {DOWN: ((64, 192), None)}, [1, 2, 4, 8, 16, 32, 64]),  # kept: cut anywhere
        (
            {},
            {LAYER + "self_attn.q_proj.weight": ((96, 128), G128), OUT: ((64, 256), G128)},
            [1, 2],
        ),  # rows: cut anywhere
        ({"linear_num_key_heads": 4, "linear_num_value_heads": 6}, {}, [1, 2]),
    ],
)
def test_numbers_of_cards(config: dict[str, Any], tensors: dict[str, Any], sizes: list[int]) -> None:
    assert parallel.sizes(*shares(config, **tensors)) == sizes


def test_expert_parallelism_leaves_experts_whole() -> None:
    what = shares({"num_attention_heads": 8, "moe_intermediate_size": 384}, **{EXPERTS: ((4, 64, 384), G128)})
    assert parallel.sizes(*what) == [1]
    assert parallel.sizes(*what, expert_parallel=True) == [1, 2, 4, 8]
    assert list(parallel.problems(*what, 2)) == [
        f"{EXPERTS}: 384 inputs over 2 cards are 192 each, no whole number of groups of 128"
    ]
    assert "moe_intermediate_size 384 is not divisible by 5" in list(parallel.problems(*what, 5))


def test_the_text_and_the_vision_part_of_a_model_both_count() -> None:
    parts = {"text_config": {"num_attention_heads": 8}, "vision_config": {"num_heads": 6, "intermediate_size": 4}}
    assert parallel.sizes(*shares(parts)) == [1, 2]


def test_what_a_card_holds_is_padded_to_the_tiles_of_its_kernels() -> None:
    """Of down projections 128 inputs over 2 cards are half a tile of 128; rows are cut nowhere here."""
    what = shares({"moe_intermediate_size": 128, "num_experts": 4}, **{EXPERTS: ((4, 64, 128), G64)})
    packed = G64.nbytes((4, 64, 128))
    assert parallel.bytes_per_card(*what, 2) == packed // 2
    assert parallel.bytes_per_card(*what, 2, tile=(32, 128)) == packed
    assert parallel.bytes_per_card(*what, 2, tile=(32, 128), expert_parallel=True) == packed // 2
    rows = shares({"num_attention_heads": 8}, **{"model.layers.0.self_attn.q_proj.weight": ((48, 128), G64)})
    assert parallel.bytes_per_card(*rows, 2, tile=(32, 128)) == G64.nbytes((32, 128))


@pytest.mark.parametrize("fmt", ["tq3g64", "t3g64", "t2g32", "t4g128", "tq5g32", "tq4g256", "t2g256"])
@pytest.mark.parametrize("shape", [(48, 80), (33, 300), (4, 40, 192), (64, 512)])
def test_what_a_card_holds_are_the_bytes_of_the_tiles(fmt: str, shape: tuple[int, ...]) -> None:
    """Those of trellis codes are as many as codebooks' of their bits."""
    held = format_by_id(fmt, "w")
    packed, norms = (
        torch.zeros(part, dtype=dtype)
        for (_, part), dtype in zip(held.parts(shape).values(), (torch.uint8, torch.float16), strict=True)
    )
    tiled = tiles.tile(packed, norms, held)
    name = EXPERTS if len(shape) == 3 else DOWN
    what = shares({}, **{name: (shape, held)})
    assert parallel.bytes_per_card(*what, 1, tile=(tiles.ROWS, tiles.INPUTS)) == tiled.codes.nbytes + tiled.norms.nbytes
    assert parallel.bytes_per_card(*what, 1) == held.nbytes(shape)


class PlainBytes(Format):
    """A byte for each weight, of which no tile is made."""

    id, bits = "plain8", 8

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {".bytes": ("U8", shape)}

    encode = decode = columns = None  # type: ignore[assignment]


def test_what_no_tile_holds_is_not_padded() -> None:
    for fmt, packed in ((PlainBytes(), 48 * 96), (None, 2 * 48 * 96)):
        what = shares({}, **{DOWN: ((48, 96), fmt)})
        assert parallel.bytes_per_card(*what, 1, tile=(32, 128)) == packed


def test_inspect_tells_beforehand(source: Path, tmp_path: Path) -> None:
    opened = kappaquant.open_source(source)
    folder = kappaquant.quantize(opened, tmp_path / "out", plan(source, bits=3))
    one = CliRunner().invoke(app, ["inspect", str(folder), "--tp", "1", "--json"])
    assert one.exit_code == 0
    assert json.loads(one.stdout)["format"] == "kappaquant"
    opened = kappaquant.open_checkpoint(folder)
    assert f"({sum(opened.nbytes(name) for name in opened.keys())} bytes)" in one.stderr
    two = CliRunner().invoke(app, ["inspect", str(folder), "--tp", "2"])
    assert two.exit_code == 1
    assert "mlp.experts.0.down_proj.weight: 128 inputs over 2 cards are 64 each" in two.output
    assert "2 cards cannot share it; these numbers can: 1" in two.output
