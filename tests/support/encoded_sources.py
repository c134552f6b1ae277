"""Tensors as other tools store them quantized, and what those stand for by the tools' own formulas, written out whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


@dataclass(frozen=True)
class Stored:
    """One tensor as files have it: what is stored, by the name of the tensor and a suffix, and the values it stands for."""

    parts: dict[str, Tensor]
    values: Tensor


def fp8(
    scale: Callable[[Tensor], Tensor], expand: Callable[[Tensor, Tensor], Tensor], suffix: str
) -> Callable[[Tensor], Stored]:
    """Weights in E4M3 by their scales; ``expand`` brings those to the shape of the weights."""

    def store(weight: Tensor) -> Stored:
        scales = scale(weight.float())
        full = expand(scales, weight)
        codes = (weight.float() / full).to(torch.float8_e4m3fn)
        return Stored({"": codes, suffix: scales}, codes.float() * full)

    return store


def block_scales(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    def scales(weight: Tensor) -> Tensor:
        down, across = math.ceil(weight.shape[-2] / rows), math.ceil(weight.shape[-1] / columns)
        found = torch.empty(*weight.shape[:-2], down, across)
        for i in range(down):
            for j in range(across):
                block = weight[..., i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                found[..., i, j] = block.abs().amax(dim=(-2, -1)) / 448
        return found

    return scales


def by_block(rows: int, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
    def expand(scales: Tensor, weight: Tensor) -> Tensor:
        full = scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        return full[..., : weight.shape[-2], : weight.shape[-1]]

    return expand


def fp8_blocks(rows: int = 128, columns: int = 128, suffix: str = "_scale_inv") -> Callable[[Tensor], Stored]:
    return fp8(block_scales(rows, columns), by_block(rows, columns), suffix)


fp8_channels = fp8(lambda w: (w.abs().amax(-1, keepdim=True) / 448).bfloat16(), lambda s, w: s.float(), "_scale")
fp8_tensor = fp8(lambda w: w.abs().amax() / 448, lambda s, w: s, "_scale")


def codes_of(scaled: Tensor) -> Tensor:
    """The nearest of E2M1's codes, packed: the first of two in the low bits."""
    codes = (scaled[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def values_of(packed: Tensor) -> Tensor:
    return E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def nvfp4(weight: Tensor) -> Stored:
    """As ModelOpt writes it."""
    grouped = weight.float().unflatten(-1, (-1, 16))
    over = grouped.abs().amax() / (6 * 448)
    scales = (grouped.abs().amax(-1) / (6 * over)).to(torch.float8_e4m3fn)
    full = (scales.float() * over).repeat_interleave(16, -1)
    packed = codes_of(weight.float() / full.clamp(min=1e-30))
    return Stored({"": packed, "_scale": scales, "_scale_2": over}, values_of(packed) * full)


def nvfp4_compressed(weight: Tensor) -> Stored:
    """As compressed-tensors writes it: with the inverse of the tensor's scale."""
    grouped = weight.float().unflatten(-1, (-1, 16))
    over = (6 * 448) / grouped.abs().amax()
    scales = (grouped.abs().amax(-1) / 6 * over).to(torch.float8_e4m3fn)
    full = (scales.float() / over).repeat_interleave(16, -1)
    packed = codes_of(weight.float() / full.clamp(min=1e-30))
    return Stored({"_packed": packed, "_scale": scales, "_global_scale": over[None]}, values_of(packed) * full)


def exponents(weight: Tensor) -> Tensor:
    """Of groups of 32."""
    most = weight.float().unflatten(-1, (-1, 32)).abs().amax(-1).clamp(min=1e-30)
    return (most.log2().floor() - 2 + 127).clamp(0, 254).to(torch.uint8)


def mxfp4_compressed(weight: Tensor) -> Stored:
    scales = exponents(weight)
    full = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    packed = codes_of(weight.float() / full)
    return Stored({"_packed": packed, "_scale": scales}, values_of(packed) * full)


def mxfp4_experts(weight: Tensor) -> Stored:
    """As gpt-oss has it, for [E, in, out] as its model does."""
    found = mxfp4_compressed(weight.transpose(-1, -2).contiguous())
    codes, scales = found.parts["_packed"], found.parts["_scale"]
    parts = {"_blocks": codes.unflatten(-1, (-1, 16)), "_scales": scales}
    return Stored(parts, found.values.transpose(-1, -2).contiguous())


@dataclass(frozen=True)
class Kind:
    """A way to store weights, with the quantization_config that says so and what reports call it."""

    store: Callable[[Tensor], Stored]
    config: dict[str, Any]
    label: str


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


KINDS = {
    "fp8 blocks": Kind(fp8_blocks(), {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8, blocks of 128x128"),
    "fp8 channels": Kind(fp8_channels, {"quant_method": "fbgemm_fp8"}, "fp8, per channel"),
    "fp8 tensors": Kind(fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8, per tensor"),
    "compressed fp8 blocks": Kind(
        fp8_blocks(32, 64, "_scale"), _compressed("float-quantized", strategy="block", block_structure=[32, 64]),
        "fp8, blocks of 32x64",
    ),
    "compressed fp8 channels": Kind(fp8_channels, _compressed("float-quantized", strategy="channel"), "fp8, per channel"),
    "compressed fp8 tensors": Kind(fp8_tensor, _compressed("naive-quantized", strategy="tensor"), "fp8, per tensor"),
    "compressed nvfp4": Kind(nvfp4_compressed, _compressed("nvfp4-pack-quantized", group_size=16), "nvfp4"),
    "compressed mxfp4": Kind(mxfp4_compressed, _compressed("mxfp4-pack-quantized", group_size=32), "mxfp4"),
    "nvfp4": Kind(nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
}  # fmt: skip
MXFP4_EXPERTS = Kind(mxfp4_experts, {"quant_method": "mxfp4"}, "mxfp4")


def encoded(
    tensors: dict[str, Tensor], kind: Kind, chosen: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors with the chosen ones stored so, and those tensors as bf16 with the values that are stored."""
    stored, plain = dict(tensors), dict(tensors)
    for name in filter(chosen, tensors):
        found = kind.store(stored.pop(name))
        stored |= {name + suffix: part.contiguous() for suffix, part in found.parts.items()}
        plain[name] = found.values.bfloat16()
    return stored, plain


def encode_folder(folder: Path, kind: Kind, chosen: Callable[[str], bool]) -> Path:
    """Store the chosen weights of a model in one file so; the folder that holds the bf16 model of the same values."""
    path, plain_folder = folder / "model.safetensors", folder.with_name(folder.name + "-bf16")
    shutil.copytree(folder, plain_folder)
    stored, plain = encoded(load_file(path), kind, chosen)
    save_file(stored, path, {"format": "pt"})
    save_file({name: t.contiguous() for name, t in plain.items()}, plain_folder / path.name, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": kind.config}))
    return plain_folder
