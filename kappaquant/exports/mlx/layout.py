"""From the parameters of a source to the tensors of an MLX folder: which goes where, folded how, at how many bits."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from kappaquant.errors import PlanError, SourceError, UnsupportedError
from kappaquant.exports.mlx.models import MlxModel, mlx_model, notes
from kappaquant.exports.weights import Weights
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.affine import BITS, GROUP_SIZES
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.models.roles import Role, name_patterns, role_of, tied_embeddings
from kappaquant.models.skeleton import Place, load_config, meta_model, place
from kappaquant.planning.plan import Plan

# "in": the last axis meets the residual stream, "out": the one before does; "one": a norm whose gain went into its readers
Action = Literal["copy", "in", "out", "one", "plus_one"]

_AFTER_INPUT_NORM = (
    Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_QKV, Role.GDN_QKV, Role.GDN_Z, Role.GDN_A, Role.GDN_B,
)  # fmt: skip
_AFTER_SECOND_NORM = (
    Role.ROUTER, Role.ROUTED_GATE_UP, Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_EXPERT_GATE, Role.MLP_GATE, Role.MLP_UP,
)  # fmt: skip
# what reads the residual stream, by the norm that stands before it
READS = {
    **dict.fromkeys(_AFTER_INPUT_NORM, "input_layernorm"),
    **dict.fromkeys(_AFTER_SECOND_NORM, "post_attention_layernorm"),
    Role.LM_HEAD: "norm",
}
WRITES = (Role.ATTENTION_O, Role.GDN_OUT, Role.ROUTED_DOWN, Role.SHARED_DOWN, Role.MLP_DOWN)
_UNFOLDED = (Role.GDN_CONV, Role.GDN_A_LOG, Role.GDN_DT_BIAS, Role.GDN_NORM)
_FOLDED_NORM = re.compile(r"layers\.\d+\.(?:input|post_attention)_layernorm\.weight|norm\.weight")
_WRITER_BIAS = re.compile(r".*\.(?:o_proj|out_proj|down_proj)\.bias")
_EMBEDDING = re.compile(r"(?:model\.|language_model\.)*embed_tokens\.weight")
_STALE = re.compile(r".*\.rotary_emb\.inv_freq")  # recomputed by every loader


@dataclass(frozen=True)
class Piece:
    """One matrix of a tensor to be written: a checkpoint's parameter, seen as rows, and the matrix' first row in it."""

    name: str
    row: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of the output, as MLX has it before it is quantized.

    Attributes:
        key: its name; a quantized one also has scales and biases beside it.
        shape: its shape in MLX.
        rows, width: of each piece, as the source stores them.
        pieces: where its matrices come from, in order.
        action: what is done to them.
        gain: parameter of the norm whose gain goes into it.
        bits, group_size: of the affine format; 16 bits keep it, in ``dtype``.
        dtype: safetensors dtype of what is not packed.
    """

    key: str
    shape: tuple[int, ...]
    rows: int
    width: int
    pieces: tuple[Piece, ...]
    action: Action = "copy"
    gain: str | None = None
    bits: int = KEPT_BITS
    group_size: int = 0
    dtype: str = ""

    @property
    def path(self) -> str:
        """The module's path."""
        return self.key.removesuffix(".weight")

    @property
    def sources(self) -> tuple[str, ...]:
        """Every parameter it needs."""
        names = dict.fromkeys(piece.name for piece in self.pieces) if self.action != "one" else {}
        return (*names, *([self.gain] if self.gain else []))


@dataclass
class Layout:
    """What an export will be.

    Attributes:
        model: MLX's class.
        text: transformers' text configuration.
        tensors: everything to be written, in the order of the model.
        places: source parameter -> parameter of transformers' model.
        root: of the decoder's parameters in that model.
        tied: the embedding is also the head.
        rotated: the residual stream is.
        dropped: parameters left out, and why.
        notes: what the reader of the report should know.
    """

    model: MlxModel
    text: Any
    tensors: list[Tensor]
    places: dict[str, Place]
    root: str
    tied: bool
    rotated: bool
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_layout(
    weights: Weights, plan: Plan, rotate: bool, dtype: str, groups: Sequence[tuple[str, int]] = ()
) -> Layout:
    """Place every parameter of ``weights`` in MLX's class.

    Args:
        rotate: fold the norms and rotate the residual stream, where the architecture allows it.
        dtype: safetensors dtype of the model.
        groups: (glob over parameter names, group size), the last that matches wins over the plan's.

    Raises:
        UnsupportedError: MLX has no such class, or it cannot hold a parameter.
        SourceError: parameters are missing, or shapes do not fit config.json.
        PlanError: a group size that MLX does not have, or a pattern that matches nothing.
    """
    hf_config = load_config(weights.config)
    text = hf_config.get_text_config(decoder=True)
    model = mlx_model(text)
    names = [name for name in weights.tensors if not _STALE.fullmatch(name)]
    found = place(meta_model(hf_config), names)
    dropped = dict.fromkeys(set(weights.tensors) - set(names), "a table that loaders compute themselves")
    _check_places(weights, found.places, found.missing, found.unexpected)
    dropped |= dict.fromkeys(found.ignored, "multi-token prediction, which mlx_lm does not have")
    tied = tied_embeddings(weights.config)
    (embedding,) = (p.target for p in found.places.values() if _EMBEDDING.fullmatch(p.target))
    root = embedding.removesuffix("embed_tokens.weight")
    layout = Layout(model, text, [], found.places, root, tied, rotate and not model.fixed, dropped, notes(text))
    if rotate and model.fixed:
        layout.notes.append(f"not rotated, no norm folded: {model.fixed}")
    _Builder(weights, plan, layout, dtype, groups).build()
    return layout


def _check_places(weights: Weights, places: Mapping[str, Place], missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        which = f"{missing[0]}: missing from" if missing else f"{unexpected[0]}: nothing in the model is called so, in"
        more = f" (and {len(missing or unexpected) - 1} more)" if len(missing or unexpected) > 1 else ""
        raise SourceError(f"{which} {weights.label}{more}; is config.json the one of these weights?")
    for name, found in places.items():
        if found.shape is None:
            raise UnsupportedError(f"{name}: transformers converts it on loading in a way that is not followed here")
        if found.shape != weights.tensors[name].shape:
            raise SourceError(
                f"{name}: has shape {list(weights.tensors[name].shape)}, config.json wants {list(found.shape)}"
            )


class _Builder:
    def __init__(
        self, weights: Weights, plan: Plan, layout: Layout, dtype: str, groups: Sequence[tuple[str, int]]
    ) -> None:
        self.weights, self.plan, self.layout, self.dtype = weights, plan, layout, dtype
        self.members: dict[str, list[tuple[str, Place]]] = defaultdict(list)
        for name, found in layout.places.items():
            self.members[found.target].append((name, found))
        self.group_of = self._groups(groups)

    def _groups(self, overrides: Sequence[tuple[str, int]]) -> dict[str, int]:
        chosen = {name: self._group(name) for name in self.weights.tensors}
        for pattern, size in overrides:
            matched = [name for name in chosen if fnmatchcase(name, pattern)]
            if not matched:
                raise PlanError(f"group override {pattern!r} matches no tensor; it is a glob over whole names")
            chosen |= dict.fromkeys(matched, size)
        for name, size in chosen.items():
            if size not in GROUP_SIZES and self.plan.bits(name) != KEPT_BITS:
                raise PlanError(
                    f"{name}: groups of {size}; MLX has groups of {', '.join(map(str, GROUP_SIZES))}: give --group-size"
                )
        return chosen

    def _group(self, name: str) -> int:
        fmt = self.plan.format_of(name)
        return getattr(fmt, "group_size", self.plan.usual_group_size)

    def build(self) -> None:
        for target in sorted(self.members, key=_natural):
            info = TensorInfo(target, "F32", tuple(self._shape(target)))
            role = role_of(target, info, self.weights.config)
            if role is Role.VISION:
                self.layout.dropped |= dict.fromkeys(self._names(target), "vision: mlx_lm runs the language model")
            elif role is Role.LM_HEAD and self.layout.tied:
                self.layout.dropped |= dict.fromkeys(self._names(target), "tied to the embedding, which is written")
            elif role is Role.UNKNOWN:
                raise UnsupportedError(
                    f"{self._names(target)[0]}: mlx_lm's {self.layout.model.model_type} has no place for it"
                )
            else:
                self._add(target, role)
        if self.layout.tied and self.layout.rotated:
            self._untie()

    def _names(self, target: str) -> list[str]:
        return [name for name, _ in self.members[target]]

    def _shape(self, target: str) -> tuple[int, ...]:
        """Shape of the model's parameter, of whose experts the checkpoint may have one tensor each."""
        _, found = self.members[target][0]
        assert found.shape is not None
        if found.expert is None:
            return found.shape
        experts = {p.expert for _, p in self.members[target]}
        rows = sum(p.shape[0] for _, p in self.members[target] if p.expert == found.expert and p.shape)
        return (len(experts), rows, found.shape[1])

    def _add(self, target: str, role: Role) -> None:
        tail = target.removeprefix(self.layout.root)
        key = self._key(tail)
        shape = self._shape(target)
        if role in (Role.ROUTED_GATE_UP, Role.ROUTED_DOWN):
            layer = key[: key.index(".", key.index("layers.") + 7) + 1]
            stem = f"{layer}{self.layout.model.experts}.switch_mlp."
            parts = ("gate_proj", "up_proj") if role is Role.ROUTED_GATE_UP else ("down_proj",)
            rows = shape[1] // len(parts)
            for index, part in enumerate(parts):
                pieces, names = self._experts(target, shape, rows * index)
                base = Tensor(f"{stem}{part}.weight", (shape[0], rows, shape[2]), rows, shape[2], pieces)
                self._append(base, names, role, tail)
            return
        (name,) = self._names(target)
        stored = (shape[0], shape[2], shape[1]) if role is Role.GDN_CONV else shape
        width = shape[-1] if shape else 1
        self._append(Tensor(key, stored, math.prod(shape) // width, width, (Piece(name, 0),)), [name], role, tail)

    def _experts(self, target: str, shape: tuple[int, ...], first: int) -> tuple[tuple[Piece, ...], list[str]]:
        """A matrix per expert, from row ``first`` of each."""
        members = self.members[target]
        if members[0][1].expert is None:
            return tuple(Piece(members[0][0], e * shape[1] + first) for e in range(shape[0])), [members[0][0]]
        by_expert = {p.expert: name for name, p in members if p.row == first}
        names = [by_expert[e] for e in range(shape[0])]
        return tuple(Piece(name, 0) for name in names), names

    def _append(self, base: Tensor, names: list[str], role: Role, tail: str) -> None:
        action, gain = self._action(role, tail)
        bits, group = self._format(base, names)
        dtype = self.weights.tensors[names[0]].dtype if role is Role.GDN_A_LOG else self.dtype
        self.layout.tensors.append(replace(base, action=action, gain=gain, bits=bits, group_size=group, dtype=dtype))

    def _action(self, role: Role, tail: str) -> tuple[Action, str | None]:
        if self.layout.rotated:
            if role in READS:
                layer = re.match(r"layers\.\d+\.", tail)
                norm = f"{self.layout.root}{layer[0] if layer else ''}{READS[role]}.weight"
                return "in", self._names(norm)[0]
            if role in WRITES:
                return "out", None
            if role is Role.EMBEDDING or _WRITER_BIAS.fullmatch(tail):
                return "in", None
            if _FOLDED_NORM.fullmatch(tail):
                return "one", None
        if role is Role.NORM and self.layout.model.gain != self.layout.model.stored_gain:
            return "plus_one", None
        return "copy", None

    def _format(self, base: Tensor, names: list[str]) -> tuple[int, int]:
        """Bits and group of one module: the most that the plan gives a part of it, and a group that divides its rows."""
        widths = {self.plan.bits(name) for name in names}
        bits, group = max(widths), min(self.group_of[name] for name in names)
        if len(widths) > 1:
            self._note(
                f"{base.path}: {bits} bits for all its experts; the plan has {', '.join(map(str, sorted(widths)))}"
            )
        if bits == KEPT_BITS:
            return KEPT_BITS, 0
        fitting = [size for size in GROUP_SIZES if size <= group and base.width % size == 0]
        if not fitting:
            self._note(f"{base.path}: kept at 16 bits, for no group of MLX divides its {base.width} inputs")
            return KEPT_BITS, 0
        if fitting[-1] != group:
            self._note(f"{base.path}: groups of {fitting[-1]}, for {group} does not divide its {base.width} inputs")
        return bits if bits in BITS else 8, fitting[-1]

    def _untie(self) -> None:
        embedding = next(t for t in self.layout.tensors if t.key == f"{self.layout.model.prefix}embed_tokens.weight")
        gain = self._names(f"{self.layout.root}norm.weight")[0]
        self.layout.tensors.append(replace(embedding, key=f"{self.layout.model.head}.weight", gain=gain))
        self.layout.tied = False
        self._note("the head is written beside the embedding it was tied to, for it takes the last norm's gain")

    def _key(self, tail: str) -> str:
        model = self.layout.model
        if tail.startswith("lm_head."):
            return model.head + tail.removeprefix("lm_head")
        return model.prefix + re.sub(r"(layers\.\d+\.)mlp\.gate\.", rf"\g<1>{model.experts}.gate.", tail)

    def _note(self, text: str) -> None:
        self.layout.notes.append(text)


def summarized(names: Mapping[str, str]) -> list[dict[str, str]]:
    """Names and reasons with their numbers replaced by ``*``."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=_natural):
        by_reason[names[name]].append(name)
    return [{"tensors": p, "why": why} for why, members in by_reason.items() for p in name_patterns(members)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
