"""The one way to a source, wherever it lies."""

from __future__ import annotations

import re
from pathlib import Path

from kappaquant.errors import SourceError
from kappaquant.sources.folder import open_folder
from kappaquant.sources.source import Source


def open_source(location: str | Path, revision: str | None = None, *, stream: bool = False) -> Source:
    """Open a local folder, or a Hub id such as ``Qwen/Qwen3.6-35B-A3B``, reading headers only.

    Args:
        revision: branch, tag or commit on the Hub; it is resolved to a commit at once.
        stream: for a Hub id: fetch headers by range requests and shards one at a time into a temporary folder.
            Otherwise the whole snapshot goes to the Hub cache first.

    Raises:
        SourceError: nothing there, or not a well-formed safetensors checkpoint.
        AlreadyQuantizedError: the weights are already quantized by another method.
    """
    folder = Path(location)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"{folder}: --revision {revision} applies to a Hub id, not to a local folder")
        return open_folder(folder, str(folder), None)
    if folder.exists():
        raise SourceError(f"{folder}: is a file; give the folder that holds config.json and the safetensors shards")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(location)):
        raise SourceError(f"{location}: no such folder, and not a Hub id of the form owner/name")
    from kappaquant.sources.hub import open_hub

    return open_hub(str(location), revision, stream)
