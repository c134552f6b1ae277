"""What stops a load in vLLM, and the name it gives: vLLM itself says nothing when a quantized model lacks a tensor."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm sets up an environment with it")

from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm_layers import ATTENTION, QKV, config_of, stored

import kappaquant
from benchmarks.tiny_architectures import class_of, tiny
from kappaquant.engines.vllm.config import KappaquantConfig
from kappaquant.errors import FormatError, UnsupportedError

Edit = Callable[[dict[str, torch.Tensor]], Any]


pytestmark = pytest.mark.usefixtures("one_process")


def edited(folder: Path, target: Path, edit: Edit) -> Path:
    """A copy of the checkpoint whose shard was changed."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    content = load_file(folder / "model.safetensors")
    edit(content)
    save_file(content, target / "model.safetensors", {"format": "pt"})
    return target


Q = f"{ATTENTION}q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c.pop(f"{Q}.tq_norms"), rf"{Q}\.tq_norms: missing from the shards"),
        (lambda c: c.pop("model.norm.weight"), r"model\.norm\.weight: missing from the shards"),
        (lambda c: c.update(extra=torch.zeros(2)), r"extra: in model\.safetensors but not in config\.json"),
        (
            lambda c: c.update({f"{Q}.tq_packed": c[f"{Q}.tq_packed"][1:].clone()}),
            rf"{Q}\.tq_packed: model\.safetensors holds U8 \[127, 48\], expected U8 \[128, 48\]",
        ),
        (
            lambda c: c.update({"model.norm.weight": c["model.norm.weight"].half()}),
            r"model\.norm\.weight: model\.safetensors holds F16 \[128\], expected F32",
        ),
    ],
)
def test_files_against_the_map_before_any_engine_starts(folder: Path, edit: Edit, named: str, tmp_path: Path) -> None:
    broken = edited(folder, tmp_path / "broken", edit)
    with pytest.raises(FormatError, match=named):
        EngineArgs(model=str(broken), skip_tokenizer_init=True, dtype="float32").create_engine_config()


def test_a_transposed_format_before_any_engine_starts(tmp_path: Path) -> None:
    """GPT-2's matrices lie [in, out]; a plan with --target vllm would have kept them."""
    class_of("gpt2")(tiny("gpt2")).save_pretrained(tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4)
    folder = kappaquant.quantize(source, tmp_path / "packed", plan, kappaquant.Options(effort="fast", jobs=1))
    config = KappaquantConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    with pytest.raises(UnsupportedError, match=r"c_attn\.weight: is packed as tq4g128t.*plan with --target vllm"):
        config.maybe_update_config(str(folder))


def test_a_parameter_that_map_and_files_both_lack(folder: Path, tmp_path: Path) -> None:
    """The checkpoint agrees with itself; only the architecture tells that a norm is missing."""
    name = "model.layers.1.input_layernorm.weight"
    broken = edited(folder, tmp_path / "broken", lambda content: content.pop(name))
    forget(broken, name)
    with pytest.raises(FormatError, match=f"{name}: Qwen3MoeForCausalLM needs it"):
        config_of(broken)


def forget(folder: Path, name: str) -> None:
    """Take a tensor out of config.json's map and the manifest."""
    from kappaquant.checkpoints.manifest import config_digest

    config, manifest = (json.loads((folder / file).read_text()) for file in ("config.json", "kappaquant.json"))
    del config["quantization_config"]["tensors"][name], manifest["tensors"][name]
    manifest["quantization_config_sha256"] = config_digest(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "kappaquant.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("key", "value"), [("format_version", 2), ("rotation", "none"), ("norms", "BF16")])
def test_an_unknown_version(folder: Path, key: str, value: Any) -> None:
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(FormatError, match=key):
        KappaquantConfig.from_config({**content, key: value})


def test_workers_get_the_configuration_by_pickle(config: KappaquantConfig) -> None:
    copy = pickle.loads(pickle.dumps(config))
    assert copy.names == config.names
    assert copy.checkpoint.keys() == config.checkpoint.keys()


def qkv(config: KappaquantConfig) -> Any:
    return vllm_linear.QKVParallelLinear(
        128, 32, 4, 2, bias=False, quant_config=config, prefix=f"{ATTENTION}qkv_proj", params_dtype=torch.float32
    )


def load(layer: Any, config: KappaquantConfig, shards: dict[Any, str], without: str = "") -> None:
    for shard, name in shards.items():
        for parameter, tensor in stored(config, name):
            if f"{name}{parameter.removeprefix('weight').replace('_', '.', 1)}" != without:
                placeholder = getattr(layer, parameter)
                placeholder.weight_loader(placeholder, tensor, *(() if shard is None else (shard,)))


SHARDS = {name[0]: f"{ATTENTION}{name}.weight" for name in QKV}


def test_shards_of_different_widths_and_kept_ones_make_one_layer(config: KappaquantConfig) -> None:
    layer = qkv(config)
    load(layer, config, SHARDS)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 128)
    weight = torch.cat([config.checkpoint.dequantize(name) for name in SHARDS.values()])
    torch.testing.assert_close(layer(x)[0], x @ weight.t())
    assert [type(part).__name__ for part in layer.parts] == ["PackedWeight", "KeptWeight", "PackedWeight"]
    assert not list(layer.parameters(recurse=False))
    layer.quant_method.process_weights_after_loading(layer)  # a second time changes nothing


@pytest.mark.parametrize("without", [f"{Q}.tq_norms", f"{Q}.tq_packed", f"{ATTENTION}k_proj.weight"])
def test_a_shard_that_never_came(config: KappaquantConfig, without: str) -> None:
    layer = qkv(config)
    load(layer, config, SHARDS, without=without)
    with pytest.raises(FormatError, match=f"{without}: vLLM's layer .*qkv_proj needs it, but was not given it"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_shard_that_comes_twice_or_in_the_wrong_form(config: KappaquantConfig) -> None:
    layer = qkv(config)
    load(layer, config, SHARDS)
    with pytest.raises(FormatError, match=rf"{Q}\.tq_packed: met while vLLM loads .*no place for it"):
        load(layer, config, {"q": Q})
    layer = qkv(config)
    with pytest.raises(FormatError, match=f"{Q}: met while vLLM loads .*no place for it"):
        layer.weight.weight_loader(layer.weight, torch.zeros(128, 128), "q")
    with pytest.raises(FormatError, match=rf"{Q}\.tq_norms: rows of 3 elements, vLLM's layer .* takes 4"):
        layer.weight_tq_norms.weight_loader(layer.weight_tq_norms, torch.zeros(128, 3), "q")


def test_a_layer_that_is_not_what_the_checkpoint_holds(config: KappaquantConfig) -> None:
    with pytest.raises(FormatError, match=rf"{Q}: has shape \[128, 128\] .* parts of \[256, 64, 64\] rows"):
        vllm_linear.QKVParallelLinear(128, 64, 4, 1, quant_config=config, prefix=f"{ATTENTION}qkv_proj")
    with pytest.raises(FormatError, match=rf"{ATTENTION}o_proj\.weight: has shape .* has 64 inputs"):
        vllm_linear.RowParallelLinear(64, 128, quant_config=config, prefix=f"{ATTENTION}o_proj")
    del config.names[f"{ATTENTION}v_proj.weight"]
    with pytest.raises(FormatError, match=rf"{ATTENTION}v_proj\.weight: vLLM's layer .*qkv_proj needs it"):
        qkv(config)


def on_two_cards(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_card_has_its_rows_or_columns(
    config: KappaquantConfig, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_two_cards(monkeypatch, rank)
    layer = qkv(config)
    load(layer, config, SHARDS)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 128)
    weights = [config.checkpoint.dequantize(name).chunk(2)[rank] for name in SHARDS.values()]
    torch.testing.assert_close(layer(x)[0], x @ torch.cat(weights).t())
    name = f"{ATTENTION}o_proj.weight"
    layer = vllm_linear.RowParallelLinear(
        128, 128, bias=False, quant_config=config, prefix=f"{ATTENTION}o_proj", params_dtype=torch.float32,
        reduce_results=False,
    )  # fmt: skip
    load(layer, config, {None: name})
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x)[0], x @ config.checkpoint.dequantize(name).chunk(2, dim=1)[rank].t())


def test_sizes_that_would_split_a_group_are_refused_with_those_that_work(
    config: KappaquantConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: 8)
    with pytest.raises(
        UnsupportedError, match=rf"{ATTENTION}o_proj\.weight: 128 inputs over 8 cards are 16 each.* can be 1, 2$"
    ):
        vllm_linear.RowParallelLinear(128, 128, quant_config=config, prefix=f"{ATTENTION}o_proj")


@pytest.mark.parametrize("fill", [True, False])
def test_a_padded_head(config: KappaquantConfig, fill: bool) -> None:
    head = ParallelLMHead(96, 128, quant_config=config, prefix="lm_head", params_dtype=torch.float32)
    if not fill:
        with pytest.raises(FormatError, match=r"lm_head\.weight\.tq_packed: vLLM's layer lm_head needs it"):
            head.quant_method.process_weights_after_loading(head)
        return
    load(head, config, {None: "lm_head.weight"})
    head.quant_method.process_weights_after_loading(head)
    x = torch.randn(2, 128)
    expected = torch.nn.functional.pad(x @ config.checkpoint.dequantize("lm_head.weight").t(), (0, 32))
    torch.testing.assert_close(head.quant_method.apply(head, x), expected)


def test_a_packed_tensor_that_no_layer_can_hold_is_named_before_loading(config: KappaquantConfig) -> None:
    qkv(config)
    with pytest.raises(UnsupportedError, match="vLLM's model holds this tensor in a layer that cannot be packed"):
        config.get_checkpoint_weight_mapper()


def test_names_are_read_as_vllm_wants_them(config: KappaquantConfig) -> None:
    config._claimed.update(config.checkpoint.keys())
    mapper = config.get_checkpoint_weight_mapper()
    assert mapper.map_name("model.x.weight.tq_packed") == "model.x.weight_tq_packed"
    assert mapper.map_name("experts.gate_up_proj.tq_norms") == "experts.gate_up_proj_tq_norms"
    assert mapper.map_name(mapper.map_name("model.x.weight.tq_packed")) == "model.x.weight_tq_packed"
    assert mapper.map_name("model.norm.weight") == "model.norm.weight"
