"""What ``kappaquant.engines.mlx.load`` refuses, what it leaves out, and that it works without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_models import edit_json, edit_shard, quantize, save, tokenizer_to

import kappaquant
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.exports.kappaquant_v1 import convert
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import Entry
from kappaquant.formats.registry import format_by_id
from kappaquant.planning.plan import Plan

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx.utils import tree_flatten  # noqa: E402

from kappaquant.engines.mlx import load  # noqa: E402
from kappaquant.engines.mlx.architectures import adapt  # noqa: E402
from kappaquant.engines.mlx.loading import grouped_format  # noqa: E402

# --- checkpoints ---


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mlx")
    source = save("qwen3_moe", root / "source")
    folders = {
        "v1": quantize(source, root / "v1"),
        "legacy": quantize(source, root / "legacy", {"*.q_proj.weight": 4}, container="tq3_native"),
        "bytes": quantize(source, root / "bytes", {"*_proj.weight": 5}, container="tq3_native"),
        "trellis": quantize(source, root / "trellis", {"*.q_proj.weight": "t3g64"}),
    }
    folders["converted"] = convert(kappaquant.open_checkpoint(folders["legacy"]), root / "converted")
    for folder in folders.values():
        tokenizer_to(folder)
    return folders


@pytest.fixture
def copied(quantized: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return shutil.copytree(quantized[request.param], tmp_path / request.param)


def test_float32_norms_in_v1_are_read_as_they_are(quantized: dict[str, Path]) -> None:
    before, after = (dict(tree_flatten(load(quantized[kind])[0].parameters())) for kind in ("legacy", "converted"))
    assert before.keys() == after.keys()
    assert all(
        mx.array_equal(array, after[name]) and array.dtype == after[name].dtype for name, array in before.items()
    )


def test_a_format_that_nothing_here_decodes() -> None:
    entry = Entry(TensorInfo("w", "F32", (64, 64)), format_by_id("t3g64t", "w"), {})
    with pytest.raises(
        UnsupportedError, match=r"^w: is stored as Transposed\(t3g64t\); MLX modules here take codebook"
    ):
        grouped_format(entry)


def in_config(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))

    return edit


def in_shard(edit: Any) -> Any:
    return lambda folder: edit_shard(folder, edit)


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("copied", "edit", "named"),
    [
        ("v1", in_config(format_version=2), "format_version 2"),
        ("v1", in_config(rotation="other/9"), "rotation 'other/9'"),
        ("v1", in_config(norms="F8"), "norms 'F8'"),
        ("v1", in_config(quant_method="awq"), "quantized by awq"),
        ("v1", in_config(tensors=None), "'tensors'"),
        ("v1", in_config(group_size=32), "vouches for"),
        ("v1", lambda f: (f / "kappaquant.json").unlink(), r"kappaquant\.json"),
        ("v1", lambda f: edit_json(f / "kappaquant.json", sha256={}), "SHA-256"),
        ("v1", lambda f: edit_json(f / "config.json", text_config=[]), "text_config"),
        ("v1", lambda f: (f / "config.json").write_text("{"), "not JSON"),
        ("v1", lambda f: next(f.glob("*.safetensors")).unlink(), r"\.safetensors"),
        ("v1", lambda f: next(f.glob("*.safetensors")).write_bytes(b"1234567"), "too short"),
        ("v1", in_shard(lambda s: s.pop(f"{EXPERT}.tq_norms")), rf"{EXPERT}\.tq_norms"),
        ("v1", in_shard(lambda s: s.pop(NORM)), NORM),
        ("v1", in_shard(lambda s: s.update(stray=torch.zeros(3))), "stray"),
        ("v1", in_shard(lambda s: s.update({NORM: torch.ones(3)})), NORM),
        (
            "v1",
            in_shard(lambda s: s.update({f"{EXPERT}.tq_packed": s[f"{EXPERT}.tq_packed"][:-1].clone()})),
            rf"{EXPERT}\.tq_packed",
        ),
        ("legacy", lambda f: edit_json(f / "tq_config.json", format="tq9"), "tq9"),
        ("legacy", lambda f: edit_json(f / "tq_config.json", quantizer_seed=7), "quantizer_seed"),
        ("legacy", lambda f: edit_json(f / "tq_config.json", group_size=100), "group_size"),
        ("legacy", in_shard(lambda s: s.pop(f"{Q}.tq_norms")), Q),
        ("legacy", in_shard(lambda s: s.pop(f"{Q}.tq_packed")), Q),
        (
            "legacy",
            in_shard(lambda s: s.update({f"{Q}.tq_packed": s[f"{Q}.tq_packed"][:, :-1].clone()})),
            rf"{Q}\.tq_packed: .* fits no packing",
        ),
        ("legacy", in_shard(lambda s: s.update({f"{Q}.tq_norms": s[f"{Q}.tq_norms"][:-1].clone()})), rf"{Q}\.tq_norms"),
        ("bytes", lambda f: edit_json(f / "tq_config.json", bits=9), "fits no packing"),
    ],
    indirect=["copied"],
)
def test_what_is_refused_of_a_checkpoint(copied: Path, edit: Any, named: str) -> None:
    edit(copied)
    with pytest.raises(FormatError, match=named):
        load(copied)


# --- the accounting: tq3_native has no map of its own, so the architecture alone decides ---


@pytest.mark.parametrize("copied", ["legacy"], indirect=True)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop(NORM), rf"{NORM}: .* needs it"),
        (lambda s: [s.pop(f"model.layers.1.mlp.gate_proj.weight{end}") for end in (".tq_packed", ".tq_norms")],
         r"model\.layers\.1\.mlp\.gate_proj\.weight: .* needs it"),
        (lambda s: [s.pop(f"{EXPERT}{end}") for end in (".tq_packed", ".tq_norms")],
         r"model\.layers\.0\.mlp\.switch_mlp\.up_proj\.weight of expert 3: .* needs it"),
        (lambda s: s.update(stray=torch.zeros(3)), "stray: .* no place"),
        (lambda s: [s.update({f"stray.{end}": s[f"{Q}.{end}"].clone()}) for end in ("tq_packed", "tq_norms")],
         "stray: the model has no parameter of this name"),
        (lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}), r"q_proj\.bias: .* no place"),
        (lambda s: s.update({EXPERT.replace(".3.", ".7."): torch.zeros(128, 128)}), r"experts\.7\.\S+: .* no place"),
        (lambda s: s.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(5, 128, 128)}), r"down_proj\S*: .* no place"),
        (lambda s: s.update({NORM: torch.zeros(64)}), rf"{NORM}: has shape \[64\] .* wants \[128\]"),
    ],
    ids=["kept", "packed", "expert", "stray", "stray codes", "bias", "expert too many", "expert twice", "shape"],
)  # fmt: skip
def test_every_tensor_and_every_parameter_is_accounted_for(copied: Path, edit: Any, message: str) -> None:
    edit_shard(copied, edit)
    with pytest.raises(FormatError, match=message):
        load(copied)


@pytest.mark.parametrize("copied", ["v1"], indirect=True)
def test_a_shape_the_architecture_does_not_have(copied: Path) -> None:
    edit_json(copied / "config.json", moe_intermediate_size=64)
    with pytest.raises(FormatError, match=r"experts\.0\.\w+\.weight: has shape \[\d+, \d+\] .* wants"):
        load(copied)


def test_a_convolution_of_the_wrong_shape(tmp_path: Path) -> None:
    folder = quantize(save("qwen3_5", tmp_path / "source"), tmp_path / "quantized", {}, container="tq3_native")
    edit_shard(folder, lambda s: [s.update({n: t[..., :3].clone()}) for n, t in list(s.items()) if "conv1d" in n])
    with pytest.raises(FormatError, match=r"conv1d\.weight: has shape .* wants"):
        load(folder)


@pytest.mark.parametrize("target", ["kappaquant", "tq3_native"])
def test_the_language_model_takes_no_vision_or_mtp_tensors(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept or packed; tq3_native has no shape for a packed one, and mlx_lm's model neither."""
    monkeypatch.setattr(Plan, "check", lambda *args: None)
    source = save("qwen3_5_moe", tmp_path / "source")
    folder = quantize(source, tmp_path / "quantized", {"*visual*.mlp.*.weight": 3}, every=True, container=target)
    checkpoint = kappaquant.open_checkpoint(folder)
    assert {checkpoint.bits(name) for name in checkpoint.keys() if "visual" in name} == {3, 16}
    tokenizer_to(folder)
    model, _ = load(folder)
    assert not [name for name, _ in tree_flatten(model.parameters()) if "visual" in name]


# --- configurations ---

BASE = {"model_type": "qwen3", "hidden_act": "silu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_oss"}, "model_type 'gpt_oss'"),
        ({"hidden_act": "relu2"}, "activation 'relu2'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3_moe", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"model_type": "gemma3_text", "hidden_act": None, "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gemma3_text", "hidden_act": None, "layer_types": ["sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen3_5", "layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        adapt({**BASE, **changes}, "folder")


@pytest.mark.parametrize("copied", ["v1"], indirect=True)
def test_a_configuration_mlx_lm_cannot_read(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["hidden_size"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"config\.json: mlx_lm cannot build .*hidden_size"):
        load(copied)


def test_rotary_bases_are_read_in_both_spellings() -> None:
    new = adapt(
        {**BASE, "model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
        "f",
    )
    assert (new["rope_theta"], new["rope_scaling"]["factor"]) == (5e5, 8.0)
    assert adapt({**BASE, "model_type": "mixtral", "rope_theta": 7.0}, "f")["rope_theta"] == 7.0
    types = ["sliding_attention"] * 5 + ["full_attention"]
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 123.0}}
    gemma = adapt({"model_type": "gemma3_text", "layer_types": types, "rope_parameters": rope}, "f")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"], gemma["sliding_window_pattern"]) == (1e6, 123.0, 6)
    assert gemma["tie_word_embeddings"]


# --- no torch ---


def test_it_works_where_torch_is_not_installed(quantized: dict[str, Path]) -> None:
    """transformers, which mlx_lm's tokenizers need, imports torch where it finds one; here it finds none."""
    code = (
        "import sys\n"
        "import kappaquant.engines.mlx as mlx\n"
        "assert not {'torch', 'transformers', 'mlx'} & set(sys.modules)\n"
        "sys.modules['torch'] = None\n"
        "from mlx_lm import generate\n"
        "for folder in sys.argv[1:]:\n"
        "    model, tokenizer = mlx.load(folder)\n"
        "    assert generate(model, tokenizer, 'how', max_tokens=3)\n"
        "import kappaquant.engines.mlx.server\n"
        "assert sys.modules['torch'] is None and not [m for m in sys.modules if m.startswith('torch.')]\n"
    )
    folders = [str(quantized[kind]) for kind in ("v1", "legacy", "trellis")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
