"""The files beside the weights: which describe this very checkpoint, and which every copy of the model takes along."""

from __future__ import annotations

from pathlib import Path

from kappaquant.sources.source import INDEX_NAME

MANIFEST_NAME = "kappaquant.json"
MARKER_NAME = "tq_config.json"  # of tq3_native
EVALUATION_NAME = "evaluation.json"
CARD_MARK = "<!-- kappaquant card:"  # begins the last line of a model card that was made here
OWN_NAMES = (MANIFEST_NAME, MARKER_NAME, EVALUATION_NAME, INDEX_NAME, "config.json")


def side_files(folder: Path) -> list[str]:
    """What a copy of the model takes along, relative to the folder: tokenizer, licence, templates; no weights."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [str(p.relative_to(folder)) for p in files if p.suffix != ".safetensors" and not _is_own(p)]


def _is_own(path: Path) -> bool:
    """Whether a file describes the checkpoint it lies in, and so no other."""
    if path.name == "README.md":
        return CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
    return path.name in OWN_NAMES
