"""The exact arithmetic of the dry run: bytes of each tensor, bytes read per token, the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from headers import in_memory, infos, saved
from planned import DOWN, GATE_UP, QWEN, SHARED_DOWN, TENSORS, Q, plan
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from kappaquant.checkpoints.open import container_by_id
from kappaquant.planning.sizes import file_bytes, most_bytes, most_header_bytes, shown, summary


def test_summary_is_exact() -> None:
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
    assert list(got.by_format) == ["tq3g128", "tq4g128", "kept"]
    assert got.by_format["tq4g128"].tensors == 1
    idle = ("model.visual", "mtp.")
    whole = [r for r in got.per_tensor if not r.name.startswith(idle) and "experts." not in r.name]
    active = sum(r.output_bytes for r in whole if "embed" not in r.name) + 256 * 2
    active += (by_name[GATE_UP].output_bytes + by_name[DOWN].output_bytes) * 2 // 4
    assert got.active_bytes_per_token == active


def test_what_the_mtp_head_costs() -> None:
    kept = summary(plan(bits=3), TENSORS, QWEN)
    packed = summary(plan(bits=3, overrides=[("mtp.layers.*", 4)]), TENSORS, QWEN)
    assert kept.mtp.output_bytes == kept.mtp.source_bytes == 256 * 256 * 2
    assert packed.mtp.output_bytes == 256 * 2 * (64 + 2)
    assert kept.output_bytes - packed.output_bytes == kept.mtp.output_bytes - packed.mtp.output_bytes
    assert kept.mtp.active_bytes == packed.mtp.active_bytes == 0
    assert kept.mtp == kept.families["mtp"]
    without = {name: info for name, info in TENSORS.items() if not name.startswith("mtp.")}
    none = summary(plan(bits=3, tensors=without), without, QWEN)
    assert none.mtp.tensors == none.mtp.output_bytes == 0


def test_active_bytes_agree_between_expert_layouts_and_count_a_tied_embedding_whole(tmp_path: Path) -> None:
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


def test_qwen3_6_35b_a3b_matches_the_published_sizes() -> None:
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


@pytest.mark.parametrize("bits", [2, 5, 16])
@pytest.mark.parametrize("count", [1, 3])
def test_bytes_of_the_files_are_those_of_the_container_and_never_above_the_sum_of_bounds(bits: int, count: int) -> None:
    names = list(TENSORS)
    shards = {f"{part}.safetensors": {name: TENSORS[name] for name in names[part::count]} for part in range(count)}
    made = plan(bits=bits, overrides=[(SHARED_DOWN, 4)])
    exact = file_bytes(shards, made.format_of)
    assert exact == container_by_id("kappaquant").output_bytes(shards, made.format_of)
    bound = sum(most_bytes(info, made.format_of(name), len(str(exact))) for name, info in TENSORS.items())
    assert 0 <= bound + most_header_bytes(shards) - exact < 100 * count


def test_sizes_are_shown_by_1000_and_by_1024() -> None:
    assert shown(18 * 10**9) == "18.00 GB, 16.76 GiB"
    assert shown(24 * 2**30) == "25.77 GB, 24.00 GiB"
    assert (shown(0), shown(999), shown(1000)) == ("0 bytes", "999 bytes", "1.00 KB, 1000 bytes")
    assert shown(-2048) == "-2.05 KB, -2.00 KiB"
