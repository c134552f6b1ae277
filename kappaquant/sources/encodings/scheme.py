"""What config.json says of how the weights of a source are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kappaquant.errors import AlreadyQuantizedError, SourceError

MODELOPT_NAME = "hf_quant_config.json"
"""Where ModelOpt says what other tools say in config.json."""
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "modelopt", "modelopt_fp4")
"""Values of ``quant_method`` whose weights can be read; what a tensor is stored as is told by its name and dtype."""
_COMPRESSED = (
    "dense", "float-quantized", "naive-quantized", "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
"""Formats of compressed-tensors whose weights can be read."""
_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Scheme:
    """How the weights are stored, as far as names, dtypes and shapes do not tell.

    Attributes:
        method: ``quant_method``.
        blocks: rows and columns that share a scale, where scales are by blocks; all sizes that may occur.
    """

    method: str
    blocks: tuple[tuple[int, int], ...]


def with_modelopt(config: dict[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with that of hf_quant_config.json in it, where only the latter says how weights are stored."""
    if any(config.get(key) for key in _KEYS):
        return config
    said = document.get("quantization")
    return {**config, "quantization_config": {"quant_method": "modelopt", **(said if isinstance(said, dict) else {})}}


def without_scheme(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the model that the tensors are presented as."""
    config = {key: value for key, value in config.items() if key not in _KEYS}
    text = config.get("text_config")
    return {**config, "text_config": without_scheme(text)} if isinstance(text, dict) else config


def find_scheme(label: str, config: Mapping[str, Any]) -> Scheme | None:
    """What a config.json says of the weights; None where it says nothing.

    Raises:
        AlreadyQuantizedError: a method whose weights are not read.
        SourceError: it makes no sense.
    """
    parts = (config, config.get("text_config") or {})
    said = next((found for part in parts for key in _KEYS if (found := part.get(key))), None)
    if said is None:
        return None
    method = said.get("quant_method", "an unnamed method") if isinstance(said, dict) else said
    if not isinstance(said, dict) or method not in METHODS:
        raise AlreadyQuantizedError(
            f"{label}: already quantized by {method} (config.json); start from the original bf16 checkpoint, or one stored as "
            f"{', '.join(METHODS[:-1])}"
        )
    if method == "compressed-tensors":
        _check_compressed(label, said)
    return Scheme(str(method), tuple(_blocks(label, said)))


def _check_compressed(label: str, said: Mapping[str, Any]) -> None:
    groups = said.get("config_groups")
    formats = {group.get("format") for group in _groups(groups)} | {said.get("format")}
    for name in sorted(filter(None, formats)):
        if name not in _COMPRESSED:
            raise AlreadyQuantizedError(
                f"{label}: already quantized by compressed-tensors as {name} (config.json); of it {', '.join(_COMPRESSED)} are read: "
                "start from the original bf16 checkpoint"
            )
    for key in ("transform_config", "sparsity_config"):
        if (found := said.get(key)) and not (isinstance(found, dict) and found.get("format") == "dense"):
            raise AlreadyQuantizedError(
                f"{label}: already changed by compressed-tensors' {key} (config.json), which is not undone here; start from the "
                "original bf16 checkpoint"
            )


def _groups(groups: Any) -> list[Mapping[str, Any]]:
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _blocks(label: str, said: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The sizes of blocks that are named anywhere: [128, 128], or "128x128" as older files have it, or a number in a row."""
    named = [said["weight_block_size"]] if said.get("weight_block_size") is not None else []
    for group in _groups(said.get("config_groups")):
        weights = group.get("weights") or {}
        named += [found for key in ("block_structure", "group_size") if (found := weights.get(key)) is not None]
    found = []
    for size in named:
        sides = size.split("x") if isinstance(size, str) else [1, size] if isinstance(size, int) else size
        try:
            rows, columns = (int(side) for side in sides)
        except (TypeError, ValueError):
            rows = columns = 0
        if min(rows, columns) < 1:
            raise SourceError(
                f"{label}/config.json: blocks of {size!r} share a scale; two numbers of at least 1 belong there"
            )
        found.append((rows, columns))
    if said.get("quant_method") == "fp8" and "weight_block_size" not in said:
        found.append((128, 128))  # what transformers takes
    if str(said.get("quant_method")).startswith("modelopt"):
        found.append((128, 128))  # FP8_PB_WO, which names no size
    return list(dict.fromkeys(found))
