"""What an export to MLX refuses, and that nothing is left behind; and the check that folding is exact."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from mlx_exports import KEEP, MIXED, export, save
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.exports.mlx import Options, exactness, export_mlx
from kappaquant.exports.mlx import layout as layouts
from kappaquant.models.roles import Role


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama") / "source", tokenizer=False)


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a source with other values in config.json."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    os.link(source / "model.safetensors", folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'; mlx_lm's class llama has no such option"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding attention",
        ),
        ("mixtral", {"head_dim": 64}, "head_dim 64 beside 4 heads of 128 channels"),
        (
            "qwen3_moe",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'linear'",
        ),
        ("qwen3_5", {"layer_types": ["full_attention", "linear_attention"]}, r"full attention in layers \[1\] of 2"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 2}, r"full attention in layers \[\] of 2"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ],
)
def test_what_mlx_cannot_compute(architecture: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save(architecture, tmp_path / "source", tokenizer=False, **changes)
    with pytest.raises(kappaquant.UnsupportedError, match=message):
        export(source, tmp_path / "out", KEEP)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_an_architecture_that_has_no_export(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        kappaquant.UnsupportedError, match="no export of model_type 'qwen2' to MLX; there is one of gemma3_text"
    ):
        export(edited(llama, tmp_path / "source", model_type="qwen2", architectures=None), tmp_path / "out", KEEP)


def test_weights_that_do_not_fit_the_configuration(llama: Path, tmp_path: Path) -> None:
    wide = edited(llama, tmp_path / "wide", intermediate_size=256)
    with pytest.raises(kappaquant.SourceError, match=r"has shape \[128, 192\], config.json wants \[128, 256\]"):
        export(wide, tmp_path / "out", KEEP)
    deep = edited(llama, tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(kappaquant.SourceError, match=r"model.layers.2\..*: missing from .*deep \(and \d+ more\)"):
        export(deep, tmp_path / "out", KEEP)
    shallow = edited(llama, tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(kappaquant.SourceError, match=r"model.layers.1\..*: nothing in the model is called so"):
        export(shallow, tmp_path / "out", KEEP)


def test_values_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    for value, options, message in (
        (float("nan"), {}, f"{name}: holds NaN or infinity"),
        (1e6, {"dtype": "F16", "rotate": False}, f"{name}: holds 1e.06, more than F16 can; give --dtype BF16"),
    ):
        folder = tmp_path / str(value)
        folder.mkdir()
        state = load_file(llama / "model.safetensors")
        state[name][5, 5] = value
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((llama / "config.json").read_text())
        with pytest.raises((kappaquant.NonFiniteError, kappaquant.UnsupportedError), match=message):
            export(folder, tmp_path / f"out-{value}", KEEP, **{"rotate": False, **options})


def test_options_and_places(llama: Path, tmp_path: Path) -> None:
    source = kappaquant.open_source(llama)
    plan = kappaquant.make_plan(source.tensors, source.config, group_size=32)
    wide = kappaquant.make_plan(source.tensors, source.config, group_size=256, overrides=[("*.o_proj.weight", 4)])
    for refused, message in (
        (lambda: Options(effort="most"), "effort 'most': must be one of fast, best"),
        (lambda: Options(dtype="F64"), "dtype 'F64': must be one of BF16, F16, F32"),
        (lambda: Options(groups=(("*", 256),)), r"override '\*': 4 bits in groups of 256"),
        (lambda: export_mlx(source, tmp_path / "out", wide), r"o_proj.weight: groups of 256; MLX has groups of 32, 64, 128: give --group-size"),
        (lambda: export_mlx(source, tmp_path / "out", plan, Options(groups=(("x*", 32),))), r"'x\*' matches no tensor"),
    ):  # fmt: skip
        with pytest.raises(kappaquant.PlanError, match=message):
            refused()
    with pytest.raises(kappaquant.OutputError, match=r"lies in .*, which is read"):
        export_mlx(source, llama / "out", plan)
    with pytest.raises(kappaquant.OutputError, match="no such folder; create it first"):
        export_mlx(source, tmp_path / "a" / "out", plan)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(kappaquant.OutputError, match="exists and is not empty"):
        export_mlx(source, tmp_path / "full", plan)
    assert sorted(os.listdir(tmp_path)) == ["full"]


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_moe", "qwen3_5", "qwen3_5_moe"])
def test_a_large_model_is_checked_layer_by_layer(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(architecture, tmp_path / "source", tied=True, tokenizer=False)
    whole = export(source, tmp_path / "whole", MIXED)["exactness"]
    monkeypatch.setattr(exactness, "WHOLE", 0)
    monkeypatch.setattr(exactness, "EXPERTS", 3)
    monkeypatch.setattr(exactness, "NEURONS", 96)
    seen: list[str] = []
    real = exactness.Check.run
    monkeypatch.setattr(
        exactness.Check, "run", lambda self, part, entries: (seen.append(part.name), real(self, part, entries))[1]
    )
    parts = export(source, tmp_path / "parts", MIXED)["exactness"]
    assert sorted(seen) == ["embedding and head", "layer 0", "layer 1"]
    assert whole["compared"] == "the whole model"
    assert "layer by layer" in parts["compared"]
    assert max(whole["relative_difference_below"], parts["relative_difference_below"]) <= 1e-4


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("mistake", ["gated norm reset", "reader forgotten", "writer forgotten", "wrong gain"])
def test_a_fold_that_is_wrong_is_noticed(
    mistake: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save("qwen3_5", tmp_path / "source", tokenizer=False)
    if not whole:
        monkeypatch.setattr(exactness, "WHOLE", 0)
    if mistake == "gated norm reset":
        monkeypatch.setattr(layouts, "_FOLDED_NORM", re.compile(r".*(?<!q_)(?<!k_)norm\.weight"))
    elif mistake == "reader forgotten":
        monkeypatch.delitem(layouts.READS, Role.GDN_Z)
    elif mistake == "writer forgotten":
        monkeypatch.setattr(layouts, "WRITES", (Role.ATTENTION_O, Role.MLP_DOWN))
    else:
        monkeypatch.setitem(layouts.READS, Role.MLP_UP, "input_layernorm")
    with pytest.raises(kappaquant.UnsupportedError, match=r"changes what it computes by .* export with --no-rotate"):
        export(source, tmp_path / "out", MIXED)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ["--set", "*.q_proj.weight=5:32", "--set", "*.k_proj.weight=6", "--group-size", "64"]
    done = run(
        "export", str(llama), "--to", "mlx", "-o", str(out), "--policy", "uniform", "--bits", "4", *settings, "--json"
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads((out / "mlx_export.json").read_text())
    formats = json.loads((out / "config.json").read_text())["quantization"]
    attention = "model.layers.0.self_attn."
    found = [
        (formats[attention + name]["bits"], formats[attention + name]["group_size"])
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    assert found == [(5, 32), (6, 64), (4, 64)]
    source = kappaquant.open_source(llama)
    kappaquant.make_plan(source.tensors, source.config, "uniform", bits=2).save(tmp_path / "plan.json")
    options = ["--plan", str(tmp_path / "plan.json"), "--set", "*.k_proj.weight=8", "--no-rotate", "--effort", "fast"]
    done = run("export", str(llama), "-o", str(tmp_path / "planned"), *options)
    assert done.exit_code == 0, done.output
    assert re.search(r"planned: 0\.\d+ GB, \d+\.\d+ bits per weight", done.stdout)
    formats = json.loads((tmp_path / "planned" / "config.json").read_text())["quantization"]
    assert [formats[attention + name]["bits"] for name in ("q_proj", "k_proj")] == [2, 8]


def test_the_command_takes_the_bits_of_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    source = kappaquant.open_source(llama)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4, overrides=[("*.o_proj.weight", 5)])
    kappaquant.quantize(source, tmp_path / "checkpoint", plan)
    done = run("export", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "quantized twice" in done.stderr
    formats = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert [formats[f"model.layers.0.self_attn.{n}"]["bits"] for n in ("q_proj", "o_proj")] == [4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf"], "--to 'gguf': must be one of mlx"),
        (["--set", "*.q_proj.weight=4:big"], "write PATTERN=BITS or PATTERN=BITS:GROUP"),
        (["--set", "*.q_proj.weight=4:48"], "groups of 48"),
        (["--set", "*.nothing=4"], "matches no tensor"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, llama: Path, tmp_path: Path) -> None:
    done = run("export", str(llama), "-o", str(tmp_path / "out"), *arguments)
    assert isinstance(done.exception, kappaquant.PlanError)
    assert message in str(done.exception)
    assert os.listdir(tmp_path) == []
