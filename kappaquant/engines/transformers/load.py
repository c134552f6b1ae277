"""transformers 5: ``AutoModel….from_pretrained`` reads kappaquant checkpoints, and ``load`` reads either format."""

from __future__ import annotations

import logging
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.kappaquant_v1 import QUANT_METHOD
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.errors import FormatError
from kappaquant.files.documents import read_json
from kappaquant.kernels.base import ACTIVATIONS, check_activations
from kappaquant.models.skeleton import load_config, model_class
from kappaquant.models.tokenizer import read_tokenizer
from kappaquant.runtime.assemble import set_activations
from kappaquant.runtime.fused.layers import fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("kappaquant")

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def register() -> None:
    """Make ``from_pretrained`` know quant_method "kappaquant"; more calls do nothing."""
    import_module("kappaquant.engines.transformers.hooks")


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    activations: str = ACTIVATIONS[0],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a quantized checkpoint, v1 or tq3_native, as a transformers model with packed weights.

    Args:
        path: its folder, or a Hub id, ``owner/name`` or ``owner/name@revision``.
        dtype: of the kept tensors and activations; default the one in config.json.
        device: default the CPU.
        activations: what kernels multiply by: "int8"; on NVIDIA GPUs also "bf16" (float16 with scales), on CPUs "float32", which is
            also what "bf16" is there; see docs/kernels.md and docs/cpu.md.

    Returns:
        The model in evaluation mode, of the class config.json names, and its tokenizer (None if the folder has none).

    Raises:
        FormatError: a tensor is missing, extra or misshapen, or the checkpoint is malformed.
        UnsupportedError: the architecture is unknown to transformers, or a packed tensor has no packed module.
    """
    check_activations(activations, device)
    register()
    checkpoint = open_checkpoint(path)
    for notice in checkpoint.notices:
        logger.warning("%s: %s", checkpoint.path, notice)
    if not checkpoint.config:
        raise FormatError(f"{checkpoint.path}: has no config.json; copy the original model's there to load it")
    config = load_config(checkpoint.path)
    cls = model_class(config)
    declared = config.dtype if isinstance(config.dtype, torch.dtype) else None
    wanted = dtype or declared or _common_dtype(checkpoint)
    tokenizer = _tokenizer(checkpoint.path)  # what is broken is met before weights are loaded
    _check_generation_config(checkpoint.path)
    if checkpoint.container.needs_conversion:
        model = _load_unlabelled(cls, config, checkpoint, wanted)
    else:
        model = cls.from_pretrained(checkpoint.path, config=config, dtype=wanted)
    set_activations(model, activations)
    model = model.to(device or "cpu")
    fuse(model)
    return model, tokenizer


def _load_unlabelled(cls: type[PreTrainedModel], config: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The same path, but config.json does not say that the folder is quantized, and its index may be stale."""
    from transformers import GenerationConfig

    config.quantization_config = {"quant_method": QUANT_METHOD, "folder": str(checkpoint.path)}
    kept = {name: checkpoint.tensor(name) for name in checkpoint.keys() if checkpoint.format_of(name) is None}
    model = cls.from_pretrained(None, config=config, state_dict=kept, dtype=dtype)
    if (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return model


def _common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What most kept tensors are, for a config.json that names no dtype."""
    kept = Counter(checkpoint.dtype(name) for name in checkpoint.keys() if checkpoint.format_of(name) is None)
    found = [_TORCH_DTYPES[name] for name, _ in kept.most_common() if name in _TORCH_DTYPES]
    return found[0] if found else torch.bfloat16


def _check_generation_config(folder: Path) -> None:
    """Raise FormatError for a file that transformers would pass over, or take for what it is not: text might then never end."""
    path = folder / "generation_config.json"
    if not path.exists():
        return
    ends = read_json(path, FormatError).get("eos_token_id")
    each = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if wrong := [end for end in each if type(end) is not int]:
        raise FormatError(f"{path}: eos_token_id is {wrong[0]!r}; must be a token's number, or a list of such")


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        logger.info("%s: no tokenizer files", folder)
        return None
    return read_tokenizer(folder)
