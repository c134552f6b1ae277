"""mlx_lm's model filled from a quantized checkpoint; every tensor and every parameter is accounted for."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.engines.mlx.architectures import Name, architecture_of
from kappaquant.engines.mlx.arrays import MLX_DTYPES, read_codes, read_kept
from kappaquant.engines.mlx.codes import decodes
from kappaquant.engines.mlx.layers import (
    KeptExperts,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedMatrix,
    PackedSwitchLinear,
)
from kappaquant.engines.mlx.skeleton import Skeleton, arrays_of
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.formats.entry import Entry

logger = logging.getLogger("kappaquant")

_NAMED_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True)
class Piece:
    """Part of a parameter that one checkpoint tensor fills: its rows [first, first + rows), all experts' or one's."""

    name: str
    expert: int | None
    first: int
    rows: int


class Loader:
    """Puts packed modules in place of those whose weights are packed, and fills the rest.

    Args:
        dtype: of activations and kept tensors; default what config.json names, else what most kept tensors have.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, dtype: mx.Dtype | None = None) -> None:
        self.checkpoint = checkpoint
        self.label = str(checkpoint.path)
        self.skeleton = skeleton
        self.model, self.shapes, self.what = skeleton.model, skeleton.shapes, skeleton.what
        self.entries = checkpoint.entries
        self.names = self._place()
        self.dtype = dtype or self._declared_dtype()

    def load(self) -> nn.Module:
        """The model, in evaluation mode, its arrays in memory.

        Raises:
            FormatError: a tensor is missing, of no use to the model, or has the wrong shape; it is named.
            UnsupportedError: a packed tensor has no packed module.
        """
        pieces = self._account()
        kept: dict[str, mx.array] = {}
        modules: list[tuple[str, nn.Module]] = []
        for target, parts in pieces.items():
            entry = self.entries[parts[0].name]
            if self.names[parts[0].name].of_experts:
                modules.append((target.rpartition(".")[0], self._switch(parts, self.shapes[target])))
            elif entry.fmt is None:
                kept[target] = self._kept(entry, target)
            else:
                modules.append(self._packed(target, entry))
        weights = self._sanitize(kept)
        for path, module in modules:
            held = {f"{path}.{name}": value for name, value in arrays_of(module).items()}
            weights = held | weights  # a packed layer's bias is the checkpoint's
        self.model.update_modules(tree_unflatten(modules))
        self.model.load_weights(list(weights.items()), strict=True)
        self.model.eval()
        mx.eval(self.model.parameters())
        return self.model

    # --- accounting ---

    def _place(self) -> dict[str, Name]:
        found = {name: self.skeleton.place(name) for name in self.checkpoint.keys()}
        if unused := self.skeleton.unused:
            logger.info("%s: %d tensors are not the language model's, such as %s", self.label, len(unused), min(unused))
        return {name: place for name, place in found.items() if place is not None}

    def _account(self) -> dict[str, list[Piece]]:
        """Parameter -> the tensors that fill it, once all of both are known to fit."""
        pieces: dict[str, list[Piece]] = defaultdict(list)
        unexpected = []
        for name, place in self.names.items():
            shape = self.skeleton.shape(place)
            if shape is None or not self._fits(place, pieces):
                unexpected.append(name)
                continue
            found = self.entries[name].info.shape
            if found != shape and not (self.entries[name].fmt is None and len(shape) == 3 and not place.of_experts):
                raise FormatError(
                    f"{name}: has shape {list(found)} in {self.label}, but {self.what} as config.json describes it "
                    f"wants {list(shape)}"
                )
            rows = shape[-2] // len(place.targets) if len(shape) > 1 else 0
            for i, target in enumerate(place.targets):
                pieces[target].append(Piece(name, place.expert, i * rows, rows))
        if unexpected:
            raise FormatError(
                f"{unexpected[0]}: in {self.label}, but {self.what} has no place for it{_more(unexpected)}; "
                "is config.json the one of this checkpoint?"
            )
        missing = [self._described(target, pieces) for target in self.shapes if not self._complete(target, pieces)]
        if missing:
            raise FormatError(f"{missing[0]}: {self.what} needs it, but {self.label} does not have it{_more(missing)}")
        return pieces

    def _fits(self, place: Name, pieces: Mapping[str, list[Piece]]) -> bool:
        """Whether nothing fills that place already, and its expert exists."""
        for target in place.targets:
            taken = {piece.expert for piece in pieces.get(target, ())}
            if place.expert in taken or None in taken or (place.expert is None and taken):
                return False
            if place.expert is not None and place.expert >= self.shapes[target][0]:
                return False
        return True

    def _complete(self, target: str, pieces: Mapping[str, list[Piece]]) -> bool:
        parts = pieces.get(target, [])
        whole = any(piece.expert is None for piece in parts)
        return whole or len(parts) == self.shapes[target][0]

    def _described(self, target: str, pieces: Mapping[str, list[Piece]]) -> str:
        parts = pieces.get(target)
        if not parts:
            return target
        absent = sorted(
            set(range(self.shapes[target][0])) - {piece.expert for piece in parts if piece.expert is not None}
        )
        return f"{target} of expert {absent[0]}"

    # --- filling ---

    def _declared_dtype(self) -> mx.Dtype:
        config = self.checkpoint.config
        for part in (config, config.get("text_config") or {}):
            named = part.get("dtype") or part.get("torch_dtype")
            if named in _NAMED_DTYPES:
                return _NAMED_DTYPES[named]
        floats = Counter(
            e.info.dtype for e in self.entries.values() if e.fmt is None and e.info.dtype in ("BF16", "F16", "F32")
        )
        return MLX_DTYPES[floats.most_common(1)[0][0]] if floats else mx.bfloat16

    def _kept(self, entry: Entry, target: str) -> mx.array:
        """In the model's dtype, as mlx_lm converts: one float32 tensor among them would turn all that follows float32."""
        value = read_kept(entry)
        stays = getattr(self.model, "cast_predicate", lambda path: True)
        return value.astype(self.dtype) if mx.issubdtype(value.dtype, mx.floating) and stays(target) else value

    def _sanitize(self, kept: dict[str, mx.array]) -> dict[str, mx.array]:
        """Kept tensors as mlx_lm's models want their values, such as norms with the 1 added; names are theirs already."""
        head = "language_model.lm_head.weight" if architecture_of(self.checkpoint.config).nested else "lm_head.weight"
        # shown none, though it be packed or tied, some models would tie it
        done = self.model.sanitize({head: mx.zeros(1), **kept})
        if head not in kept:
            done.pop(head, None)
        assert done.keys() == kept.keys(), done.keys() ^ kept.keys()
        for target, value in done.items():
            if tuple(value.shape) != self.shapes[target]:
                raise FormatError(
                    f"{target}: has shape {list(value.shape)} in {self.label}, but {self.what} as config.json describes "
                    f"it wants {list(self.shapes[target])}"
                )
        return done

    def _packed(self, target: str, entry: Entry) -> tuple[str, PackedMatrix]:
        path, _, parameter = target.rpartition(".")
        plain = dict(self.model.named_modules())[path]
        fmt = grouped_format(entry)
        packed, norms = read_codes(entry, fmt)
        arguments = fmt, entry.info.shape[-1], mx.array(packed), mx.array(norms)
        if parameter == "weight" and type(plain) is nn.Linear:
            linear = PackedLinear(*arguments)
            if "bias" in plain:
                linear.bias = plain.bias  # replaced by the checkpoint's, as any kept tensor
            return path, linear
        if parameter == "weight" and type(plain) is nn.Embedding:
            embedding = PackedEmbedding(*arguments)
            embedding.dtype = self.dtype
            return path, embedding
        raise UnsupportedError(
            f"{entry.info.name}: no packed form of {type(plain).__name__}.{parameter}; keep it at 16 bits"
        )

    def _switch(self, parts: Sequence[Piece], shape: tuple[int, ...]) -> nn.Module:
        """One projection of all experts; in 16 bits mlx_lm's own module, else blocks of one format each."""
        groups: dict[GroupedFormat | None, list[Piece]] = defaultdict(list)
        for piece in sorted(parts, key=lambda piece: piece.expert or 0):
            entry = self.entries[piece.name]
            groups[grouped_format(entry) if entry.fmt else None].append(piece)
        blocks = []
        for fmt, members in groups.items():
            experts = [p.expert for p in members if p.expert is not None] or list(range(shape[0]))
            block = self._kept_experts(members) if fmt is None else self._packed_experts(members, fmt, shape[-1])
            blocks.append((experts, block))
        # mlx's gather_mm takes nothing but float32 on a CPU
        gathers = self.dtype == mx.float32 or mx.default_device() == mx.gpu
        if gathers and len(blocks) == 1 and isinstance(blocks[0][1], KeptExperts):
            plain = SwitchLinear(1, 1, 1, bias=False)
            plain.weight = blocks[0][1].weight
            return plain
        return PackedSwitchLinear(blocks)

    def _kept_experts(self, members: Sequence[Piece]) -> KeptExperts:
        values = []
        for piece in members:
            rows = read_kept(self.entries[piece.name])[..., piece.first : piece.first + piece.rows, :]
            values.append(mx.contiguous(rows.astype(self.dtype)))
        return KeptExperts(values[0] if members[0].expert is None else mx.stack(values))

    def _packed_experts(self, members: Sequence[Piece], fmt: GroupedFormat, width: int) -> PackedExperts:
        packed, norms = [], []
        for piece in members:
            rows = slice(piece.first, piece.first + piece.rows)
            codes, scales = read_codes(self.entries[piece.name], fmt)
            packed.append(codes[..., rows, :])
            norms.append(scales[..., rows, :])
        join = np.stack if members[0].expert is not None else np.concatenate
        return PackedExperts(fmt, width, mx.array(join(packed)), mx.array(join(norms)))


def grouped_format(entry: Entry) -> GroupedFormat:
    """How a packed parameter is stored. Raises UnsupportedError for a format that nothing here decodes."""
    if not decodes(entry.fmt):
        raise UnsupportedError(
            f"{entry.info.name}: is stored as {entry.fmt}; MLX modules here take codebook and trellis formats; export it "
            "(kappaquant export --to mlx), or quantize it again"
        )
    return entry.fmt


def _more(names: Sequence[str]) -> str:
    return f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
