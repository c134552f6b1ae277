"""A repository of the Hugging Face Hub as a source: pinned to a commit, fetched whole or shard by shard."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kappaquant.errors import KappaquantError, SourceError
from kappaquant.files.documents import read_json
from kappaquant.files.safetensors import TensorInfo
from kappaquant.sources.encodings.scheme import MODELOPT_NAME, with_modelopt
from kappaquant.sources.folder import open_folder
from kappaquant.sources.source import (
    INDEX_NAME,
    PICKLES,
    Source,
    check_index,
    refuse_adapter,
    shard_names,
    side_files,
    warn_of_others,
)

_DOCUMENTS = ("config.json", INDEX_NAME, MODELOPT_NAME)


@dataclass
class HubSource(Source):
    """A pinned revision of a Hub repository, one shard on disk at a time."""

    scratch: tempfile.TemporaryDirectory[str]
    _released: set[str] = field(init=False, repr=False, default_factory=set)

    def fetch(self, file_name: str) -> Path:
        path = Path(self.scratch.name) / file_name
        if path.exists():
            return path
        self._released.discard(file_name)
        return _download(self.label, file_name, self.revision, self.scratch.name)

    def release(self, shard: str) -> None:
        """Delete the shard, and those that were fetched for scales of it, as soon as no other needs their bytes."""
        self._released.add(shard)
        for file_name in self.headers:
            if self.needed_by(file_name) <= self._released:
                (Path(self.scratch.name) / file_name).unlink(missing_ok=True)


def open_hub(repo: str, revision: str | None, stream: bool) -> Source:
    from huggingface_hub import HfApi, is_offline_mode

    if not stream or is_offline_mode():
        folder = snapshot(repo, revision)
        return open_folder(folder, repo, folder.name)
    with _hub_errors(repo):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        commit = str(info.sha)
        files = sorted(s.rfilename for s in info.siblings or [])
        refuse_adapter(repo, files)
        for name in files:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise SourceError(f"{repo}: file name {name!r} leaves the folder")
        scratch = tempfile.TemporaryDirectory(prefix="kappaquant-")
        fetched = {f: _download(repo, f, commit, scratch.name) for f in _DOCUMENTS if f in files}
        config = read_json(Path(scratch.name) / "config.json", SourceError)
        if MODELOPT_NAME in fetched:
            config = with_modelopt(config, read_json(fetched[MODELOPT_NAME], SourceError))
        index = read_json(fetched[INDEX_NAME], SourceError) if INDEX_NAME in fetched else None
        headers = {}
        names = shard_names(repo, files, index)
        warn_of_others(repo, files, names)
        for name in names:
            entries = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit).tensors
            headers[name] = {n: TensorInfo(n, str(t.dtype), tuple(t.shape)) for n, t in entries.items()}
        check_index(repo, headers, index)
        visible = [f for f in files if not f.startswith(".")]
        return HubSource(repo, commit, config, headers, side_files(visible), None, scratch)


def snapshot(
    repo: str, revision: str | None, *, only: Sequence[str] | None = None, error: type[KappaquantError] = SourceError
) -> Path:
    """The folder of a commit in the Hub's cache, named after it, with all its files that are no pickles, fetched if need be.

    With HF_HUB_OFFLINE=1 it holds what was fetched before.

    Args:
        only: fetch no other files than these.

    Raises:
        KappaquantError: as ``error``: the Hub, or offline the cache, does not have it.
    """
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    ignored = [f"*{suffix}" for suffix in (*PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")]
    with _hub_errors(repo, error):
        commit = revision if is_offline_mode() else str(HfApi().model_info(repo, revision=revision).sha)
        patterns = None if only is None else list(only)
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns, ignore_patterns=ignored))


class _hub_errors:  # noqa: N801 - a context manager, used like a function
    """Turns what huggingface_hub raises into an error of ours that names the repository."""

    def __init__(self, repo: str, error: type[KappaquantError] = SourceError) -> None:
        self.repo, self.error = repo, error

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        # HTTPError is that of whichever HTTP client this huggingface_hub was built on
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            HTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            SafetensorsParsingError,
        )

        kinds = (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, SafetensorsParsingError)
        if isinstance(problem, (*kinds, HFValidationError, OfflineModeIsEnabled)):
            first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise self.error(f"{self.repo}: no such folder here, and from the Hub: {first}") from problem


def _download(repo: str, file_name: str, revision: str | None, folder: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo):
        return Path(hf_hub_download(repo, file_name, revision=revision, local_dir=folder))
