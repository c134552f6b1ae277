"""Where weights come from: a local folder or the Hub. Headers first, then slices; never a whole checkpoint in memory."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import AlreadyQuantizedError, KappaquantError, SourceError
from kappaquant.files.safetensors import Stored, read_header
from kappaquant.formats.codebook import PACKED_SUFFIX, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("kappaquant")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# How the tensors of other quantizers are recognized where config.json does not say: a pattern of names, and the method.
_FOREIGN_NAMES = (
    (re.compile(r"\.weight_scale_inv$"), "FP8 (block scales)"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(absmax|quant_map|quant_state\..*|SCB)$"), "bitsandbytes"),
    (re.compile(r"_(proj|w\d)_blocks$"), "MXFP4"),
    (re.compile(re.escape(PACKED_SUFFIX) + "$"), "TurboQuant or kappaquant"),
    (re.compile(r"\.weight_(packed|scale)$"), "compressed-tensors"),
)


@dataclass
class Source(ABC):
    """A checkpoint's headers and the way to its bytes.

    Attributes:
        label: how messages and the manifest call it.
        revision: the Hub commit it is pinned to, None for a local folder.
        config: content of config.json.
        shards: shard file name -> its tensors' headers.
        side_files: names of all other files that a copy of the model needs.
    """

    label: str
    revision: str | None
    config: dict[str, Any]
    shards: dict[str, dict[str, TensorInfo]]
    side_files: list[str]
    tensors: dict[str, TensorInfo] = field(init=False)
    shard_of: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        counts = Counter(name for shard in self.shards.values() for name in shard)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            holders = [shard for shard, tensors in self.shards.items() if twice[0] in tensors]
            raise SourceError(f"{self.label}: tensor {twice[0]} is in both {holders[0]} and {holders[1]}; remove one")
        check_config(self.config, self.label, SourceError)
        self.tensors = {name: info for shard in self.shards.values() for name, info in shard.items()}
        self.shard_of = {name: shard for shard, tensors in self.shards.items() for name in tensors}
        refuse_quantized(self.label, self.config, self.tensors)

    @abstractmethod
    def fetch(self, file_name: str) -> Path:
        """The local path of a file of the source, downloading it if need be."""

    @abstractmethod
    def release(self, shard: str) -> None:
        """Says that a shard is not needed any more; one that was fetched for this run is deleted."""

    def locate(self, shard: str) -> tuple[Path, dict[str, Stored]]:
        """Local path and checked offsets of one shard's tensors."""
        path = self.fetch(shard)
        stored = read_header(path)
        if {name: s.info for name, s in stored.items()} != self.shards[shard]:
            raise SourceError(f"{path}: its header changed since it was first read; start again")
        return path, stored

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in its own dtype."""
        from kappaquant.files.tensors import read_elements

        info = self.tensors[name]
        path, stored = self.locate(self.shard_of[name])
        return read_elements(path, stored[name], start, info.numel if stop is None else stop)


@dataclass
class LocalSource(Source):
    folder: Path

    def fetch(self, file_name: str) -> Path:
        return self.folder / file_name

    def release(self, shard: str) -> None:
        """Nothing to do: the folder is the user's."""


@dataclass
class HubSource(Source):
    """A pinned revision of a Hub repository, one shard on disk at a time."""

    scratch: tempfile.TemporaryDirectory[str]

    def fetch(self, file_name: str) -> Path:
        path = Path(self.scratch.name) / file_name
        return path if path.exists() else _download(self.label, file_name, self.revision, self.scratch.name)

    def release(self, shard: str) -> None:
        (Path(self.scratch.name) / shard).unlink(missing_ok=True)


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
        return _open_folder(folder, str(folder), None)
    if folder.exists():
        raise SourceError(f"{folder}: is a file; give the folder that holds config.json and the safetensors shards")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(location)):
        raise SourceError(f"{location}: no such folder, and not a Hub id of the form owner/name")
    return _open_hub(str(location), revision, stream)


def _open_folder(folder: Path, label: str, revision: str | None) -> LocalSource:
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files = [f for f in files if not any(part.startswith(".") for part in Path(f).parts)]
    config = read_json(folder / "config.json", SourceError)
    index = read_json(folder / INDEX_NAME, SourceError) if INDEX_NAME in files else None
    names = shard_names(label, files, index)
    headers = {name: {n: s.info for n, s in read_header(folder / name).items()} for name in names}
    check_index(label, headers, index)
    _warn_of_others(label, files, names)
    return LocalSource(label, revision, config, headers, _side_files(files), folder)


def _open_hub(repo: str, revision: str | None, stream: bool) -> Source:
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(repo):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        commit = str(info.sha)
        if not stream:
            ignored = [f"*{suffix}" for suffix in (*PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")]
            folder = Path(snapshot_download(repo, revision=commit, ignore_patterns=ignored))
            return _open_folder(folder, repo, commit)
        files = sorted(s.rfilename for s in info.siblings or [])
        for name in files:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise SourceError(f"{repo}: file name {name!r} leaves the folder")
        scratch = tempfile.TemporaryDirectory(prefix="kappaquant-")
        fetched = {f: _download(repo, f, commit, scratch.name) for f in ("config.json", INDEX_NAME) if f in files}
        config = read_json(Path(scratch.name) / "config.json", SourceError)
        index = read_json(fetched[INDEX_NAME], SourceError) if INDEX_NAME in fetched else None
        headers = {}
        names = shard_names(repo, files, index)
        _warn_of_others(repo, files, names)
        for name in names:
            entries = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit).tensors
            headers[name] = {n: TensorInfo(n, str(t.dtype), tuple(t.shape)) for n, t in entries.items()}
        check_index(repo, headers, index)
        visible = [f for f in files if not f.startswith(".")]
        return HubSource(repo, commit, config, headers, _side_files(visible), scratch)


class _hub_errors:  # noqa: N801 - a context manager, used like a function
    """Turns what huggingface_hub raises into a SourceError that names the repository."""

    def __init__(self, repo: str) -> None:
        self.repo = repo

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
            raise SourceError(f"{self.repo}: no such folder here, and from the Hub: {first}") from problem


def _download(repo: str, file_name: str, revision: str | None, folder: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo):
        return Path(hf_hub_download(repo, file_name, revision=revision, local_dir=folder))


def check_config(config: dict[str, Any], label: str, error: type[KappaquantError]) -> None:
    """Raise ``error`` unless the parts of a config.json that are read here have their JSON types."""
    for key, kind in (("text_config", dict), ("model_type", str), ("architectures", list)):
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise error(f"{label}/config.json: {key!r} is {value!r}; it must be a JSON {kind.__name__}")
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise error(f"{label}/config.json: 'architectures' {config['architectures']!r} are not all names")


def shard_names(
    label: str, files: list[str], index: dict[str, Any] | None, error: type[KappaquantError] = SourceError
) -> list[str]:
    """The shard files of a checkpoint, each a plain name that exists; else ``error``."""
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise error(f"{label}/{INDEX_NAME}: has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
                raise error(
                    f"{label}/{INDEX_NAME}: shard name {name!r} is not a plain *.safetensors name; it may not leave the folder"
                )
            if name not in files:
                stale = f"; {SINGLE_NAME} is there: if it is complete, delete the stale index" * (SINGLE_NAME in files)
                raise error(f"{label}/{name}: named by {INDEX_NAME} but missing; fetch it again{stale}")
        return names
    if SINGLE_NAME in files:
        return [SINGLE_NAME]
    names = [f for f in files if f.endswith(".safetensors") and "/" not in f]
    if len(names) == 1:
        return names
    if names:
        raise error(f"{label}: {len(names)} safetensors files but no {INDEX_NAME} to say how they belong together")
    pickles = [f for f in files if f.endswith(PICKLES)]
    if pickles:
        raise error(
            f"{label}: weights only as pickle ({pickles[0]}), which can run code and is never opened; "
            "convert them to safetensors"
        )
    raise error(f"{label}: no safetensors files")


def check_index(label: str, headers: dict[str, dict[str, TensorInfo]], index: dict[str, Any] | None) -> None:
    """The index and the headers must name the same tensors in the same shards."""
    if index is None:
        return
    weight_map = index["weight_map"]
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise SourceError(
                f"{label}/{INDEX_NAME}: stale: {name} is not in {shard}; fetch the index and shards again"
            )
    for shard, tensors in headers.items():
        for name in tensors:
            if name not in weight_map:
                raise SourceError(f"{label}/{INDEX_NAME}: stale: {shard} holds {name}, which the index does not list")


def refuse_quantized(label: str, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """Raise AlreadyQuantizedError, naming the method, if the weights are not plain floats any more."""
    for part in (config, config.get("text_config") or {}):
        quantization = part.get("quantization_config")
        if quantization:
            method = (
                quantization.get("quant_method", "an unnamed method")
                if isinstance(quantization, dict)
                else quantization
            )
            raise AlreadyQuantizedError(
                f"{label}: already quantized by {method} (config.json); start from the original bf16 checkpoint"
            )
    for name, info in tensors.items():
        foreign = next((method for pattern, method in _FOREIGN_NAMES if pattern.search(name)), None)
        if foreign is None and info.dtype.startswith("F8_"):
            foreign = f"FP8 ({info.dtype})"
        if foreign:
            raise AlreadyQuantizedError(
                f"{label}: already quantized by {foreign}: tensor {name}; start from the original bf16 checkpoint"
            )


def _warn_of_others(label: str, files: list[str], shards: list[str]) -> None:
    others = [f for f in files if f.endswith(".safetensors") and f not in shards]
    if others:
        logger.warning("%s: not part of the model by its index, and left behind: %s", label, ", ".join(others))


def _side_files(files: list[str]) -> list[str]:
    """Everything but weights: config, tokenizer, templates, licence. Pickles are neither opened nor carried along."""
    weights = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
    return [f for f in files if not f.endswith(weights) and f not in (INDEX_NAME, "config.json")]


def read_json(path: Path, error: type[KappaquantError]) -> dict[str, Any]:
    """A JSON object from a file, or ``error`` that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: missing; a checkpoint folder needs it") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not JSON ({problem})") from None
    if not isinstance(content, dict):
        raise error(f"{path}: a JSON {type(content).__name__} where an object belongs")
    return content
