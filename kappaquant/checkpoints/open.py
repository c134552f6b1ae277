"""The one way to a quantized checkpoint, whatever its container."""

from __future__ import annotations

from pathlib import Path

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.container import Container, Shapes, ShapesOf
from kappaquant.checkpoints.kappaquant_v1 import KappaquantV1
from kappaquant.checkpoints.side_files import MARKER_NAME
from kappaquant.checkpoints.tq3_native import Tq3Native
from kappaquant.errors import FormatError, PlanError
from kappaquant.files.documents import read_json

CONTAINERS: dict[str, Container] = {container.id: container for container in (KappaquantV1(), Tq3Native())}


def container_by_id(container_id: str) -> Container:
    """The container that a command or caller names. Raises PlanError for an unknown one."""
    if container_id not in CONTAINERS:
        raise PlanError(f"format {container_id!r}: must be one of {', '.join(CONTAINERS)}")
    return CONTAINERS[container_id]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to be a quantized checkpoint that this version reads."""
    return any(container.recognizes(folder) for container in CONTAINERS.values())


def open_checkpoint(
    path: str | Path, *, source: str | Path | None = None, shapes: Shapes | ShapesOf | None = None
) -> Checkpoint:
    """Open a quantized checkpoint folder of either container, reading headers only.

    Args:
        source: for tq3_native, whose files hold no shapes: the original model (folder or Hub id) to take them from.
            By default they follow from the architecture in config.json, and only this needs torch.
        shapes: the same, given directly; or a function that takes config.json's content (empty if there is none) and the
            names of quantized parameters, and returns their shapes. None for a shape leaves that parameter out.

    Raises:
        FormatError: malformed, incomplete, of an unknown version, or not quantized at all.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    # a marker of tq3_native counts more than a config.json, which may be any
    for container in reversed(CONTAINERS.values()):
        if container.recognizes(folder):
            return container.open(folder, source, shapes)
    config = read_json(folder / "config.json", FormatError)
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    state = f"quantized by {method}" if method else "not quantized"
    known = KappaquantV1.id
    raise FormatError(f"{folder}: {state}; expected quant_method {known!r} in config.json, or {MARKER_NAME}")
