"""What a container is: how a quantized checkpoint lies in a folder, whatever the formats of its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.checkpoints.layout import ShardLayout
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Format
from kappaquant.formats.kinds import KINDS
from kappaquant.planning.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from kappaquant.checkpoints.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]
ShapesOf = Callable[[dict[str, Any], list[str]], Mapping[str, tuple[int, ...] | None]]


@dataclass(frozen=True)
class Contents:
    """What a finished run knows of the checkpoint it wrote.

    Attributes:
        model, revision: what it was made from: Hub id or folder name, and the commit.
        config: content of the source's config.json.
        tensors: headers of the source's parameters.
        formats: parameter -> the format it is stored in, None where it is kept.
        plan: who decided so.
        effort: how codes were chosen.
        measured: parameter -> what was learnt of it, such as its kurtosis, as JSON values.
        hashes: stored tensor -> SHA-256.
        shards: file name -> layout.
        calibration: what text decided codes, as JSON values; None where none did.
        stored_as: how the source's weights were stored, such as "fp8, blocks of 128x128"; None where they were plain.
    """

    model: str
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    formats: Mapping[str, Format | None]
    plan: Plan
    effort: str
    measured: Mapping[str, Mapping[str, Any]]
    hashes: Mapping[str, str]
    shards: Mapping[str, ShardLayout]
    calibration: Mapping[str, Any] | None = None
    stored_as: str | None = None


class Container(ABC):
    """One kind of checkpoint folder.

    Attributes:
        id: what commands, messages and reports call it.
        kinds: of formats that it holds, letters of ``formats.kinds``.
        one_group_size: it says the group size once for all weights.
        hashed: it carries a hash of every stored tensor.
        needs_conversion: it is read and decoded, but serving engines take another container.
    """

    id: str
    kinds: tuple[str, ...] = tuple(KINDS)
    one_group_size: bool = False
    hashed: bool = True
    needs_conversion: bool = False

    @abstractmethod
    def recognizes(self, folder: Path) -> bool:
        """Whether a folder claims to be one of these; says nothing of its being whole."""

    @abstractmethod
    def check_plan(self, plan: Plan, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise PlanError, naming a tensor, unless this container can hold what the plan says."""

    def variant(self, fmt: Format) -> Format:
        """The format as this container stores it: its own codebook, say."""
        return fmt

    @abstractmethod
    def stored(self, info: TensorInfo, fmt: Format | None) -> dict[str, TensorInfo]:
        """Suffix -> the tensor that stands in a shard for one parameter; the suffix of a kept one is empty."""

    def output_bytes(
        self, shards: Mapping[str, Mapping[str, TensorInfo]], format_of: Callable[[str], Format | None]
    ) -> int:
        """Exact bytes of all output shards, headers included, from the source's headers and a plan alone."""
        return sum(
            ShardLayout.of(
                part for name, info in tensors.items() for part in self.stored(info, format_of(name)).values()
            ).size
            for tensors in shards.values()
        )

    def to_disk(self, fmt: Format, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """A format's parts of some rows as this container writes them."""
        return parts

    @abstractmethod
    def documents(self, contents: Contents) -> dict[str, dict[str, Any]]:
        """File name -> JSON content of everything beside shards and copied files, config.json included."""

    @abstractmethod
    def open(self, folder: Path, source: str | Path | None, shapes: Shapes | ShapesOf | None) -> Checkpoint:
        """See ``open_checkpoint``."""
