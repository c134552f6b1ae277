"""A local folder as a source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kappaquant.errors import SourceError
from kappaquant.files.documents import read_json
from kappaquant.files.safetensors import read_header
from kappaquant.sources.encodings.scheme import MODELOPT_NAME, with_modelopt
from kappaquant.sources.source import (
    INDEX_NAME,
    Source,
    check_index,
    refuse_adapter,
    shard_names,
    side_files,
    warn_of_others,
)


@dataclass
class LocalSource(Source):
    folder: Path

    def fetch(self, file_name: str) -> Path:
        return self.folder / file_name

    def release(self, shard: str) -> None:
        """Nothing to do: the folder is the user's."""


def open_folder(folder: Path, label: str, revision: str | None) -> LocalSource:
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files = [f for f in files if not any(part.startswith(".") for part in Path(f).parts)]
    refuse_adapter(label, files)
    config = read_json(folder / "config.json", SourceError)
    if MODELOPT_NAME in files:
        config = with_modelopt(config, read_json(folder / MODELOPT_NAME, SourceError))
    index = read_json(folder / INDEX_NAME, SourceError) if INDEX_NAME in files else None
    names = shard_names(label, files, index)
    headers = {name: {n: s.info for n, s in read_header(folder / name).items()} for name in names}
    check_index(label, headers, index)
    warn_of_others(label, files, names)
    return LocalSource(label, revision, config, headers, side_files(files), folder)
