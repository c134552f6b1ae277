"""Run by benchmarks.real_calibrated in the environment of scripts/calibrated_venv.sh: GPTQ or AutoRound on given tokens.

It imports nothing of the project. What is written: the linear layers' weights, dequantized, in float32; and in the header the bytes
that a checkpoint takes for each (codes and float16 scales, without a gap), seconds, and versions.

python benchmarks/real_gptq.py METHOD BITS GROUP MODEL TOKENS.json OUTPUT.safetensors
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from safetensors.torch import save_file


def gptq(model: Any, tokenizer: Any, windows: list[list[int]], bits: int, group: int) -> Any:
    """llm-compressor's GPTQ: symmetric, as its W4A16 preset, all else at its defaults."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    oneshot(
        model=model, processor=tokenizer, dataset=data, recipe=recipe, max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )  # fmt: skip
    return model


def autoround(model: Any, tokenizer: Any, windows: list[list[int]], bits: int, group: int) -> Any:
    """AutoRound with its default recipe, 200 steps a block: minutes on a GPU, hours on two cores."""
    from auto_round import AutoRound

    length = 512
    data = [torch.tensor([w[i : i + length]]) for w in windows for i in range(0, len(w), length)]
    rounder = AutoRound(
        model, tokenizer, bits=bits, group_size=group, sym=True, seqlen=length, nsamples=len(data), dataset=data,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    made, _ = rounder.quantize()
    return made


METHODS = {"gptq": gptq, "autoround": autoround}
PACKAGES = {"gptq": "llmcompressor", "autoround": "auto-round"}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    method, bits, group, folder, tokens, output = sys.argv[1:]
    start = time.perf_counter()
    with open(tokens, encoding="utf-8") as file:
        windows = json.load(file)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = METHODS[method](model, AutoTokenizer.from_pretrained(folder), windows, int(bits), int(group))
    seconds = time.perf_counter() - start
    made, nbytes = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            weight = module.weight.detach().float().cpu().contiguous()
            groups = weight.numel() // int(group)
            made[f"{path}.weight"] = weight
            nbytes[f"{path}.weight"] = -(-weight.numel() * int(bits) // 8) + 2 * groups
    versions = {name: version(name) for name in (PACKAGES[method], "torch", "transformers")}
    about = {"bytes": nbytes, "seconds": round(seconds, 1), "versions": versions}
    save_file(made, output, metadata={"about": json.dumps(about)})


if __name__ == "__main__":
    main()
