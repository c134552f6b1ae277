"""Tables show what the library returns: every family once, exact bytes, and what is wrong with a source."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Q, quantize, tensors, write_source
from planned import QWEN, TENSORS, plan
from rich.console import Console

import kappaquant
from kappaquant.checkpoints import contents
from kappaquant.commands.tables import ProgressBar, checkpoint_json, checkpoint_table, plan_table, profile_table
from kappaquant.planning.sizes import summary


def printed(content: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(content)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> kappaquant.Checkpoint:
    root = tmp_path_factory.mktemp("tables")
    return quantize(write_source(root / "source"), root / "out", "recipe")


def test_a_checkpoint(checkpoint: kappaquant.Checkpoint) -> None:
    shown = checkpoint_json(checkpoint)
    assert list(shown["tensors"]) == checkpoint.keys()
    assert shown["tensors"]["model.norm.weight"] == {"shape": [256], "bits": 16, "format": "BF16", "bytes": 512}
    quantized = shown["tensors"][Q]
    assert quantized["format"] == f"tq{checkpoint.bits(Q)}g128"
    assert quantized["bytes"] == 96 * 2 * (checkpoint.bits(Q) * 16 + 2)
    families = contents.families(checkpoint)
    assert list(shown["families"]) == list(families)
    checkpoint.notices.append("something odd")
    text = printed(checkpoint_table(checkpoint))
    checkpoint.notices.pop()
    assert all(text.count(f" {family} ") == 1 for family in families)
    assert all(fmt in text for fmt in contents.formats(checkpoint, checkpoint.keys()))
    assert "note: something odd" in text


def test_a_plan(tmp_path: Path) -> None:
    source = kappaquant.open_source(write_source(tmp_path / "source"))
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3)
    sizes = summary(plan, source.tensors, source.config)
    text = printed(plan_table(plan, sizes, 1_234_567))
    assert "weight files: 1,234,567 bytes (1.23 MB, 1.18 MiB), exactly" in text
    assert "tq3g128" in text
    assert all(row.format in text for row in sizes.per_tensor)
    assert "kept" in text
    assert all(family in text for family in sizes.families)


def test_a_plan_says_what_the_mtp_head_costs() -> None:
    for overrides, said in (
        ([], "the MTP head (kept) takes 131,072 bytes (131.1 kB), "),
        ([("mtp.*", 4)], "the MTP head (1 of 1 tensors packed) takes 33,792 bytes (33.8 kB), "),
    ):
        made = plan(overrides=overrides)
        sizes = summary(made, TENSORS, QWEN)
        (line,) = (line for line in printed(plan_table(made, sizes, 1)).splitlines() if "MTP" in line)
        assert line.startswith(said)
        share = f"{sizes.mtp.output_bytes / sizes.output_bytes:.1%}"
        assert line.rstrip().endswith(f"{share} of the weights; only speculative decoding reads it")
    without = {name: info for name, info in TENSORS.items() if not name.startswith("mtp.")}
    made = plan(tensors=without)
    assert "MTP" not in printed(plan_table(made, summary(made, without, QWEN), 1))


def test_a_profile_says_what_is_not_finite(tmp_path: Path) -> None:
    content = tensors()
    content[Q][3, 5] = torch.nan
    folder = write_source(tmp_path / "source", content)
    text = printed(profile_table(kappaquant.scan(kappaquant.open_source(folder))))
    assert "max/σ: largest weight in standard deviations" in text
    assert f"NaN or infinity in {Q}" in text
    assert "and" not in text.partition("NaN or infinity")[2]


def test_progress_counts_each_stage() -> None:
    console = Console(file=io.StringIO(), width=150, force_terminal=True)
    with ProgressBar("scan", console) as report:
        report("reading", 500_000, 2_000_000)
        report("reading", 2_000_000, 2_000_000)
    with ProgressBar("evaluate", console, "questions") as report:
        report("asking", 1, 3)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "scan: reading" in text
    assert "2.0 MB of 2.0 MB" in text
    assert "1/3" in text
