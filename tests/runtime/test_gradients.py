"""Gradients through packed weights are those through the dequantized ones, and adapters train beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import held
from tiny_checkpoints import quantize
from tiny_models import save_tiny
from torch import Tensor, nn
from torch.nn import functional as F

import kappaquant
from kappaquant.errors import UnsupportedError
from kappaquant.exports.plain import dequantize
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.runtime import gradients
from kappaquant.runtime.packed import QuantLinear, SharedInput

TRELLIS: dict[str, int | str] = {"*q_proj.weight": "t2g128", "*up_proj*": "t3g64", "*down_proj*": "t4g32"}
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def alike(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    assert found is not None
    assert expected is not None
    assert float((found.float() - expected.float()).norm()) <= tolerance * float(expected.float().norm())


@pytest.mark.parametrize("fmt", [CodebookFormat(4, 64), TrellisFormat(3, 64)], ids=lambda fmt: fmt.id)
@pytest.mark.parametrize("tile", [1 << 26, 4 * 90 * 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer(dtype: torch.dtype, tile: int, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias may be trained too; tiles of few rows add up."""
    monkeypatch.setattr(gradients, "_TILE_BYTES", tile)
    weight, decoded = held(torch.randn(20, 90), fmt)
    ours, plain = (nn.Parameter(torch.ones(20, dtype=dtype)) for _ in range(2))
    x = torch.randn(2, 3, 90, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    towards = torch.randn(2, 3, 20, dtype=dtype)
    layer = QuantLinear(weight, ours, SharedInput())
    (layer(x) * towards).sum().backward()
    (F.linear(other, decoded.to(dtype), plain) * towards).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    alike(x.grad, other.grad, tolerance)
    alike(ours.grad, plain.grad, tolerance)
    assert not layer(x.detach()).grad_fn.next_functions[0][0], "nothing is traced that nobody wants"
    layer.bias.requires_grad_(False)
    assert layer(x.detach()).grad_fn is None


@pytest.mark.parametrize("fmt", [CodebookFormat(3, 32), TrellisFormat(2, 32)], ids=lambda fmt: fmt.id)
def test_single_experts(fmt: Format) -> None:
    weight, decoded = held(torch.randn(4, 20, 64), fmt, "grouped")
    index = torch.tensor([[0, 3], [3, 3], [7, -1]])  # the last are no experts of this weight
    x = torch.randn(3, 64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    towards = torch.randn(3, 2, 20)
    (weight.grouped_linear(x, index) * towards).sum().backward()
    known = ((index >= 0) & (index < 4))[..., None]
    products = torch.einsum("ti,tkoi->tko", other, decoded[index.clamp(0, 3)]) * known
    (products * towards).sum().backward()
    alike(x.grad, other.grad)
    assert not x.grad[2].any()


def test_experts_of_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a whole block; on a CPU no kernel runs one, so that here the truth stands in for it."""
    gate_up, first = held(torch.randn(4, 64, 32), CodebookFormat(3, 32), "grouped")
    down, second = held(torch.randn(4, 32, 32), CodebookFormat(3, 32), "grouped")
    index = torch.tensor([[0, 3], [2, 0], [5, 1]])

    def truth(x: Tensor, weights: Tensor) -> Tensor:
        at = index.clamp(0, 3)
        gate, up = torch.einsum("ti,tkoi->tko", x, first[at]).chunk(2, -1)
        made = torch.einsum("tki,tkoi->tko", F.silu(gate) * up, second[at])
        return (made * (weights * (index < 4))[..., None]).sum(1)

    monkeypatch.setattr(gradients.dispatch, "experts", lambda x, index, weights, *_: truth(x, weights))
    x, weights = torch.randn(3, 32, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    others = [t.detach().clone().requires_grad_() for t in (x, weights)]
    towards = torch.randn(3, 32)
    (gradients.ExpertsProduct.apply(x, index, weights, gate_up, down, "bf16") * towards).sum().backward()
    (truth(*others) * towards).sum().backward()
    alike(x.grad, others[0].grad)
    alike(weights.grad, others[1].grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "qwen3_5_moe_text"])
def test_kernels_of_a_gpu(architecture: str, tmp_path: Path) -> None:
    check_model(architecture, tmp_path, "cuda", 3e-2)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_moe", "qwen3_5"])
def test_a_model_in_training_mode(architecture: str, tmp_path: Path) -> None:
    check_model(architecture, tmp_path, "cpu", 1e-4)


def test_a_model_of_trellis_codes_in_training_mode(tmp_path: Path) -> None:
    check_model("qwen3_moe", tmp_path, "cpu", 1e-4, TRELLIS)


def check_model(
    architecture: str, folder: Path, device: str, tolerance: float, formats: dict[str, int | str] | None = None
) -> None:
    """Gradients to the embedded tokens, and to a norm that is kept."""
    packed = quantize(save_tiny(architecture, folder / "source"), folder / "quantized", formats)
    plain = dequantize(kappaquant.open_checkpoint(packed), folder / "plain", "F32")
    found = []
    for where in (packed, plain):
        model: Any
        if where is packed:
            model, _ = kappaquant.load(where, dtype=torch.float32, device=device, activations="bf16")
        else:
            import transformers

            model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).to(device)
        model.train()
        ids = IDS.to(device)
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x, labels=ids).loss.backward()
        norm = next(p for name, p in model.named_parameters() if name.endswith("layers.0.input_layernorm.weight"))
        found.append((x.grad, norm.grad))
    for ours, theirs in zip(*found, strict=True):
        alike(ours, theirs, tolerance)


@pytest.mark.parametrize(("architecture", "formats"), [("llama", None), ("qwen3_moe", None), ("llama", TRELLIS)])
def test_adapters_of_peft(architecture: str, formats: dict[str, int | str] | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = quantize(save_tiny(architecture, tmp_path / "source"), tmp_path / "quantized", formats)
    before, _ = kappaquant.load(folder)
    model = peft.get_peft_model(before, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True))
    wrapped = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), QuantLinear)]
    assert wrapped
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    losses = []
    for _ in range(12):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        again = peft.PeftModel.from_pretrained(kappaquant.load(folder)[0], tmp_path / "adapter")
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)
    with pytest.raises(UnsupportedError, match="a packed weight cannot be changed: keep the adapter beside it"):
        again.merge_and_unload()


def test_a_model_without_adapters_is_not_trained_by_transformers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = kappaquant.load(quantize(save_tiny("llama", tmp_path / "source"), tmp_path / "quantized"))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none"))
