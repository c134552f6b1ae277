"""Turn a model on the meta device into one that holds a checkpoint's packed weights; every tensor is accounted for."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.formats.base import Format
from kappaquant.models.heads import without_heads
from kappaquant.models.skeleton import Layout, Place, place
from kappaquant.runtime.experts import ExpertBlock, ExpertWeights, KeptWeight, QuantExperts
from kappaquant.runtime.packed import PackedWeight, QuantEmbedding, QuantLinear, SharedInput, hold_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("kappaquant")

At = tuple[int | slice, ...]
_HINT = "is config.json the one of this checkpoint?"


@dataclass(frozen=True)
class Filling:
    """One checkpoint tensor and the part of a module's storage that it fills."""

    name: str
    weight: PackedWeight | KeptWeight
    at: At


@dataclass(frozen=True)
class _Segment:
    """Rows of one expert's matrix that share a format, and the checkpoint tensors they come from."""

    row: int
    rows: int
    fmt: Format | None
    sources: tuple[tuple[str, int], ...]  # (name, its first row)


def check_accounting(model: PreTrainedModel, checkpoint: Checkpoint) -> Layout:
    """Where each tensor goes, once every parameter of the (meta) model and every tensor is accounted for.

    Raises:
        FormatError: a tensor is missing, is of no use to the model, or has the wrong shape; it is named. A head of another class is
            neither (``heads.without_heads``).
    """
    layout = place(model, checkpoint.keys())
    what = type(model).__name__
    hint = _HINT
    if (layout.unexpected or layout.missing) and (own := without_heads(model, layout, checkpoint.keys())):
        hint = f"load it as what config.json names, {own}"
    check_layout(layout, checkpoint, what, hint)
    if layout.ignored:
        logger.info("%s has no use for %d tensors, such as %s", what, len(layout.ignored), layout.ignored[0])
    return layout


def check_layout(layout: Layout, checkpoint: Checkpoint, what: str, hint: str = _HINT) -> None:
    """Raise FormatError, naming the tensor, unless ``what`` has a place for each tensor and each place a tensor of its shape."""
    if layout.unexpected:
        name = layout.unexpected[0]
        raise FormatError(
            f"{name}: in {checkpoint.path}, but {what} has no place for it{_more(layout.unexpected)}; {hint}"
        )
    if layout.missing:
        raise FormatError(
            f"{layout.missing[0]}: {what} needs it, but {checkpoint.path} does not have it{_more(layout.missing)}; {hint}"
        )
    for name, found in layout.places.items():
        if found.shape is not None and checkpoint.shape(name) != found.shape:
            raise FormatError(
                f"{name}: has shape {list(checkpoint.shape(name))} in {checkpoint.path}, but {what} as config.json "
                f"describes it wants {list(found.shape)}"
            )
        if found.shape is not None and len(found.shape) < 2 and checkpoint.format_of(name) is not None:
            raise UnsupportedError(
                f"{name}: only matrices have a packed form, this is {list(found.shape)}; keep it at 16 bits"
            )
        if found.shape is None and checkpoint.format_of(name) is not None:
            raise UnsupportedError(
                f"{name}: transformers converts this tensor on loading in a way that packed weights do not support; "
                "keep it at 16 bits"
            )


class Assembler:
    """Replaces the modules of a model on the meta device whose weights a checkpoint holds packed, then fills them."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.layout = check_accounting(model, checkpoint)
        self.fillings: list[Filling] = []
        self.replaced: list[PackedWeight | ExpertBlock] = []
        self.shared = SharedInput()

    def replace(self) -> None:
        """Put empty packed modules in place; what transformers loads itself stays as it is."""
        by_target: dict[str, dict[str, Place]] = defaultdict(dict)
        for name, found in self.layout.places.items():
            by_target[found.target][name] = found
        packed = {
            target: places
            for target, places in by_target.items()
            if any(self.checkpoint.format_of(name) is not None for name in places)
        }
        formats = {fmt for name in self.checkpoint.keys() if (fmt := self.checkpoint.format_of(name))}
        suffixes = {suffix for fmt in formats for suffix in fmt.parts((1, fmt.step))}
        elsewhere = {
            rf"({'|'.join(map(re.escape, sorted(suffixes)))})$"
        }  # what transformers meets in the files, but need not load
        for target, places in packed.items():
            path, _, parameter = target.rpartition(".")
            module = self.model.get_submodule(path)
            if isinstance(module, QuantExperts):
                continue
            if getattr(module, parameter).dim() == 3:
                self._replace_experts(path, module, by_target, target)
                elsewhere.add(rf"^{re.escape(path)}\.")
            else:
                (name,) = places
                self._replace_matrix(path, parameter, self._packed(name, checkpoint_shape(places[name])), name)
        self._tie(set(packed), set(by_target))
        self.model._keys_to_ignore_on_load_unexpected = (
            set(self.model._keys_to_ignore_on_load_unexpected or ()) | elsewhere
        )

    def fill(self) -> None:
        """Read the packed weights, one tensor at a time, into the modules, which are on their devices by now."""
        for filling in self.fillings:
            name, weight = filling.name, filling.weight
            if isinstance(weight, PackedWeight):
                weight.fill(filling.at, self.checkpoint.parts(name))
            else:
                weight.fill(filling.at, self.checkpoint.tensor(name))
        for module in self.replaced:
            module.finish()

    def _packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight:
        """An empty packed weight that ``name`` alone fills."""
        fmt = self.checkpoint.format_of(name)
        assert fmt is not None
        weight = PackedWeight(fmt, shape)
        self.fillings.append(Filling(name, weight, ()))
        self.replaced.append(weight)
        return weight

    def _replace_matrix(self, path: str, parameter: str, weight: PackedWeight, name: str) -> None:
        module = self.model.get_submodule(path)
        dtype = getattr(module, parameter).dtype
        new: nn.Module
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            new = QuantLinear(weight, module.bias, self.shared)
        elif isinstance(module, nn.Embedding):
            known = type(module).forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale")
            if not known or module.max_norm is not None:
                raise UnsupportedError(
                    f"{name}: no packed form of the embedding {type(module).__name__}; keep it at 16 bits"
                )
            new = QuantEmbedding(weight, dtype, float(getattr(module, "scalar_embed_scale", 1.0)))
        else:
            hold_packed(module, parameter, weight, dtype)
            return
        self.model.set_submodule(path, new)

    def _tie(self, packed: set[str], filled: set[str]) -> None:
        """Let a tied parameter share a packed weight, and take packed ones out of transformers' own tying."""
        tied = self.model.all_tied_weights_keys
        for target, source in list(tied.items()):
            if target in packed or source in packed:
                del tied[target]
                have, want = (source, target) if source in packed else (target, source)
                if want not in filled:
                    holder = self.model.get_submodule(have.rpartition(".")[0])
                    path, _, parameter = want.rpartition(".")
                    self._replace_matrix(path, parameter, cast(PackedWeight, holder.weight), want)

    def _replace_experts(self, path: str, module: Any, by_target: dict[str, dict[str, Place]], name: str) -> None:
        reason = _why_not_experts(module)
        if reason:
            raise UnsupportedError(f"{name}: no packed form of {type(module).__name__}: {reason}; keep it at 16 bits")
        gate_up, down = (
            self._expert_weights(by_target[f"{path}.{parameter}"], tuple(plain.shape), plain.dtype)
            for parameter, plain in (("gate_up_proj", module.gate_up_proj), ("down_proj", module.down_proj))
        )
        self.model.set_submodule(path, QuantExperts(gate_up, down, module.act_fn, self.shared))

    def _expert_weights(self, places: dict[str, Place], shape: tuple[int, ...], dtype: torch.dtype) -> ExpertWeights:
        by_expert: dict[int | None, list[tuple[str, Place]]] = defaultdict(list)
        for name, found in places.items():
            by_expert[found.expert].append((name, found))
        grouped: dict[tuple[int, int, Format | None], list[tuple[int | None, _Segment]]] = defaultdict(list)
        for expert, pieces in by_expert.items():
            for segment in self._segments(pieces):
                grouped[segment.row, segment.rows, segment.fmt].append((expert, segment))
        blocks = []
        for (row, rows, fmt), members in grouped.items():
            whole = members[0][0] is None  # one tensor holds all experts
            experts = list(range(shape[0])) if whole else [expert for expert, _ in members if expert is not None]
            stored = (len(experts), rows, shape[2])
            weight = PackedWeight(fmt, stored, uses=("grouped",)) if fmt else KeptWeight(stored, dtype)
            for slot, (_, segment) in enumerate(members):
                for name, first in segment.sources:
                    count = checkpoint_shape(places[name])[-2]
                    at: At = () if whole else (slot, slice(first - row, first - row + count))
                    self.fillings.append(Filling(name, weight, at))
            blocks.append(ExpertBlock(weight, experts, row, shape[0]))
        self.replaced.extend(blocks)
        return ExpertWeights(blocks, shape[1])

    def _segments(self, pieces: list[tuple[str, Place]]) -> list[_Segment]:
        """Neighbouring rows of one format become one segment: gate and up are then one product."""
        segments: list[_Segment] = []
        for name, found in sorted(pieces, key=lambda piece: piece[1].row):
            fmt = self.checkpoint.format_of(name)
            rows = checkpoint_shape(found)[-2]
            last = segments[-1] if segments else None
            if last and (last.fmt, last.row + last.rows) == (fmt, found.row):
                sources = (*last.sources, (name, found.row))
                segments[-1] = _Segment(last.row, last.rows + rows, fmt, sources)
            else:
                segments.append(_Segment(found.row, rows, fmt, ((name, found.row),)))
        return segments


def set_activations(model: nn.Module, activations: str) -> None:
    """Let kernels multiply by inputs of this kind, "int8" or "bf16", from now on."""
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantExperts):
            module.shared.activations = activations


def checkpoint_shape(found: Place) -> tuple[int, ...]:
    """The shape of a placed tensor, which ``check_accounting`` made sure is known."""
    assert found.shape is not None
    return found.shape


def _why_not_experts(module: nn.Module) -> str | None:
    """Why ``QuantExperts`` cannot stand in for this module, or None."""
    for parameter in ("gate_up_proj", "down_proj"):
        weight = getattr(module, parameter, None)
        if weight is None or weight.dim() != 3:
            return f"it has no fused {parameter}"
    if not callable(getattr(module, "act_fn", None)):
        return "it has no act_fn"
    if not getattr(module, "is_concatenated", True) or not getattr(module, "has_gate", True):
        return "gate and up are not stacked"
    if getattr(module, "is_transposed", False) or getattr(module, "has_bias", False):
        return "its matrices are transposed or have biases"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's output"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__module__ != "transformers.integrations.moe":
        return "it gates in its own way"
    return None


def _more(names: list[str]) -> str:
    return f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
