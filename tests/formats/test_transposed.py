"""Weights that are stored [..., in, out]: the codes of their transposition, under their own names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import FormatError, PlanError
from kappaquant.exports.plain import dequantize
from kappaquant.files import tensors as file_tensors
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.registry import format_by_id
from kappaquant.formats.transposed import Transposed, fitting_weight, swapped
from kappaquant.planning.plan import Choice, Plan

NAME = "transformer.h.0.mlp.c_fc.weight"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 1, "hidden_size": 160, "intermediate_size": 192,
    "num_local_experts": 3, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
    "vocab_size": 64, "layer_types": ["full_attention"], "tie_word_embeddings": False,
}  # fmt: skip
ROWWISE = CodebookFormat(4, 64)


def test_parts_are_those_of_the_transposed_weight() -> None:
    weight = torch.randn(3, 160, 384, generator=torch.Generator().manual_seed(0))
    fmt = Transposed(ROWWISE)
    made, expected = fmt.encode(weight), ROWWISE.encode(weight.mT.contiguous())
    assert {s: (t.dtype, t.shape) for s, t in made.parts.items()} == {
        s: (t.dtype, t.shape) for s, t in expected.parts.items()
    }
    assert all(torch.equal(made.parts[s], expected.parts[s]) for s in expected.parts)
    assert torch.equal(fmt.decode(made.parts, 160), ROWWISE.decode(expected.parts, 160).mT)
    assert fmt.parts(tuple(weight.shape)) == ROWWISE.parts(swapped(tuple(weight.shape)))
    assert fmt.nbytes((160, 384)) == ROWWISE.nbytes((384, 160))
    assert fmt.rowwise == ROWWISE.rowwise == ROWWISE


def test_every_format_has_a_transposed_one_by_its_id() -> None:
    fmt = format_by_id("tq4g64t", NAME)
    assert (fmt, fmt.transposed, fmt.key) == (Transposed(ROWWISE), True, "tq4g64t")
    assert fmt != ROWWISE
    assert fmt.restored(fmt.settings()) == fmt
    with pytest.raises(FormatError, match=r"unknown format id 'tq4g77t'.*and with 't' behind it"):
        format_by_id("tq4g77t", NAME)


def test_groups_fit_the_input_axis() -> None:
    assert fitting_weight(4, (96, 256), "auto", False).id == "tq4g128"
    assert fitting_weight(4, (96, 256), "auto", True).id == "tq4g32t"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts whose input axis is no multiple of the group, so that rows are padded."""
    folder = tmp_path_factory.mktemp("transposed") / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT_OSS))
    from kappaquant.models.skeleton import parameter_shapes

    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(GPT_OSS)
    state = {name: torch.randn(shape, generator=generator).mul(0.05).bfloat16() for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def planned(source: Path, **options: object) -> tuple[kappaquant.Source, Plan]:
    opened = kappaquant.open_source(source)
    return opened, kappaquant.make_plan(opened.tensors, opened.config, "uniform", bits=4, group_size=64, **options)


def test_a_checkpoint_of_them(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, plan = planned(source)
    assert plan.choices[STACK].format == "tq4g64t"
    kappaquant.quantize(opened, tmp_path / "one", plan, kappaquant.Options(jobs=1))
    checkpoint = kappaquant.open_checkpoint(tmp_path / "one")
    weight = opened.read(STACK).view(opened.tensors[STACK].shape)
    expected = ROWWISE.decode(ROWWISE.encode(weight.mT.contiguous()).parts, 160).mT
    assert torch.equal(checkpoint.dequantize(STACK), expected)
    assert checkpoint.shape(STACK) == (3, 160, 384)
    entry = checkpoint.entry(STACK)
    for start, stop in ((0, 1), (159, 161), (100, 480)):  # rows within, over and at the ends of matrices
        assert torch.equal(entry.read_rows(start, stop), expected.reshape(-1, 384)[start:stop])
    dequantize(checkpoint, tmp_path / "plain", "F32")
    plain = kappaquant.open_source(tmp_path / "plain")
    assert torch.equal(plain.read(STACK).view(3, 160, 384), expected)
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "one"), "--json"]).output)["tensors"][STACK]
    assert (shown["format"], shown["shape"]) == ("tq4g64t", [3, 160, 384])


def test_cuts_do_not_change_a_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, plan = planned(source)
    kappaquant.quantize(opened, tmp_path / "whole", plan, kappaquant.Options(jobs=1))
    monkeypatch.setattr(file_tensors, "SLICE_ELEMENTS", 1000)  # one matrix a slice, however large
    kappaquant.quantize(opened, tmp_path / "cut", plan, kappaquant.Options(jobs=1))
    whole, cut = (tmp_path / each / "model.safetensors" for each in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_format_along_the_other_axis_is_refused(source: Path, tmp_path: Path) -> None:
    opened, plan = planned(source)
    query = "model.layers.0.self_attn.q_proj.weight"
    for name, wrong, right in ((STACK, "tq4g64", "tq4g64t"), (query, "tq4g64t", "tq4g64")):
        changed = Plan({**plan.choices, name: Choice(wrong, "by hand")}, 64, "uniform", {})
        with pytest.raises(PlanError, match=rf"{name}: the plan stores it as {wrong}, .* give it {right}$"):
            kappaquant.quantize(opened, tmp_path / "out", changed)
    assert not (tmp_path / "out").exists()


def test_overrides_name_either(source: Path) -> None:
    for setting in ("tq3g128", "tq3g128t", 3):
        _, plan = planned(source, overrides=[("*gate_up_proj", setting)])
        assert plan.choices[STACK].format in ("tq3g128t", "tq3g64t")


def test_tq3_native_has_none(source: Path, tmp_path: Path) -> None:
    opened, plan = planned(source)
    with pytest.raises(PlanError, match="tq4g64t is no format of tq3_native"):
        kappaquant.quantize(opened, tmp_path / "out", plan, kappaquant.Options(container="tq3_native"))


def test_a_scan_measures_along_the_inputs(source: Path) -> None:
    opened, _ = planned(source)
    measured = kappaquant.scan(opened, group_size=64, bits=[4], jobs=1).tensors[STACK].relative_mse[4]
    weight = opened.read(STACK).view(3, 160, 384).float()
    assert measured == pytest.approx(ROWWISE.encode(weight.mT.contiguous(), "fast").relative_mse, rel=0.05)
