"""What a kappaquant checkpoint says of itself: ``quantization_config``, and the manifest ``kappaquant.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kappaquant.checkpoints.container import Contents
from kappaquant.errors import PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Format
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.version import __version__

QUANT_METHOD = "kappaquant"
FORMAT_VERSION = 1
ROTATION = "signs-wht-signs/1"


def quantization_config(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: the complete map from parameter to format id or dtype.

    Raises:
        PlanError: two variants of one format, which the map could not tell apart.
    """
    used: dict[str, Format] = {}
    for name, fmt in sorted(contents.formats.items()):
        if fmt and used.setdefault(fmt.id, fmt) != fmt:
            raise PlanError(
                f"{name}: is {fmt}, another tensor {used[fmt.id]}; a checkpoint holds one variant of a format"
            )
    config: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "rotation": ROTATION}
    groups = {group for fmt in used.values() if (group := getattr(fmt.rowwise, "group_size", None))}
    if len(groups) < 2:
        config["group_size"] = groups.pop() if groups else contents.plan.usual_group_size
    codebooks, others = {}, {}
    norms = set()
    for format_id, fmt in sorted(used.items()):
        settings = fmt.settings()
        if "codebook" in settings:
            codebooks[format_id] = settings["codebook"]
            norms.add(settings["norms"])
        elif settings:
            others[format_id] = settings
    if len(norms) > 1:
        raise PlanError(f"norms in {' and '.join(sorted(norms))}; one checkpoint has norms of one dtype")
    config["codebooks"] = codebooks
    config["tensors"] = {
        name: _storage(info, contents.formats[name]) for name, info in sorted(contents.tensors.items())
    }
    if others:
        config["formats"] = others
    if norms - {"F16"}:
        config["norms"] = norms.pop()
    return config


def settings_of(format_id: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``quantization_config`` says of one format beside its id."""
    if format_id in quantization["codebooks"]:
        return {"codebook": quantization["codebooks"][format_id], "norms": quantization.get("norms", "F16")}
    return dict(quantization.get("formats", {}).get(format_id, {}))


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 over a quantization_config, whatever its spacing and order of keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest(contents: Contents, config: Mapping[str, Any]) -> dict[str, Any]:
    """``kappaquant.json``: no times, paths or machine in it, so that the same input gives the same bytes."""
    return {
        "kappaquant_version": __version__,
        "format_version": FORMAT_VERSION,
        "source": {
            "model": contents.model,
            "revision": contents.revision,
            **({"stored_as": contents.stored_as} if contents.stored_as else {}),
        },
        "effort": contents.effort,
        **({"calibration": dict(contents.calibration)} if contents.calibration else {}),
        "plan": json.loads(contents.plan.record()),
        "quantization_config_sha256": config_digest(config),
        "tensors": {
            name: {
                "shape": list(info.shape),
                "dtype": info.dtype,
                "bits": fmt.bits if (fmt := contents.formats[name]) else KEPT_BITS,
                **contents.measured.get(name, {}),
            }
            for name, info in sorted(contents.tensors.items())
        },
        "sha256": dict(sorted(contents.hashes.items())),
    }


def _storage(info: TensorInfo, fmt: Format | None) -> str:
    return fmt.id if fmt else info.dtype
