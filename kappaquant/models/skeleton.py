"""The model a config.json describes, built without memory: its parameters, and which checkpoint tensor goes where.

transformers renames tensors on loading and merges per-expert ones; its own conversion rules are followed here, so that
names and shapes are those that transformers will use.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kappaquant.errors import UnsupportedError
from kappaquant.models.configuration import of_content, of_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger("kappaquant")

Config = str | Path | Mapping[str, Any]
_TABLE = "rotary_emb.inv_freq"
"""End of the names of a table that older checkpoints hold for each layer, and models compute."""
_MTP = "mtp."
_LAYER = "model.layers.0."


@dataclass(frozen=True)
class Place:
    """Where one checkpoint tensor goes.

    Attributes:
        target: parameter of the model that takes it.
        shape: the shape it must have; None where transformers applies a conversion this package does not follow.
        expert: index along the target's first axis, for one expert's matrix of a fused parameter.
        row: first row of the target it fills.
        transposed: transformers swaps its last two axes on loading.
        interleaved: its rows take turns, those of the target's first half and of its second.
        beside: other parameters that it fills too, where transformers cuts it in pieces.
    """

    target: str
    shape: tuple[int, ...] | None
    expert: int | None = None
    row: int = 0
    transposed: bool = False
    interleaved: bool = False
    beside: tuple[str, ...] = ()


@dataclass
class Layout:
    """How a set of checkpoint tensors meets a model.

    Attributes:
        places: checkpoint name -> place.
        ignored: tensors the model class is known not to use (multi-token-prediction layers, tables that it computes).
        unexpected: tensors the model has no parameter for, or one that another tensor fills already.
        missing: parameters of the model, or experts of one, that no tensor fills.
    """

    places: dict[str, Place] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def load_config(config: Config) -> PretrainedConfig:
    """The transformers configuration of a folder, or of the content of its config.json.

    Raises:
        UnsupportedError: the installed transformers does not know the architecture, or only by code that the folder brings; or it
            makes nothing of what is there.
    """
    return of_content(config) if isinstance(config, Mapping) else of_folder(config)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class named in ``architectures``, else the one transformers uses to generate text for this configuration."""
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        mapped: Any = auto._model_mapping.get(type(config), None)
        if mapped is not None:
            return mapped
    raise UnsupportedError(
        f"config.json: architectures {config.architectures} of model_type {config.model_type!r} is no class of the "
        "installed transformers; models that bring their own code are not supported"
    )


def meta_model(config: Config | PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: modules and shapes, no memory."""
    loaded = load_config(config) if isinstance(config, str | Path | Mapping) else config
    with torch.device("meta"):
        return model_class(loaded)(loaded)


def parameter_shapes(config: Config, names: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Logical shapes of checkpoint tensors, from the architecture alone.

    Args:
        config: folder of a config.json, or its content.
        names: checkpoint names, in any layout transformers can load (experts fused or one by one, with or without a
            multimodal prefix); default the model's own parameter names. Names without a known shape are left out.

    Raises:
        UnsupportedError: unknown architecture.
    """
    model = meta_model(config)
    if names is None:
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = list(names)
    places = place(model, names).places
    if any(name.startswith(_MTP) for name in names):
        places |= place_mtp(config, names).places
    return {name: shape for name in names if name in places and (shape := places[name].shape) is not None}


def place(model: PreTrainedModel, names: Iterable[str], stored: Mapping[str, tuple[int, ...]] | None = None) -> Layout:
    """Follow transformers' conversion rules from checkpoint names to the parameters of ``model`` (unmodified, meta).

    Args:
        stored: the tensors' shapes in the checkpoint. Without, rules that transpose or reorder rows are not followed: their
            places have no shape, and who reads rows as they are stored need not mind them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parameters = model.state_dict()
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith(_TABLE) for name, _ in model.named_buffers()):
        patterns.append(re.escape(_TABLE))
    ignorable = [re.compile(pattern) for pattern in patterns]
    layout = Layout()
    taken: set[Place] = set()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = name, None
        if target not in parameters:
            known = any(regex.search(target) for regex in ignorable)
            (layout.ignored if known else layout.unexpected).append(name)
            continue
        shape = tuple(parameters[target].shape)
        found = Place(target, shape)
        if pattern is not None:
            rule = by_pattern[pattern]
            found = _converted(name, target, shape, pattern, rule, (stored or {}).get(name))
            first, *others = rule.target_patterns
            found = replace(found, beside=tuple(target.replace(first, other) for other in others))
        if found.shape is not None and found in taken:
            layout.unexpected.append(name)
            continue
        taken.add(found)
        layout.places[name] = found
    layout.missing = _missing(model, parameters, layout.places.values())
    return layout


def place_mtp(config: Config, names: Iterable[str]) -> Layout:
    """Where the tensors of a multi-token-prediction head go, which no model class holds.

    ``mtp.fc`` joins a token's normed embedding and the normed hidden state before it; ``mtp.layers.N``, full-attention
    decoder layers of the model, and ``mtp.norm`` follow. Embedding and lm_head are the model's. There are as many layers
    as ``mtp_num_hidden_layers`` says, one where it says nothing.

    Args:
        config: folder of a config.json, or its content.
        names: checkpoint names, of which those below ``mtp.`` count; experts fused or one by one.

    Raises:
        UnsupportedError: unknown architecture.
    """
    text = load_config(config).get_text_config()
    layers = getattr(text, "mtp_num_hidden_layers", None) or 1
    width = text.hidden_size
    text.num_hidden_layers, text.layer_types, text.architectures = 1, ["full_attention"], None
    model = meta_model(text)
    layout = Layout()
    left = {name for name in names if name.startswith(_MTP)}
    around = {"fc": (width, 2 * width)} | dict.fromkeys(
        ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), (width,)
    )
    for part, shape in around.items():
        name = f"{_MTP}{part}.weight"
        if name in left:
            layout.places[name] = Place(name, shape)
        else:
            layout.missing.append(name)
    for number in range(layers):
        own = f"{_MTP}layers.{number}."
        found = place(model, [_LAYER + name.removeprefix(own) for name in left if name.startswith(own)])
        for name, at in found.places.items():
            target = own + at.target.removeprefix(_LAYER)
            layout.places[own + name.removeprefix(_LAYER)] = Place(target, at.shape, at.expert, at.row)
        layout.missing += [own + name.removeprefix(_LAYER) for name in found.missing if name.startswith(_LAYER)]
    layout.unexpected = sorted(left - layout.places.keys())
    return layout


def _converted(
    name: str, target: str, shape: tuple[int, ...], pattern: str, rule: Any, stored: tuple[int, ...] | None
) -> Place:
    """The place of a tensor that a conversion rule merges into a fused expert parameter, transposes or reorders."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    alone = len(rule.source_patterns) == len(rule.target_patterns) == len(steps) == 1
    if len(shape) != 3:
        return Place(target, None)
    if steps[:1] == [("MergeModulelist", 0)] and steps[1:] in ([], [("Concatenate", 1)]):
        rows = shape[1] // len(rule.source_patterns)
        expert = int([part for part in name.split(".") if part.isdigit()][-1])
        return Place(target, (rows, shape[2]), expert, rows * rule.source_patterns.index(pattern))
    if not alone or stored is None:
        return Place(target, None)
    (step,) = rule.operations
    if steps == [("Transpose", None)] and {step.dim0, step.dim1} == {1, 2}:
        if step.check_dims and stored == shape:  # only what does not fit as it is gets transposed
            return Place(target, shape)
        return Place(target, (shape[0], shape[2], shape[1]), transposed=True)
    if steps == [("Interleave", 1)] and not step.inverse:
        return Place(target, shape, interleaved=True)
    return Place(target, None)


def _missing(model: PreTrainedModel, parameters: Mapping[str, torch.Tensor], places: Iterable[Place]) -> list[str]:
    filled: dict[str, int] = {}
    for found in places:
        size = parameters[found.target].numel() if found.shape is None else math.prod(found.shape)
        filled[found.target] = filled.get(found.target, 0) + size
        filled |= {other: parameters[other].numel() for other in found.beside if other in parameters}
    twins = dict(model.all_tied_weights_keys)
    twins |= {source: target for target, source in twins.items()}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = []
    for name, parameter in parameters.items():
        tied = name not in filled and twins.get(name) in filled
        if filled.get(name, 0) < parameter.numel() and not tied and not any(p.search(name) for p in optional):
            some = f" ({filled[name]} of {parameter.numel()} elements are there)" if name in filled else ""
            missing.append(name + some)
    return missing
