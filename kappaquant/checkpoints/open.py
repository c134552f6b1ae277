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
from kappaquant.sources.location import local_folder, locate
from kappaquant.sources.open import open_source
from kappaquant.sources.source import Source

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
    """Open a quantized checkpoint of either container, reading headers only.

    Args:
        path: its folder, or a Hub id, ``owner/name`` or ``owner/name@revision``, which is fetched into the Hub's cache first.
        source: for tq3_native, whose files hold no shapes: the original model (folder or Hub id) to take them from.
            By default they follow from the architecture in config.json, and only this needs torch.
        shapes: the same, given directly; or a function that takes config.json's content (empty if there is none) and the
            names of quantized parameters, and returns their shapes. None for a shape leaves that parameter out.

    Raises:
        FormatError: malformed, incomplete, of an unknown version, or not quantized at all.
    """
    folder = local_folder(path, error=FormatError)
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


def open_weights(location: str | Path, revision: str | None = None, *, stream: bool = False) -> Source | Checkpoint:
    """A quantized checkpoint where there is one, else a source; a folder or a Hub id, whose config.json is fetched to tell.

    Args:
        revision, stream: of what the Hub has, as for ``open_source``; a checkpoint is never streamed.

    Raises:
        FormatError, SourceError: as ``open_checkpoint`` and ``open_source``.
    """
    place = locate(location, revision)
    if place.folder is not None:
        return open_checkpoint(place.folder) if is_checkpoint(place.folder) else open_source(place.folder)
    from kappaquant.sources.hub import snapshot

    assert place.repo is not None
    described = snapshot(place.repo, place.revision, only=("config.json", MARKER_NAME))
    if is_checkpoint(described):
        return open_checkpoint(f"{place.repo}@{described.name}")
    return open_source(place.repo, described.name, stream=stream)
