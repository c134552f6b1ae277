"""One pass through a source's layers: inputs seen, weights rounded for them, and what the rounded layer makes handed to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kappaquant.checkpoints.writer import Writer
from kappaquant.errors import UnsupportedError
from kappaquant.files.safetensors import Stored, write_at
from kappaquant.files.tensors import read_elements, tensor_bytes
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.planning.moments import Moments
from kappaquant.quantizing.calibration.layers import Layers
from kappaquant.quantizing.calibration.moments import ROUTED, Routed, Sum, watched
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.quantizing.rounding import feedback
from kappaquant.quantizing.slices import Slice, Sums
from kappaquant.sources.source import Source

logger = logging.getLogger("kappaquant")


class Pass:
    """Layer after layer, written as ``writer`` has laid them out.

    Args:
        slices: the pieces of each tensor, by its name, and its shard.
        formats: of the tensors to be packed; others stay as the source has them.
    """

    def __init__(
        self, source: Source, calibration: Calibration, formats: Mapping[str, Format], writer: Writer[Sums],
        slices: Callable[[str], list[Slice]], device: str,
    ) -> None:  # fmt: skip
        self._layers = Layers(source, device, torch.float32 if device == "cpu" else torch.bfloat16)
        self._source, self._calibration, self._writer, self._slices = source, calibration, writer, slices
        self._formats = {name: fmt for name, fmt in formats.items() if isinstance(fmt, CodebookFormat)}
        self.fewest: int | None = None
        """Tokens of the routed expert that saw fewest; None where there are no such experts."""

    @torch.no_grad()
    def run(self) -> None:
        """Round what the layers' linear modules and routed experts hold; what is elsewhere is left for others."""
        states = self._layers.embed(self._calibration.windows)
        for number in range(len(self._layers)):
            self._layers.load(number)
            packed = self._packed(number)
            missing = [name for name in packed if self._left(name)]
            if missing:
                with watched({path: self._layers.model.get_submodule(path) for path in set(packed.values())}) as seen:
                    for _ in self._layers.forward(number, states):
                        pass
                for name in missing:
                    self._round(name, packed[name], *seen)
            for name in packed:
                self._layers.put(name, self._stored(name))
            states = list(self._layers.forward(number, states))
            self._layers.unload(number)
        if self.fewest is not None:
            logger.warning(
                "calibration: of the routed experts rounded in this run the one that saw fewest tokens saw %d",
                self.fewest,
            )

    def _packed(self, number: int) -> dict[str, str]:
        """Tensor -> path of its module, of a layer's tensors that are to be packed and whose inputs can be seen; gate_up first,
        for the inputs of down are made with its weights."""
        found = {}
        for name in self._layers.names(number):
            target = self._layers.places[name].target
            path, _, parameter = target.rpartition(".")
            module = self._layers.model.get_submodule(path)
            linear = isinstance(module, nn.Linear) and parameter == "weight"
            routed = parameter in ROUTED and callable(getattr(module, "act_fn", None))
            if name not in self._formats:
                continue
            if routed and (getattr(module, "is_transposed", False) or getattr(module, "has_bias", False)):
                raise UnsupportedError(
                    f"{name}: experts with transposed matrices or biases are not calibrated; quantize without --calibration"
                )
            if linear or routed:
                found[name] = path
        return found

    def _round(self, name: str, path: str, sums: Mapping[str, Sum], routed: Mapping[str, Routed]) -> None:
        fmt, info = self._formats[name], self._source.tensors[name]
        weight = self._source.read(name).view(info.shape).to(self._layers.device)
        if path in sums:
            inputs = feedback.prepare(feedback.rotated(sums[path].gram, fmt), fmt.group_size, name)
            self._write(name, weight, [feedback.encode(weight, fmt, inputs, name)])
            return
        at = self._layers.places[name]
        projection = at.target.rpartition(".")[2]
        experts = range(info.shape[0]) if at.expert is None else [at.expert]
        one, every = routed[path].sums(projection, len(self._layers.model.get_parameter(at.target)))
        made = []
        for expert in experts:
            found = one(expert)
            self.fewest = found.count if self.fewest is None else min(self.fewest, found.count)
            gram = feedback.rotated(found.towards(every), fmt)
            matrix = weight if at.expert is not None else weight[expert]
            made.append(feedback.encode(matrix, fmt, feedback.prepare(gram, fmt.group_size, name), name))
        self._write(name, weight, made)

    def _write(self, name: str, weight: Tensor, made: list[feedback.Rounded]) -> None:
        """Write the slices of a tensor from its matrices, one below the other."""
        parts = {suffix: torch.cat([each.parts[suffix] for each in made]) for suffix in made[0].parts}
        errors = torch.cat([each.squared_errors for each in made])
        energies = torch.cat([each.energies for each in made])
        shard = self._source.shard_of[name]
        make = partial(_write_slice, weight.reshape(-1), parts, errors, energies)
        self._writer.fill(shard, self._left(name), make, None)

    def _left(self, name: str) -> list[Slice]:
        """The pieces of a tensor that no run has written yet."""
        return [piece for piece in self._slices(name) if (name, piece.start) not in self._writer.found]

    def _stored(self, name: str) -> Tensor:
        """What was written of a tensor, decoded."""
        piece = self._slices(name)[0]
        fmt = self._formats[name]
        parts = {suffix: _read(piece.target_path, stored) for suffix, stored in piece.stored.items()}
        return fmt.decode(parts, piece.source.info.shape[-1])


def _write_slice(weight: Tensor, parts: Mapping[str, Tensor], errors: Tensor, energies: Tensor, piece: Slice) -> Sums:
    """As ``encode_slice`` does, of a weight whose rows are encoded already."""
    width = piece.source.info.shape[-1]
    rows = slice(piece.start // width, piece.stop // width)
    for suffix, part in parts.items():
        write_at(piece.target_path, piece.stored[suffix], rows.start * part.shape[1], tensor_bytes(part[rows]))
    moments = Moments.of(weight[piece.start : piece.stop])
    return Sums(moments, errors[rows].double().sum().item(), energies[rows].double().sum().item())


def _read(path: Path, stored: Stored) -> Tensor:
    return read_elements(path, stored, 0, stored.info.numel).view(stored.info.shape)
