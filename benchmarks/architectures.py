"""What becomes of transformers' architectures: how much of each is packed, and whether the packed model computes the same.

The packed share is that of a plan of 4 bits for the size that the architecture's own configuration has by default, from headers alone:
bytes of the text model beside embeddings and head. Everything else is of a tiny random model, saved by transformers, quantized, loaded,
and compared with transformers' own model of what the checkpoint dequantizes to. A difference of logits above the bound, other text,
or a share of experts' architectures below the aim ends with exit code 1.

python -m benchmarks.architectures [MODEL_TYPE ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kappaquant
from benchmarks.environment import environment, save
from benchmarks.tiny_architectures import VOCABULARY, class_of, sized, tiny
from kappaquant.errors import KappaquantError
from kappaquant.exports.mlx.models import MODELS
from kappaquant.exports.plain import dequantize
from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.inventory import Inventory
from kappaquant.models.roles import Role
from kappaquant.models.skeleton import meta_model
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.runtime.declared_experts import DeclaredExperts
from kappaquant.runtime.experts import QuantExperts
from kappaquant.runtime.packed import PackedWeight, QuantLinear

NAMED = (
    "gpt_oss", "qwen3_vl_moe", "llama4_text", "gemma4_text", "lfm2", "deepseek_v4", "gpt_neox", "deepseek_v3",
)  # fmt: skip
WITH_EXPERTS = (
    "afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v32", "dots1", "dots3_note_text",
    "ernie4_5_moe",     "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "jamba", "jetmoe", "kimi_k25",
    "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl", "minimax_m3_vl_text", "mistral4", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "qwen4_exp_text", "solar_open", "unlimited_ocr", "zaya",
)  # fmt: skip
DENSE = (
    "bloom", "falcon", "falcon_h1", "gemma3n_text", "gpt2", "gpt_bigcode", "gptj", "mamba", "olmo2", "opt", "phi", "phi3", "stablelm",
)  # fmt: skip
AIM = 0.95
BOUND = 1e-5
_BESIDE = (Role.EMBEDDING, Role.LM_HEAD, Role.VISION, Role.TOWER, Role.MTP)
_BITS, _NEW_TOKENS, _WINDOW = 4, 8, 32


def measured(model_type: str, calibrate: bool = True) -> dict[str, Any]:
    """One row. Raises KappaquantError where the model cannot be quantized or loaded."""
    with tempfile.TemporaryDirectory() as folder:
        return {"model_type": model_type, **shares(model_type), **compared(model_type, Path(folder), calibrate)}


def shares(model_type: str) -> dict[str, float]:
    """The packed share of the architecture's default size, without and with an engine that the plan is for."""
    sized_config = sized(model_type)
    sized_config.architectures = [class_of(model_type).__name__]
    config = json.loads(sized_config.to_json_string(use_diff=False))
    model = meta_model(config)
    tied = model.all_tied_weights_keys
    tensors = {n: TensorInfo(n, "BF16", tuple(t.shape)) for n, t in model.state_dict().items() if n not in tied}
    return {
        "share": packed_share(tensors, config),
        "share_for_vllm": packed_share(tensors, config, target="vllm"),
    }


def packed_share(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], **options: Any) -> float:
    """Part of the bytes that a plan packs, of all but embeddings, head and towers."""
    plan = kappaquant.make_plan(tensors, config, "uniform", bits=_BITS, **options)
    kinds = Inventory(tensors, config).kinds
    sizes = {name: info.nbytes for name, info in tensors.items() if kinds[name].role not in _BESIDE}
    return sum(size for name, size in sizes.items() if plan.format_of(name)) / sum(sizes.values())


def compared(model_type: str, folder: Path, calibrate: bool = True) -> dict[str, Any]:
    """Save a tiny model, quantize it, load it, and compare it with its dequantized weights in plain transformers."""
    cls = class_of(model_type)
    torch.manual_seed(0)
    _random(cls(tiny(model_type)).float()).save_pretrained(folder / "source")
    source = kappaquant.open_source(folder / "source")
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=_BITS)
    options = kappaquant.Options(effort="fast", jobs=1)
    kappaquant.quantize(source, folder / "packed", plan, options)
    dequantize(kappaquant.open_checkpoint(folder / "packed"), folder / "plain", "F32")
    packed, _ = kappaquant.load(folder / "packed", dtype=torch.float32, activations="float32")
    plain = cls.from_pretrained(folder / "plain", dtype=torch.float32).eval()
    ids = torch.randint(2, VOCABULARY, (2, _WINDOW), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (packed(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max().item()
        same_text = torch.equal(_text(packed, ids), _text(plain, ids))
    row = {"logits": difference, "same_text": same_text, "runs_as": _runs_as(packed), "mlx": model_type in MODELS}
    if calibrate:
        row["calibrated"] = _calibration(source, plan, options, ids, folder / "calibrated")
    return row


def _random(model: Any) -> Any:
    """Weights large enough that logits tell errors apart, and small enough that float32 does not blur them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
        model.get_input_embeddings().weight.mul_(0.25)
    return model


def _text(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model.generate(
        ids[:1], max_new_tokens=_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return found


def _runs_as(model: Any) -> list[str]:
    """What the loaded model's packed weights are multiplied by."""
    kinds = {QuantLinear: "linear", QuantExperts: "experts", DeclaredExperts: "declared experts"}
    found = {name for module in model.modules() for cls, name in kinds.items() if isinstance(module, cls)}
    held = {
        module
        for path, module in model.named_modules()
        if path.endswith("_packed") and isinstance(module, PackedWeight)
    }
    return sorted(found) + (["decoded"] if held else [])


def _calibration(source: Any, plan: Any, options: Any, ids: Tensor, output: Path) -> str:
    """Empty where streaming calibration quantizes the model, else why it does not."""
    record = {"file": "random", "tokens": ids.numel(), "window": ids.shape[1], "tokens_sha256": "none"}
    try:
        kappaquant.quantize(source, output, plan, options, calibration=Calibration(ids, record))
    except KappaquantError as refusal:
        return str(refusal)
    except Exception as fault:  # of a layer that the pass does not know how to go through
        return f"fails: {type(fault).__name__}: {fault}"
    return ""


def meets(row: Mapping[str, Any]) -> bool:
    """Whether a row keeps the bounds; the share counts where an architecture was named, or has routed experts."""
    if row.get("problem") or not row["same_text"] or row["logits"] > BOUND:
        return False
    return row["share"] >= AIM or row["model_type"] in DENSE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="only these, printed and not saved")
    asked = parser.parse_args().model_types
    logging.disable(logging.WARNING)
    rows = []
    for model_type in asked or sorted({*NAMED, *WITH_EXPERTS, *DENSE}):
        try:
            rows.append(measured(model_type))
        except Exception as problem:  # the table says so
            rows.append({"model_type": model_type, "problem": f"{type(problem).__name__}: {problem}"})
        print(json.dumps(rows[-1]), flush=True)
    if not asked:
        save("architectures", {"environment": environment(), "aim": AIM, "bound": BOUND, "rows": rows})
    sys.exit(not all(map(meets, rows)))


if __name__ == "__main__":
    main()
