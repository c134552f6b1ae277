"""The one way to a source, wherever it lies."""

from __future__ import annotations

from pathlib import Path

from kappaquant.sources.folder import open_folder
from kappaquant.sources.location import locate
from kappaquant.sources.source import Source


def open_source(location: str | Path, revision: str | None = None, *, stream: bool = False) -> Source:
    """Open a local folder, or a Hub id such as ``Qwen/Qwen3.6-35B-A3B`` or ``owner/name@revision``, reading headers only.

    A snapshot in the Hub's cache, given as a folder, goes by its Hub id and commit. With HF_HUB_OFFLINE=1 a Hub id means what is
    in the cache.

    Args:
        revision: branch, tag or commit on the Hub, the same as ``@revision``; it is resolved to a commit at once.
        stream: for a Hub id: fetch headers by range requests and shards one at a time into a temporary folder.
            Otherwise the whole snapshot goes to the Hub cache first.

    Raises:
        SourceError: nothing there, or not a well-formed safetensors checkpoint.
        AlreadyQuantizedError: the weights are already quantized by another method.
    """
    place = locate(location, revision)
    if place.folder is not None:
        return open_folder(place.folder, place.repo or str(place.folder), place.revision)
    from kappaquant.sources.hub import open_hub

    assert place.repo is not None
    return open_hub(place.repo, place.revision, stream)
