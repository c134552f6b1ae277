"""vLLM's engine on NVIDIA GPUs, in tests: its default settings, whatever memory the card has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import kappaquant
from benchmarks.random_model import in_trellis
from kappaquant.formats.codebook import BITS
from kappaquant.formats.trellis import TRELLIS_BITS
from reference.evaluate import MAX_NEW_TOKENS, MODEL
from reference.text import Problem, extract_answer

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Of an ``LLM``: vLLM's defaults, but for memory, which tests that run beside each other would misjudge."""
    memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 4 << 30}
    made = {"model": str(folder), "dtype": "bfloat16", "max_model_len": 512, **memory, **more}
    if find_spec("flashinfer") is None:  # its prefill of GatedDeltaNet is vLLM's default on Hopper
        made["additional_config"] = {"gdn_prefill_backend": "triton"}
    return made


def quantized(folder: Path, plan: str, group_size: int = 128) -> Path:
    """The reference model by apex2, by "uniform N", by "trellis": apex2 with trellis codes where there are such of as many bits, or by
    "random": any format for any matrix that apex2 quantizes."""
    opened = kappaquant.open_source(MODEL)
    make = partial(kappaquant.make_plan, opened.tensors, opened.config, group_size=group_size)
    bits = int(plan.removeprefix("uniform ")) if plan.startswith("uniform ") else None
    made = make("uniform", bits=bits) if bits else make("recipe", recipe="apex2")
    if plan == "trellis":
        made = replace(made, choices={name: in_trellis(choice) for name, choice in made.choices.items()})
    if plan == "random":
        draw = torch.Generator().manual_seed(0)
        widths: list[int | str] = [*BITS, *(f"t{bits}" for bits in TRELLIS_BITS), 16]
        overrides = [
            (name, widths[int(torch.randint(len(widths), (1,), generator=draw))])
            for name, choice in made.choices.items()
            if "apex2" in choice.why
        ]
        made = make("recipe", recipe="apex2", overrides=overrides)
    return kappaquant.quantize(opened, folder / plan.replace(" ", "_"), made, kappaquant.Options(effort="fast"))


def sampling(tokenizer: Any) -> dict[str, Any]:
    """How the stories are answered: greedily, up to the end of the text."""
    return {"max_tokens": MAX_NEW_TOKENS, "stop_token_ids": [tokenizer.eos_token_id]}


def right(asked: list[Problem], found: dict[str, Any], tokenizer: Any) -> float:
    """The share of the stories that vLLM answers with the right number."""
    answers = [
        tokenizer.decode(tokens[count:], skip_special_tokens=True)
        for tokens, count in zip(found["tokens"], found["prompt_tokens"], strict=True)
    ]
    return sum(extract_answer(text) == p.answer for text, p in zip(answers, asked, strict=True)) / len(asked)
