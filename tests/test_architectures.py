"""Architectures that no table has, end to end: planned, quantized, loaded, equal to their dequantized weights in plain transformers.

``python -m benchmarks.architectures`` measures all of them; here are some of each kind, and one that nobody has seen before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import kappaquant
from benchmarks import architectures
from benchmarks.architectures import BOUND, DENSE, NAMED, WITH_EXPERTS, compared, meets, packed_share
from benchmarks.readme import result
from benchmarks.tiny_architectures import class_of, tiny
from kappaquant.errors import PlanError
from kappaquant.exports.plain import dequantize
from kappaquant.runtime.declared_experts import DeclaredExperts, declared
from kappaquant.runtime.packed import QuantLinear

QUICK = {
    "gpt2": ["linear"],  # Conv1D
    "gpt_oss": ["declared experts", "linear"],  # [E, in, out], biases, interleaved
    "llama4_text": ["linear", "decoded"],  # [E, in, out], undeclared
    "nemotron_h": ["declared experts", "linear"],  # no gate; a recurrence
    "inkling2_text": ["declared experts", "linear"],  # rows that take turns in the file
}


@pytest.mark.parametrize("model_type", QUICK)
def test_a_packed_model_computes_what_its_dequantized_weights_do(model_type: str, tmp_path: Path) -> None:
    found = compared(model_type, tmp_path, calibrate=False)
    assert found["logits"] <= BOUND
    assert found["same_text"]
    assert found["runs_as"] == QUICK[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*NAMED, *WITH_EXPERTS, *DENSE} - set(QUICK)))
def test_so_does_every_other(model_type: str, tmp_path: Path) -> None:
    found = architectures.measured(model_type, calibrate=False)
    assert meets(found), found


def test_only_what_transformers_describes_is_declared() -> None:
    with torch.device("meta"):
        described, not_described = (class_of(name)(tiny(name)) for name in ("gpt_oss", "llama4_text"))
    assert declared(described.model.layers[0].mlp.experts)
    assert not declared(not_described.model.layers[0].feed_forward.experts)
    assert not any(isinstance(module, DeclaredExperts) for module in described.modules())


def test_the_table_keeps_its_bounds() -> None:
    rows = {row["model_type"]: row for row in result("architectures")["rows"]}
    assert rows.keys() == {*NAMED, *WITH_EXPERTS, *DENSE}
    assert not [name for name, row in rows.items() if not meets(row)]


def test_hub_files_that_transformers_transposes(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's files hold experts [E, in, out], its class [E, out, in]; transformers writes the latter."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    class_of("qwen3_vl_moe")(tiny("qwen3_vl_moe")).save_pretrained(tmp_path / "source")
    shard = tmp_path / "source" / "model.safetensors"
    state = {n: t.mT.contiguous() if t.dim() == 3 and ".experts." in n else t for n, t in load_file(shard).items()}
    save_file(state, shard, {"format": "pt"})
    source = kappaquant.open_source(tmp_path / "source")
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4)
    down = "model.language_model.layers.0.mlp.experts.down_proj"
    assert plan.choices[down].format == "tq4g128t"
    kappaquant.quantize(source, tmp_path / "packed", plan, kappaquant.Options(effort="fast", jobs=1))
    checkpoint = kappaquant.open_checkpoint(tmp_path / "packed")
    dequantize(checkpoint, tmp_path / "plain", "F32")
    model, _ = kappaquant.load(tmp_path / "packed", dtype=torch.float32, activations="float32")
    plain = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() <= BOUND


def test_an_override_packs_what_other_code_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    class_of("mamba")(tiny("mamba")).save_pretrained(tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    plan = kappaquant.make_plan(
        source.tensors, source.config, "uniform", bits=4, overrides=[("*mixer.*_proj.weight", 4)]
    )
    kappaquant.quantize(source, tmp_path / "packed", plan, kappaquant.Options(effort="fast", jobs=1))
    dequantize(kappaquant.open_checkpoint(tmp_path / "packed"), tmp_path / "plain", "F32")
    model, _ = kappaquant.load(tmp_path / "packed", dtype=torch.float32, activations="float32")
    plain = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer.in_proj, QuantLinear)
    assert type(mixer.out_proj).__bases__ == (nn.Linear,)
    assert torch.equal(mixer.out_proj.weight, plain.backbone.layers[0].mixer.out_proj.weight)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() <= BOUND


def test_some_experts_kept_and_widths_mixed(tmp_path: Path) -> None:
    """What is kept beside packed matrices is turned round too; a bias stays where it is."""
    torch.manual_seed(0)
    model = class_of("gpt_oss")(tiny("gpt_oss"))
    torch.nn.init.normal_(model.model.layers[0].mlp.experts.down_proj_bias, std=0.3)
    model.save_pretrained(tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    overrides = [("*0.mlp.experts.gate_up_proj", 16), ("*1.mlp.experts.down_proj", 2), ("*.o_proj.weight", 16)]
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4, overrides=overrides)
    kappaquant.quantize(source, tmp_path / "packed", plan, kappaquant.Options(effort="fast", jobs=1))
    dequantize(kappaquant.open_checkpoint(tmp_path / "packed"), tmp_path / "plain", "F32")
    packed, _ = kappaquant.load(tmp_path / "packed", dtype=torch.float32, activations="float32")
    plain = type(packed).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert (packed(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() <= BOUND


def test_calibration_refuses_what_lies_the_other_way_round(tmp_path: Path) -> None:
    from kappaquant.quantizing.calibration.text import Calibration

    class_of("gpt2")(tiny("gpt2")).save_pretrained(tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4)
    with pytest.raises(PlanError, match=r"c_attn\.weight: is stored \[\.\.\., in, out\].*without calibration"):
        kappaquant.quantize(source, tmp_path / "out", plan, calibration=Calibration(torch.ones(1, 8).long(), {}))


def test_evidence_of_weights_serves_a_budget(tmp_path: Path) -> None:
    """The measured formats are the transposed ones, which the policy then asks for."""
    from kappaquant.quantizing.calibration.data_free import of_weights

    class_of("gpt2")(tiny("gpt2")).save_pretrained(tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    evidence = of_weights(source, jobs=1)
    size = sum(info.nbytes for info in source.tensors.values()) // 3
    plan = kappaquant.make_plan(source.tensors, source.config, "sensitivity", sensitivity=evidence, size=size)
    formats = {choice.format for name, choice in plan.choices.items() if name.endswith("c_attn.weight")}
    assert formats
    assert all(fmt.endswith("t") for fmt in formats)


def test_a_plan_for_vllm_keeps_what_only_the_class_told(tmp_path: Path) -> None:
    class_of("gpt2")(tiny("gpt2")).save_pretrained(tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4, target="vllm")
    assert {choice.format for choice in plan.choices.values()} == {"kept"}
    assert "recognized by transformers' class alone" in plan.choices["transformer.h.0.attn.c_attn.weight"].why


class NovelConfig(transformers.PretrainedConfig):
    model_type = "novel"

    def __init__(self, width: int = 256, slots: int = 3, vocab_size: int = 64, **other: object) -> None:
        self.width, self.slots, self.vocab_size, self.hidden_size, self.n_experts = (
            width,
            slots,
            vocab_size,
            width,
            slots,
        )
        self.num_hidden_layers = 1
        super().__init__(**other)


class NovelExperts(nn.Module):
    """Matrices [E, in, out] under names of its own, multiplied as nobody else does."""

    def __init__(self, config: NovelConfig) -> None:
        super().__init__()
        self.widen = nn.Parameter(torch.randn(config.slots, config.width, 128) / 16)
        self.narrow = nn.Parameter(torch.randn(config.slots, 128, config.width) / 12)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for slot in range(self.widen.shape[0]):
            mine = chosen == slot
            out[mine] = (x[mine] @ self.widen[slot]).tanh() @ self.narrow[slot]
        return out


class NovelModel(transformers.PreTrainedModel):
    config_class = NovelConfig

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.mix, self.way = nn.Linear(config.width, config.width), nn.Linear(config.width, config.slots)
        self.slots = NovelExperts(config)
        self.out = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.words(input_ids))
        return self.out(x + self.slots(x, self.way(x).argmax(-1)))


@pytest.fixture
def novel() -> Iterator[None]:
    """An architecture of next month, which transformers has and this package has never heard of."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.AutoConfig.register("novel", NovelConfig)
    transformers.AutoModelForCausalLM.register(NovelConfig, NovelModel)
    yield
    CONFIG_MAPPING._extra_content.pop("novel")
    transformers.AutoModelForCausalLM._model_mapping._extra_content.pop(NovelConfig)


def test_an_architecture_of_next_month(novel: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    NovelModel(NovelConfig(dtype="float32")).save_pretrained(tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    assert packed_share(source.tensors, source.config) > 0.95
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=4)
    assert plan.choices["slots.widen"].format == "tq4g128t"
    assert plan.choices["way.weight"].format == plan.choices["words.weight"].format == "kept"
    assert "no table has the architecture 'novel'" in plan.warnings[0]
    assert "of the bytes are packed" in plan.warnings[0]
    kappaquant.quantize(source, tmp_path / "packed", plan, kappaquant.Options(effort="fast", jobs=1))
    dequantize(kappaquant.open_checkpoint(tmp_path / "packed"), tmp_path / "plain", "F32")
    model, _ = kappaquant.load(tmp_path / "packed", dtype=torch.float32, activations="float32")
    plain = NovelModel.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        assert (model(ids) - plain(ids)).abs().max() <= BOUND
