"""Speculative decoding with an MTP head, kept or packed: equal text, tokens accepted, and what stops the load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm sets up an environment with it")

import vllm_checkpoints as tiny
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm_drafts import DRAFT, generate
from vllm_gpu import options as gpu_options
from vllm_layers import config_of

import kappaquant
from kappaquant.engines.vllm.config import KappaquantConfig
from kappaquant.errors import FormatError, UnsupportedError
from reference.evaluate import MODEL
from reference.mtp import assemble, held_out_prompts

PACKED = [("mtp.*_proj*", 4), ("mtp.fc.weight", 4)]
SHARED = [("lm_head.weight", 6)]
FC = "mtp.fc.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference model with its MTP layer: in bf16, by apex2 with the layer kept, packed, and with lm_head packed too."""
    root = tmp_path_factory.mktemp("mtp")
    made = {"bf16": assemble(root / "bf16")}
    source = kappaquant.open_source(made["bf16"])
    for name, overrides in {"kept": [], "packed": PACKED, "shared": [*PACKED, *SHARED]}.items():
        plan = kappaquant.make_plan(source.tensors, source.config, "recipe", recipe="apex2", overrides=overrides)
        made[name] = kappaquant.quantize(source, root / name, plan)
    return made


def assert_drafts_change_no_text(folder: Path, where: Path, drafts: int = 1, **options: Any) -> None:
    """Arithmetic has one right next token. Prose has many as good, and which one wins is a matter of rounding."""
    from transformers import AutoTokenizer

    stories, prose = (ids[:8] for ids in held_out_prompts(AutoTokenizer.from_pretrained(MODEL)).values())
    options, speculation = {"model": str(folder), **options}, {**DRAFT, "num_speculative_tokens": drafts}
    plain, drafted = generate(where, [*stories, *prose], [options, {**options, "speculative_config": speculation}])
    print(f"{drafted.accepted} of {drafted.drafts} drafts accepted, mean accepted length {drafted.length:.3f}")
    assert drafted.answers[: len(stories)] == plain.answers[: len(stories)]
    assert plain.drafts == 0
    assert drafted.accepted > 0.7 * drafted.drafts > 0


# vLLM's CPU kernels cannot copy the states of GatedDeltaNet that prefix caching keeps for drafts
ON_CPUS = {"enforce_eager": True, "enable_prefix_caching": False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM takes the GPU")
@pytest.mark.parametrize("name", ["bf16", "kept", "packed", "shared"])
def test_drafts_change_no_text(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert_drafts_change_no_text(folders[name], tmp_path, **ON_CPUS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["bf16", "kept", "packed", "shared"])
def test_drafts_change_no_text_on_a_gpu(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert_drafts_change_no_text(folders[name], tmp_path, **gpu_options(folders[name]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM takes the GPU")
def test_the_class_of_the_published_models(folders: dict[str, Path], tmp_path: Path) -> None:
    """Multimodal, experts one by one: vLLM changes the names of such a model, but not those of its MTP head."""
    source = tiny.as_multimodal(folders["bf16"], tmp_path / "source")
    folder = tiny.quantize(source, tmp_path / "quantized", "apex2", (*PACKED, *SHARED))
    more = {"limit_mm_per_prompt": {"image": 0, "video": 0}, "skip_tokenizer_init": True}
    assert_drafts_change_no_text(folder, tmp_path, **ON_CPUS, **more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM takes the GPU")
@pytest.mark.parametrize(("cards", "drafts"), [(2, 1), (1, 2)])
def test_two_cards_and_two_drafts(cards: int, drafts: int, folders: dict[str, Path], tmp_path: Path) -> None:
    mixed = [("mtp.fc.weight", 5), ("mtp.*.experts.down_proj", 3), ("mtp.*.k_proj.weight", 16)]
    folder = tiny.quantize(folders["bf16"], tmp_path / "mixed", "apex2", (*PACKED, *SHARED, *mixed))
    assert_drafts_change_no_text(folder, tmp_path, drafts, **ON_CPUS, tensor_parallel_size=cards)


@pytest.fixture
def config(folders: dict[str, Path], one_process: None) -> KappaquantConfig:
    return config_of(folders["shared"])


def fc(config: KappaquantConfig) -> Any:
    return vllm_linear.ColumnParallelLinear(512, 256, bias=False, quant_config=config, prefix="mtp.fc")


def claimed(config: KappaquantConfig, head: bool) -> set[str]:
    """Names of the MTP head, or of everything else."""
    return {name for name in config.checkpoint.keys() if name.startswith("mtp.") is head}


def test_without_speculative_decoding_nobody_asks_for_the_head(config: KappaquantConfig) -> None:
    config._claimed.update(claimed(config, head=False))
    mapper = config.get_checkpoint_weight_mapper()
    assert mapper.map_name("lm_head.weight.tq_packed") == "lm_head.weight_tq_packed"


def test_a_packed_tensor_of_the_head_that_no_layer_takes(config: KappaquantConfig) -> None:
    fc(config)
    with pytest.raises(UnsupportedError, match=r"mtp\.layers\.0\.\S+: vLLM's model holds this tensor in a layer that"):
        config.get_checkpoint_weight_mapper()


def test_what_the_head_shares_is_not_read_twice(config: KappaquantConfig) -> None:
    layer = fc(config)
    assert [type(part).__name__ for part in layer.parts] == ["PackedWeight"]
    config._claimed.update(claimed(config, head=True))
    mapper = config.get_checkpoint_weight_mapper()
    assert mapper.map_name("lm_head.weight.tq_packed") is None
    assert mapper.map_name("model.embed_tokens.weight.tq_norms") is None
    assert mapper.map_name("model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert mapper.map_name("model.fc.weight.tq_packed") == "model.fc.weight_tq_packed"
    head = ParallelLMHead(1408, 256, quant_config=config, prefix="lm_head")
    assert not hasattr(head, "parts")


@pytest.mark.parametrize(
    "name", ["mtp.norm.weight", "mtp.layers.0.mlp.gate.weight", "mtp.layers.0.self_attn.k_proj.weight", FC]
)
def test_a_tensor_of_the_head_that_is_missing(config: KappaquantConfig, name: str) -> None:
    """vLLM says nothing of it: of a quantized model it counts no tensors."""
    config.checkpoint = kappaquant.open_checkpoint(config.checkpoint.path)
    del config.checkpoint.entries[name], config.names[name]
    with pytest.raises(FormatError, match=f"{name}: the MTP head, by which --speculative-config drafts, needs it"):
        fc(config)


def test_no_head_at_all(config: KappaquantConfig) -> None:
    config.checkpoint = kappaquant.open_checkpoint(config.checkpoint.path)
    for name in claimed(config, head=True):
        del config.checkpoint.entries[name], config.names[name]
    with pytest.raises(FormatError, match=r"has no MTP head, by which --speculative-config drafts tokens; quantize a"):
        fc(config)


def test_a_tensor_of_the_head_of_another_shape(config: KappaquantConfig) -> None:
    config.checkpoint = kappaquant.open_checkpoint(config.checkpoint.path)
    object.__setattr__(config.checkpoint.entries["mtp.norm.weight"].info, "shape", (128,))
    with pytest.raises(FormatError, match=r"mtp\.norm\.weight: has shape \[128\] .* wants \[256\]"):
        fc(config)


def test_a_layer_of_the_head_that_never_came(config: KappaquantConfig) -> None:
    layer = fc(config)
    with pytest.raises(FormatError, match=rf"{FC}\.tq_packed: vLLM's layer mtp\.fc needs it, but was not given it"):
        layer.quant_method.process_weights_after_loading(layer)
