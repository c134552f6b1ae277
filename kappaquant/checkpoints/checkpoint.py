"""A quantized checkpoint, read parameter by parameter, alike for every container; nothing is ever guessed or skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.checkpoints.container import Container
from kappaquant.checkpoints.side_files import MANIFEST_NAME, side_files
from kappaquant.errors import FormatError
from kappaquant.files.documents import read_json
from kappaquant.files.safetensors import TensorInfo, read_header
from kappaquant.formats.base import Format
from kappaquant.formats.entry import Entry, Located
from kappaquant.sources.location import cached

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Checkpoint:
    """An open checkpoint; tensors are read when asked for.

    Attributes:
        path: its folder.
        container: how it lies there.
        config: content of config.json.
        entries: parameter -> what it is and where.
        notices: what was found odd but harmless, in words.
    """

    path: Path
    container: Container
    config: dict[str, Any]
    entries: dict[str, Entry]
    notices: list[str] = field(default_factory=list)

    def keys(self) -> list[str]:
        """Logical parameter names, sorted."""
        return sorted(self.entries)

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise FormatError(f"{self.path}: has no parameter {name!r}; keys() lists all {len(self.entries)}")
        return self.entries[name]

    def format_of(self, name: str) -> Format | None:
        """How a parameter is packed, None where it is kept."""
        return self.entry(name).fmt

    def bits(self, name: str) -> int:
        """Bits of a code; 16 for a parameter that is kept as it was."""
        return self.entry(name).bits

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).info.shape

    def dtype(self, name: str) -> str:
        """Safetensors dtype: of the stored tensor if kept, of the source (as far as known) if quantized."""
        return self.entry(name).info.dtype

    def nbytes(self, name: str) -> int:
        """Bytes a parameter takes on disk."""
        return self.entry(name).nbytes

    def parts(self, name: str) -> dict[str, Tensor]:
        """Suffix -> tensor of a quantized parameter, as its format describes them, whatever the container's packing."""
        entry = self.entry(name)
        read = entry.read_parts(0, entry.part_rows)
        assert entry.fmt is not None
        return {suffix: read[suffix].view(shape) for suffix, (_, shape) in entry.fmt.parts(entry.info.shape).items()}

    def tensor(self, name: str) -> Tensor:
        """A kept parameter as it is stored."""
        entry = self.entry(name)
        return entry.elements(0, entry.info.numel).view(entry.info.shape)

    def dequantize(self, name: str) -> Tensor:
        """The parameter as float32 in its logical shape; a kept one is converted."""
        return self.entry(name).read().float()

    # what makes it Weights, as a source is: see exports/weights.py

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The Hub id of a snapshot in the Hub's cache, else the folder's name."""
        found = cached(self.path)
        return found[0] if found else self.path.resolve().name

    @property
    def revision(self) -> str | None:
        """The commit of a snapshot in the Hub's cache; None for another folder."""
        found = cached(self.path)
        return found[1] if found else None

    @property
    def folder(self) -> Path | None:
        return self.path

    @property
    def quantized(self) -> str | None:
        return self.container.id

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Headers of all parameters; shapes are logical."""
        return {name: entry.info for name, entry in self.entries.items()}

    @property
    def shard_of(self) -> dict[str, str]:
        """Parameter -> the file that holds its first part."""
        return {name: next(iter(entry.parts.values()))[0].name for name, entry in self.entries.items()}

    @property
    def side_files(self) -> list[str]:
        return side_files(self.path)

    def fetch(self, file_name: str) -> Path:
        return self.path / file_name

    def read_entries(self, shard: str) -> dict[str, Entry]:
        return {name: self.entries[name] for name, holder in self.shard_of.items() if holder == shard}

    def release(self, shard: str) -> None:
        """Nothing to do: the folder is the user's."""

    def identity(self) -> list[Any]:
        stamps = {}
        for entry in self.entries.values():
            for path, _ in entry.parts.values():
                status = path.stat()
                stamps[path.name] = (status.st_size, status.st_mtime_ns)
        formats = {n: [e.fmt.id if e.fmt else e.info.dtype, e.info.shape] for n, e in self.entries.items()}
        return [str(self.path.resolve()), formats, stamps]

    def verify(self) -> Iterator[str]:
        """Compare every stored byte with the hashes a container carries, and look for scales that are no number; yields each problem.

        Names, shapes and completeness were checked when the checkpoint was opened.
        """
        from kappaquant.files.tensors import FLOATS, hash_stored, read_elements

        hashes = read_json(self.path / MANIFEST_NAME, FormatError)["sha256"] if self.container.hashed else {}
        for name in self.keys():
            entry = self.entries[name]
            for path, stored in entry.parts.values():
                expected = hashes.get(stored.info.name)
                if expected is not None and hash_stored(path, stored) != expected:
                    yield f"{stored.info.name}: its bytes in {path.name} do not have the SHA-256 of the manifest; fetch {path.name} again"
                scales = entry.fmt is not None and stored.info.dtype in FLOATS
                if scales and not bool(read_elements(path, stored, 0, stored.info.numel).isfinite().all()):
                    yield f"{stored.info.name}: holds a norm that is NaN or infinite"


def locate_tensors(folder: Path, shards: list[str]) -> dict[str, Located]:
    """Every tensor of the shards; a name in two of them is an error."""
    located: dict[str, Located] = {}
    for shard in shards:
        for name, stored in read_header(folder / shard, FormatError).items():
            if name in located:
                raise FormatError(f"{name}: in both {located[name][0].name} and {shard}")
            located[name] = (folder / shard, stored)
    return located
