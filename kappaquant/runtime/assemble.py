"""Turn a model on the meta device into one that holds a checkpoint's packed weights; every tensor is accounted for."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.formats.base import Format
from kappaquant.formats.transposed import swapped
from kappaquant.models.forward_code import called_plainly, read_past
from kappaquant.models.heads import without_heads
from kappaquant.models.skeleton import Layout, Place, place
from kappaquant.models.structure import is_transposed
from kappaquant.runtime.declared_experts import DeclaredExperts, declared, first_of, hold_experts
from kappaquant.runtime.experts import ExpertBlock, ExpertWeights, KeptWeight, QuantExperts
from kappaquant.runtime.packed import PackedWeight, QuantEmbedding, QuantLinear, SharedInput, hold_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("kappaquant")

At = tuple[int | slice | torch.Tensor, ...]
_HINT = "is config.json the one of this checkpoint?"


@dataclass(frozen=True)
class Filling:
    """One checkpoint tensor and the part of a module's storage, which is row-wise, that it fills."""

    name: str
    weight: PackedWeight | KeptWeight
    at: At
    transposed: bool = False


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
    layout = place(model, checkpoint.keys(), {name: checkpoint.shape(name) for name in checkpoint.keys()})
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
        self._read, _ = read_past(model)

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
            if isinstance(module, QuantExperts | DeclaredExperts):
                continue
            if getattr(module, parameter).dim() == 3:
                elsewhere |= {
                    rf"^{re.escape(each)}(\.|$)" for each in self._replace_experts(path, parameter, by_target)
                }
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
                tensor = self.checkpoint.tensor(name)
                weight.fill(filling.at, tensor.mT if filling.transposed else tensor)
        for module in self.replaced:
            module.finish()

    def _packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight:
        """An empty packed weight that ``name`` alone fills."""
        fmt = self.checkpoint.format_of(name)
        assert fmt is not None
        weight = PackedWeight(fmt.rowwise, swapped(shape) if fmt.transposed else shape)
        self.fillings.append(Filling(name, weight, ()))
        self.replaced.append(weight)
        return weight

    def _replace_matrix(self, path: str, parameter: str, weight: PackedWeight, name: str) -> None:
        module = self.model.get_submodule(path)
        plain = getattr(module, parameter)
        fmt = self.checkpoint.format_of(name) if name in self.layout.places else None
        transposed = fmt is not None and fmt.transposed
        new: nn.Module
        if isinstance(module, Conv1D if transposed else nn.Linear) and called_plainly(module, path, self._read):
            new = QuantLinear(weight, module.bias, self.shared)
        elif isinstance(module, nn.Embedding):
            known = type(module).forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale")
            if not known or module.max_norm is not None:
                raise UnsupportedError(
                    f"{name}: no packed form of the embedding {type(module).__name__}; keep it at 16 bits"
                )
            new = QuantEmbedding(weight, plain.dtype, float(getattr(module, "scalar_embed_scale", 1.0)))
        else:
            hold_packed(module, parameter, weight, plain.dtype, transposed)
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

    def _replace_experts(self, path: str, parameter: str, by_target: dict[str, dict[str, Place]]) -> list[str]:
        """Put packed experts in place; returns the parameters that transformers need not load."""
        module: Any = self.model.get_submodule(path)
        names = ["gate_up_proj", "down_proj"]
        plain = _plain_experts(module)
        if not plain:
            names = [first_of(module), "down_proj"] if declared(module) else [parameter]
        transposed = is_transposed(module, self.model.config.get_text_config().hidden_size)
        made = {}
        for each in names:
            target = f"{path}.{each}"
            made[each] = self._expert_weights(by_target[target], getattr(module, each), transposed)
        if plain:
            self.model.set_submodule(
                path, QuantExperts(made["gate_up_proj"], made["down_proj"], module.act_fn, self.shared)
            )
            return [path]
        if declared(module):
            hold_experts(module, made)
        else:
            (weights,) = made.values()
            self._hold_stack(module, parameter, weights, transposed)
        return [f"{path}.{each}" for each in names]

    def _hold_stack(self, module: nn.Module, parameter: str, weights: ExpertWeights, transposed: bool) -> None:
        """Let a module whose products transformers does not describe decode what it reads."""
        (block,) = weights.blocks if len(weights.blocks) == 1 else (None,)
        weight = block.weight if isinstance(block, ExpertBlock) else None
        if not isinstance(weight, PackedWeight):
            raise UnsupportedError(
                f"{parameter} of {type(module).__name__}: its experts have several formats, and transformers does not say how "
                "they are multiplied; give all of them one format"
            )
        hold_packed(module, parameter, weight, getattr(module, parameter).dtype, transposed)

    def _expert_weights(self, places: dict[str, Place], plain: torch.Tensor, transposed: bool) -> ExpertWeights:
        """Packed and kept blocks of a parameter [E, out, in], or [E, in, out] where the module is ``transposed``."""
        shape = swapped(tuple(plain.shape)) if transposed else tuple(plain.shape)
        by_expert: dict[int | None, list[tuple[str, Place]]] = defaultdict(list)
        for name, found in places.items():
            by_expert[found.expert].append((name, self._rowwise(name, found, transposed)))
        grouped: dict[tuple[int, int, Format | None], list[tuple[int | None, _Segment]]] = defaultdict(list)
        for expert, pieces in by_expert.items():
            for segment in self._segments(pieces):
                grouped[segment.row, segment.rows, segment.fmt].append((expert, segment))
        blocks = []
        for (row, rows, fmt), members in grouped.items():
            whole = members[0][0] is None  # one tensor holds all experts
            experts = list(range(shape[0])) if whole else [expert for expert, _ in members if expert is not None]
            stored = (len(experts), rows, shape[2])
            weight = PackedWeight(fmt, stored, uses=("grouped",)) if fmt else KeptWeight(stored, plain.dtype)
            for slot, (_, segment) in enumerate(members):
                for name, first in segment.sources:
                    found = places[name]
                    at: At = (
                        _rows_of(found, rows)
                        if whole
                        else (slot, slice(first - row, first - row + checkpoint_shape(found)[-2]))
                    )
                    self.fillings.append(Filling(name, weight, at, transposed != found.transposed))
            blocks.append(ExpertBlock(weight, experts, row, shape[0]))
        self.replaced.extend(blocks)
        return ExpertWeights(blocks, shape[1])

    def _rowwise(self, name: str, found: Place, transposed: bool) -> Place:
        """The place with the shape [..., out, in]. Raises UnsupportedError for a format whose groups run along the outputs."""
        fmt = self.checkpoint.format_of(name)
        stored = transposed != found.transposed
        if fmt is not None and fmt.transposed != stored:
            raise UnsupportedError(
                f"{name}: is packed as {fmt.id}, along its outputs; quantize the original again by a plan of this version"
            )
        return replace(found, shape=swapped(checkpoint_shape(found))) if stored else found

    def _segments(self, pieces: list[tuple[str, Place]]) -> list[_Segment]:
        """Neighbouring rows of one format become one segment: gate and up are then one product."""
        segments: list[_Segment] = []
        for name, found in sorted(pieces, key=lambda piece: piece[1].row):
            stored = self.checkpoint.format_of(name)
            fmt, rows = stored and stored.rowwise, checkpoint_shape(found)[-2]
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


def _rows_of(found: Place, rows: int) -> At:
    """Where the rows of a tensor of all experts go: all in place, or, where they take turns, the even ones before the odd ones."""
    if not found.interleaved:
        return ()
    order = (
        torch.arange(rows, device="cpu").view(2, -1).T.flatten()
    )  # transformers assembles models under the meta device
    return (slice(None), order)


def _plain_experts(module: nn.Module) -> bool:
    """Whether ``QuantExperts``, for which there are kernels, can stand in for a module: stacked gate and up, and nothing of its own."""
    fused = all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))
    stacked = getattr(module, "is_concatenated", True) and getattr(module, "has_gate", True)
    plain = not any(getattr(module, mark, False) for mark in ("is_transposed", "has_bias", "has_post_expert_norm"))
    gate = getattr(type(module), "_apply_gate", None)
    usual = gate is not None and gate.__module__ == "transformers.integrations.moe"
    return bool(fused and callable(getattr(module, "act_fn", None)) and stacked and plain and usual)


def _more(names: list[str]) -> str:
    return f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
