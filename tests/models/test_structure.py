"""What transformers' classes tell of tensors, for architectures that no table has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.tiny_architectures import class_of, tiny
from kappaquant.files.safetensors import TensorInfo
from kappaquant.models import roles
from kappaquant.models import structure as module
from kappaquant.models.forward_code import called_plainly, multiplied_from_right, read_past
from kappaquant.models.roles import Role, TensorKind, kind_of, kinds_of
from kappaquant.models.skeleton import meta_model


def headers(config: dict) -> dict[str, TensorInfo]:
    model = meta_model(config)
    tied = model.all_tied_weights_keys
    return {n: TensorInfo(n, "BF16", tuple(t.shape)) for n, t in model.state_dict().items() if n not in tied}


def content(model_type: str) -> dict:
    config = tiny(model_type)
    config.architectures = [class_of(model_type).__name__]
    return config.to_dict()


def kinds(model_type: str) -> dict[str, TensorKind]:
    config = content(model_type)
    return kinds_of(headers(config), config)


def decided(found: dict[str, TensorKind], part: str) -> set[bool]:
    """Whether policies decide the tensors whose names end so."""
    endings = [not kind.keep for name, kind in found.items() if name.endswith(part)]
    assert endings, part
    return set(endings)


@pytest.mark.parametrize(
    ("model_type", "packed", "kept"),
    [
        ("gpt_neox", ["query_key_value.weight", "dense.weight", "dense_h_to_4h.weight"], ["embed_in.weight", "attention.dense.bias"]),
        ("gpt2", ["c_attn.weight", "mlp.c_proj.weight"], ["wte.weight", "wpe.weight", "c_attn.bias"]),
        ("lfm2", ["feed_forward.w1.weight", "conv.in_proj.weight"], ["conv.conv.weight", "embed_tokens.weight"]),
        ("deepseek_v3", ["kv_a_proj_with_mqa.weight", "experts.down_proj"], ["mlp.gate.weight", "lm_head.weight"]),
        ("gpt_oss", ["experts.gate_up_proj", "experts.down_proj"], ["experts.gate_up_proj_bias", "router.weight", "sinks"]),
        ("llama4_text", ["experts.gate_up_proj", "shared_expert.up_proj.weight"], ["router.weight"]),
        ("jetmoe", ["mlp.input_linear.weight", "mlp.output_linear.weight"], ["router.layer.weight"]),
        ("mamba", ["in_proj.weight"], ["x_proj.weight", "dt_proj.weight", "out_proj.weight", "A_log", "conv1d.weight"]),
        ("nemotron_h", ["experts.up_proj", "experts.down_proj"], ["mixer.gate.weight", "dt_bias"]),
        ("recurrent_gemma", ["linear_x.weight"], ["input_gate_weight"]),
    ],
)  # fmt: skip
def test_linear_layers_and_experts_are_packed_and_nothing_else(
    model_type: str, packed: list[str], kept: list[str]
) -> None:
    found = kinds(model_type)
    assert all(decided(found, part) == {True} for part in packed)
    assert all(decided(found, part) == {False} for part in kept)


@pytest.mark.parametrize(
    ("model_type", "transposed"),
    [
        ("gpt2", {"c_attn.weight", "c_proj.weight", "c_fc.weight"}),
        ("gpt_oss", {"gate_up_proj", "down_proj"}),  # as transformers declares it
        ("llama4_text", {"gate_up_proj", "down_proj"}),  # by the axis that has the hidden size
        ("jetmoe", set()),
        ("deepseek_v3", set()),
    ],
)
def test_which_way_round_a_weight_lies(model_type: str, transposed: set[str]) -> None:
    found = {name for name, kind in kinds(model_type).items() if kind.transposed}
    assert bool(found) == bool(transposed)
    assert all(any(name.endswith(part) for part in transposed) for name in found)
    assert all(any(name.endswith(part) for name in found) for part in transposed)


def test_roles_of_experts_and_towers() -> None:
    found = kinds("gpt_oss")
    assert {kind.role for name, kind in found.items() if name.endswith("gate_up_proj")} == {Role.ROUTED_GATE_UP}
    assert {kind.role for name, kind in kinds("jetmoe").items() if "mlp.output_linear" in name} == {Role.ROUTED_DOWN}
    assert {
        kind.role for name, kind in kinds("nemotron_h").items() if name.endswith("up_proj") and "experts" in name
    } == {Role.ROUTED_UP}
    several = kinds("qwen3_vl_moe")
    assert {kind.role for name, kind in several.items() if ".visual." in name} == {Role.VISION}
    assert {kind.role for name, kind in kinds("mamba").items() if name.endswith("dt_proj.weight")} == {Role.RECURRENT}


def test_experts_one_by_one_have_roles_and_numbers() -> None:
    config = content("lfm2_moe")
    name = "model.layers.1.feed_forward.experts.3.w{}.weight"
    tensors = {
        name.format(n): TensorInfo(name.format(n), "BF16", (128, 256) if n != 2 else (256, 128)) for n in (1, 2, 3)
    }
    found = list(kinds_of(tensors, config).values())
    assert [(kind.role, kind.expert) for kind in found] == [
        (Role.ROUTED_GATE, 3), (Role.ROUTED_DOWN, 3), (Role.ROUTED_UP, 3),
    ]  # fmt: skip


def test_what_the_code_of_a_model_changes_or_keeps_in_float32_is_refused() -> None:
    rwkv = kinds("rwkv")
    assert all(
        "changes this weight in place" in k.refuse for n, k in rwkv.items() if n.endswith("attention.output.weight")
    )
    deepseek = kinds("deepseek_v4")
    assert any("keeps this tensor in float32" in kind.refuse for kind in deepseek.values())


def test_only_structure_tells() -> None:
    """What names alone would have packed, engines that go by names can be expected to hold so."""
    found = kinds("deepseek_v3")
    assert not any(kind.by_structure for name, kind in found.items() if name.endswith("o_proj.weight"))
    assert all(
        kind.by_structure for name, kind in found.items() if name.endswith(("with_mqa.weight", "experts.down_proj"))
    )


def test_a_configuration_that_transformers_does_not_build_falls_back_to_names(caplog: pytest.LogCaptureFixture) -> None:
    good = content("gpt_neox")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {name: TensorInfo(name, "BF16", (256, 256))}
    for config in ({**good, "hidden_size": None}, {**good, "model_type": "phi9"}, {**good, "num_attention_heads": "x"}):
        assert kinds_of(tensors, config) == {name: kind_of(name, tensors[name], config)}
        assert not kinds_of(tensors, config)[name].keep
    assert "tensors are judged by their names" in caplog.text


def test_a_model_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = content("phi3")
    tensors = headers(config)
    built = []
    monkeypatch.setattr(module, "meta_model", lambda content: built.append(1) or meta_model(content))
    module._model.cache_clear()
    roles._told.cache_clear()
    assert kinds_of(tensors, config) == kinds_of(tensors, dict(config))
    assert len(built) == 1


class _Odd(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.typed, self.read, self.odd = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), _Odd(2, 2)
        self.inner = nn.ModuleDict({"far": nn.Linear(2, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(x.to(self.typed.weight.dtype))
        return self.odd(x) @ self.read.weight.T + self.typed(x)

    def rescale(self, other: nn.Module) -> None:
        other.inner.far.weight.div_(2)


def test_whose_weight_is_read_past_its_layer() -> None:
    model = nn.ModuleList([_Mixer()])
    read, changed = read_past(model)
    plain = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and called_plainly(m, path, read)]
    assert plain == ["0.plain", "0.typed"]
    assert changed == {"inner.far"}


class _Products(nn.Module):
    def forward(self, x: torch.Tensor, e: int) -> torch.Tensor:
        y = nn.functional.linear(x, self.rows[e].to(x.dtype)) + torch.bmm(self.first, x)
        return (y @ self.columns[e]).tanh() @ self.turned.mT


def test_from_which_side_code_multiplies() -> None:
    found = {name: multiplied_from_right(_Products, name) for name in ("rows", "first", "columns", "turned", "absent")}
    assert found == {"rows": False, "first": False, "columns": True, "turned": None, "absent": None}
