"""The weights an export starts from, alike for a plain source and for a quantized checkpoint, which is decoded row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import Entry


class Weights(Protocol):
    """Headers, and the way to the bytes: what ``Source`` and ``Checkpoint`` have in common.

    Attributes:
        label: how messages call them.
        name: what reports call the model.
        revision: Hub commit, None for a folder.
        folder: where they lie, None on the Hub.
        quantized: the container of a quantized checkpoint; the weights are then what it decodes to. None for a source.
        config: content of config.json.
        tensors: every parameter; shapes are logical.
        shard_of: the file each parameter needs.
        side_files: all other files that a copy of the model takes along.
    """

    @property
    def label(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def quantized(self) -> str | None: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def shard_of(self) -> Mapping[str, str]: ...
    @property
    def side_files(self) -> list[str]: ...

    def fetch(self, file_name: str) -> Path:
        """The local path of a file."""
        ...

    def read_entries(self, shard: str) -> dict[str, Entry]:
        """The parameters of one shard, which is fetched if need be."""
        ...

    def release(self, shard: str) -> None:
        """Says that a shard is not needed any more."""
        ...

    def identity(self) -> list[Any]:
        """What distinguishes these weights from others, as JSON values."""
        ...
