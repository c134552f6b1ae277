"""What a finished checkpoint says of itself: quantization_config, the index, and the manifest ``kappaquant.json``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kappaquant.checkpoints.layout import ShardLayout
from kappaquant.formats.codebook import (
    FORMAT_VERSION,
    LEGACY_FORMAT,
    LEGACY_SEED,
    QUANT_METHOD,
    ROTATION,
    Format,
    TensorInfo,
)
from kappaquant.planning.plan import Plan
from kappaquant.version import __version__

if TYPE_CHECKING:
    from kappaquant.quantizing.slices import Sums


def quantization_config(tensors: Mapping[str, TensorInfo], plan: Plan) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: the complete map from parameter to format id or dtype."""
    formats = {name: plan.format_of(name) for name in tensors}
    used = sorted({fmt.id: fmt for fmt in formats.values() if fmt}.items())
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "rotation": ROTATION,
        "group_size": plan.group_size,
        "codebooks": {format_id: list(fmt.codebook) for format_id, fmt in used},
        "tensors": {name: _storage(info, formats[name]) for name, info in sorted(tensors.items())},
    }


def _storage(info: TensorInfo, fmt: Format | None) -> str:
    return fmt.id if fmt else info.dtype


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 over a quantization_config, whatever its spacing and order of keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def legacy_config(plan: Plan, tensors: Mapping[str, TensorInfo], original_model: str) -> dict[str, Any]:
    """``tq_config.json``. Published loaders take a tensor's bits from name patterns, so the wider ones are listed in full."""
    bits = {name: plan.bits(name) for name in tensors if plan.format_of(name)}
    config: dict[str, Any] = {
        "format": LEGACY_FORMAT,
        "bits": min(bits.values()),
        "group_size": plan.group_size,
        "quantizer_seed": LEGACY_SEED,
        "compressed_layers": len(bits),
        "original_model": original_model,
    }
    if len(set(bits.values())) > 1:
        config["sensitive_bits"] = max(bits.values())
        config["sensitive_patterns"] = sorted(name for name, b in bits.items() if b == max(bits.values()))
    return config


def index(layouts: Mapping[str, ShardLayout]) -> dict[str, Any]:
    """``model.safetensors.index.json`` over the output shards."""
    stored = {name: shard for shard, layout in layouts.items() for name in layout.stored}
    total = sum(s.info.nbytes for layout in layouts.values() for s in layout.stored.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(stored.items()))}


def manifest(
    source: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    plan: Plan,
    effort: str,
    sums: Mapping[str, Sums],
    hashes: Mapping[str, str],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """``kappaquant.json``: no times, paths or machine in it, so that the same input gives the same bytes."""
    from kappaquant.quantizing.slices import Sums

    return {
        "kappaquant_version": __version__,
        "format_version": FORMAT_VERSION,
        "source": dict(source),
        "effort": effort,
        "plan": json.loads(plan.to_json()),
        "quantization_config_sha256": config_digest(config),
        "tensors": {name: _tensor_entry(info, plan, sums.get(name, Sums())) for name, info in sorted(tensors.items())},
        "sha256": dict(sorted(hashes.items())),
    }


def _tensor_entry(info: TensorInfo, plan: Plan, sums: Sums) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(info.shape), "dtype": info.dtype, "bits": plan.bits(info.name)}
    if sums.moments.count and sums.moments.finite and math.isfinite(kappa := sums.moments.kurtosis):
        entry["kurtosis"] = _rounded(kappa)
    if plan.format_of(info.name):
        entry["relative_mse"] = _rounded(sums.squared_error / sums.energy if sums.energy else 0.0)
    return entry


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
