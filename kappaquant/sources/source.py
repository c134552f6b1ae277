"""What a source of weights is, and what makes its files a checkpoint. Headers first, then slices; never a whole model in memory."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import AlreadyQuantizedError, KappaquantError, SourceError
from kappaquant.files.safetensors import Stored, TensorInfo, read_header
from kappaquant.formats.codebook import PACKED_SUFFIX
from kappaquant.formats.entry import Entry, Located
from kappaquant.sources.encodings.base import Encoded, EncodedEntry
from kappaquant.sources.encodings.recognize import recognize
from kappaquant.sources.encodings.scheme import MODELOPT_NAME, find_scheme, without_scheme

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("kappaquant")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# How tensors of other quantizers, which are not read, are recognized by their names: a pattern, and the method.
_FOREIGN_NAMES = (
    (re.compile(r"\.weight_scale_inv$"), "FP8 (block scales)"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(absmax|quant_map|quant_state\..*|SCB)$"), "bitsandbytes"),
    (re.compile(r"_(proj|w\d)_blocks$"), "MXFP4"),
    (re.compile(re.escape(PACKED_SUFFIX) + "$"), "TurboQuant or kappaquant"),
    (re.compile(r"\.(pre_quant_scale|svdquant_lora_[ab])$"), "ModelOpt (AWQ or SVD)"),
    (re.compile(r"\.weight_(packed|scale|zero_point|shape)$"), "compressed-tensors"),
)


@dataclass
class Source(ABC):
    """A checkpoint's headers and the way to its bytes.

    Tensors that are stored as codes and scales (``sources/encodings``) are presented as the bf16 tensors they stand for: ``config``,
    ``shards``, ``tensors`` and all that is read are those of the bf16 model.

    Attributes:
        label: how messages and the manifest call it.
        revision: the Hub commit it is pinned to, None for a local folder.
        config: content of config.json.
        headers: shard file name -> the headers of the tensors stored in it.
        side_files: names of all other files that a copy of the model needs.
        folder: where it lies; None for a Hub repository whose shards come one at a time.
        shards: shard file name -> the headers of the model's tensors whose codes, if they are encoded, are in it.
        tensors: all headers by name.
        shard_of: name -> shard.
        encoded: the tensors that are stored as others.
    """

    label: str
    revision: str | None
    config: dict[str, Any]
    headers: dict[str, dict[str, TensorInfo]]
    side_files: list[str]
    folder: Path | None
    shards: dict[str, dict[str, TensorInfo]] = field(init=False)
    tensors: dict[str, TensorInfo] = field(init=False)
    shard_of: dict[str, str] = field(init=False)
    encoded: dict[str, Encoded] = field(init=False, default_factory=dict)
    _holder: dict[str, str] = field(init=False, repr=False)
    """Stored tensor -> shard."""
    _located: dict[str, tuple[tuple[int, int], dict[str, Stored]]] = field(init=False, repr=False, default_factory=dict)
    """Of each shard its file's size and time, and the offsets that were in it then: a header of many tensors takes long to read."""

    def __post_init__(self) -> None:
        counts = Counter(name for shard in self.headers.values() for name in shard)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            holders = [shard for shard, tensors in self.headers.items() if twice[0] in tensors]
            raise SourceError(f"{self.label}: tensor {twice[0]} is in both {holders[0]} and {holders[1]}; remove one")
        check_config(self.config, self.label, SourceError)
        self._holder = {name: shard for shard, tensors in self.headers.items() for name in tensors}
        self.shards = self._presented()
        self.tensors = {name: info for shard in self.shards.values() for name, info in shard.items()}
        self.shard_of = {name: shard for shard, tensors in self.shards.items() for name in tensors}
        refuse_quantized(self.label, self.tensors)

    def _presented(self) -> dict[str, dict[str, TensorInfo]]:
        """The shards of the model that the stored tensors stand for; its config takes the place of the stored one's."""
        scheme = find_scheme(self.label, self.config)
        if scheme is None:
            return {shard: dict(tensors) for shard, tensors in self.headers.items()}
        stored = {name: info for tensors in self.headers.values() for name, info in tensors.items()}
        self.config = without_scheme(self.config)
        self.encoded, dropped = recognize(self.label, stored, scheme)
        shown: dict[str, TensorInfo | None] = {**stored, **dict.fromkeys(dropped)}
        for encoded in self.encoded.values():
            shown |= {**dict.fromkeys(encoded.parts.values()), encoded.codes: encoded.info}
        self._say(dropped)
        shards = {
            shard: {info.name: info for name in tensors if (info := shown[name])}
            for shard, tensors in self.headers.items()
        }
        return {shard: tensors for shard, tensors in shards.items() if tensors or not self.headers[shard]}

    def _say(self, dropped: frozenset[str]) -> None:
        """One line on what the weights are, and on what nothing is made of."""
        said = [f"weights stored as {self.stored_as} are read as the bf16 they stand for"] if self.stored_as else []
        if dropped:
            some = f"{len(dropped)} scales of activations or of cached keys and values (such as {min(dropped)})"
            said.append(f"{some} are left out: no weights depend on them")
        logger.warning("%s: %s", self.label, "; ".join(said))

    @abstractmethod
    def fetch(self, file_name: str) -> Path:
        """The local path of a file of the source, downloading it if need be."""

    @abstractmethod
    def release(self, shard: str) -> None:
        """Says that a shard is not needed any more; one that was fetched for this run is deleted."""

    @property
    def name(self) -> str:
        """What manifests and reports call the model: the Hub id, or the folder's name."""
        return self.label if self.revision else Path(self.label).resolve().name

    @property
    def quantized(self) -> str | None:
        """The container its weights are packed in; a source's are not."""
        return None

    @property
    def stored_as(self) -> str | None:
        """How encoded tensors are stored, such as "fp8, blocks of 128x128"; None where all are plain."""
        return "; ".join(sorted({encoded.encoding.label for encoded in self.encoded.values()})) or None

    @property
    def stored_bytes(self) -> int:
        """Of all tensors as they are stored."""
        return sum(info.nbytes for tensors in self.headers.values() for info in tensors.values())

    def identity(self) -> list[Any]:
        """What distinguishes these weights from others, as JSON values: headers, and of local shards size and time."""
        label, stamps = self.label, {}
        if self.revision is None:
            label = str(Path(label).resolve())
            for shard in self.headers:
                status = self.fetch(shard).stat()
                stamps[shard] = (status.st_size, status.st_mtime_ns)
        headers = {name: [i.dtype, i.shape] for tensors in self.headers.values() for name, i in tensors.items()}
        for encoded in self.encoded.values():
            headers[encoded.codes].append(repr(encoded.encoding))
        return [label, self.revision, headers, stamps]

    def read_entries(self, shard: str) -> dict[str, Entry]:
        """Where the parameters of one shard are; it is fetched if need be, and so are others that hold their scales."""
        return {name: self.entry(name) for name in self.shards[shard]}

    def entry(self, name: str) -> Entry:
        """Where one parameter is; the shards that hold it are fetched if need be."""
        encoded = self.encoded.get(name)
        if encoded is None:
            return Entry(self.tensors[name], None, {"": self._where(name)})
        parts = {role: self._where(part) for role, part in encoded.parts.items()}
        return EncodedEntry(encoded.info, None, parts, encoded.encoding)

    def _where(self, stored_name: str) -> Located:
        path, stored = self.locate(self._holder[stored_name])
        return path, stored[stored_name]

    def needed_by(self, shard: str) -> set[str]:
        """The shards whose parameters need this one's bytes."""
        return self._needed_by[shard]

    @cached_property
    def _needed_by(self) -> dict[str, set[str]]:
        found = {shard: {shard} & self.shards.keys() for shard in self.headers}
        for encoded in self.encoded.values():
            for part in encoded.parts.values():
                found[self._holder[part]].add(self._holder[encoded.codes])
        return found

    def locate(self, shard: str) -> tuple[Path, dict[str, Stored]]:
        """Local path and checked offsets of the tensors stored in one shard."""
        path = self.fetch(shard)
        try:
            status = path.stat()
        except OSError as problem:
            raise SourceError(f"{path}: cannot be read ({problem.strerror}); fetch the model again") from None
        stamp = status.st_size, status.st_mtime_ns
        before, stored = self._located.get(shard, (None, {}))
        if stamp != before:
            stored = read_header(path)
            if {name: s.info for name, s in stored.items()} != self.headers[shard]:
                raise SourceError(f"{path}: its header changed since it was first read; start again")
            self._located[shard] = stamp, stored
        return path, stored

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in its own dtype."""
        return self.entry(name).elements(start, self.tensors[name].numel if stop is None else stop)


def check_config(config: dict[str, Any], label: str, error: type[KappaquantError]) -> None:
    """Raise ``error`` unless the parts of a config.json that are read here have their JSON types."""
    for key, kind in (("text_config", dict), ("model_type", str), ("architectures", list)):
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise error(f"{label}/config.json: {key!r} is {value!r}; it must be a JSON {kind.__name__}")
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise error(f"{label}/config.json: 'architectures' {config['architectures']!r} are not all names")


def refuse_adapter(label: str, files: list[str]) -> None:
    """Raise SourceError for a folder or repository that holds an adapter (LoRA) and no model beside it."""
    if ADAPTER in files and not {SINGLE_NAME, INDEX_NAME} & set(files):
        raise SourceError(
            f"{label}: holds an adapter ({ADAPTER}), which is no model; merge it into its base first (peft: "
            "model.merge_and_unload().save_pretrained(FOLDER)) and give that folder"
        )


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


def refuse_quantized(label: str, tensors: dict[str, TensorInfo]) -> None:
    """Raise AlreadyQuantizedError, naming the method, if tensors that are presented are not plain floats."""
    for name, info in tensors.items():
        foreign = next((method for pattern, method in _FOREIGN_NAMES if pattern.search(name)), None)
        if foreign is None and info.dtype.startswith("F8_"):
            foreign = f"FP8 ({info.dtype})"
        if foreign:
            raise AlreadyQuantizedError(
                f"{label}: already quantized by {foreign}: tensor {name}; start from the original bf16 checkpoint, or one whose "
                "config.json says how it is stored, in a way that is read (docs/sources.md)"
            )


def warn_of_others(label: str, files: list[str], shards: list[str]) -> None:
    others = [f for f in files if f.endswith(".safetensors") and f not in shards]
    if others:
        logger.warning("%s: not part of the model by its index, and left behind: %s", label, ", ".join(others))


def side_files(files: list[str]) -> list[str]:
    """Everything but weights and what says how they are stored: config, tokenizer, templates, licence. Pickles are neither opened nor carried along."""
    weights = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
    return [f for f in files if not f.endswith(weights) and f not in (INDEX_NAME, MODELOPT_NAME, "config.json")]
