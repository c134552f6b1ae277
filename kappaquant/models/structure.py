"""What transformers' own class makes of each tensor of a checkpoint, so that an architecture needs no table to be packed.

The class that config.json names is built on the meta device, and every tensor is followed to the module that holds it: the
weight of an nn.Linear, of a Conv1D, all experts of a layer, an embedding, the head, or something that must be left alone. Names count
only where modules do not tell: for routers and for what belongs to a recurrence.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from kappaquant.errors import UnsupportedError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.forward_code import is_among, multiplied_from_right, read_past
from kappaquant.models.role_defaults import Role
from kappaquant.models.skeleton import Place, meta_model, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("kappaquant")

_SMALLEST = 128
"""A matrix with a shorter axis is left alone: such are rows for each head or group, tiny and delicate."""
_RECURRENCES = ("A_log", "dt_bias", "time_decay")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LARGE_SHARE = 8
"""A projection of a recurrence that is so many times smaller than its largest one steers it."""


@dataclass(frozen=True)
class Found:
    """What the class makes of one tensor.

    Attributes:
        role: for tensors whose names tell none.
        packable: a product of activations with it is all that it is for, or rows of it are looked up.
        transposed: it is stored [..., in, out].
        expert: the routed expert whose matrix it is.
        refuse: why it cannot be packed, where something other than its role forbids it.
        keep: why policies leave it in 16 bits, where its role alone would not.
        aside: it is part of an encoder of other things than text.
    """

    role: Role = Role.UNKNOWN
    packable: bool = False
    transposed: bool = False
    expert: int | None = None
    refuse: str = ""
    keep: str = ""
    aside: bool = False


def structure(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Mapping[str, Found]:
    """What becomes of each tensor that the class has a place for; nothing where transformers cannot build the class.

    A layer's experts that are stored one by one are alike, so only one of them is followed: there may be 90,000.
    """
    text = json.dumps({key: value for key, value in config.items() if key != "quantization_config"}, sort_keys=True)
    model = _model(text)
    if model is None:
        return {}
    alike = {name: (_EXPERT.sub(".experts.*.", name), info.shape) for name, info in tensors.items()}
    followed: dict[Any, str] = {}
    for name, key in alike.items():
        followed.setdefault(key, name)
    stored = {name: tensors[name].shape for name in followed.values()}
    modules = _Modules(model)
    found = {name: modules.found(at, stored[name]) for name, at in place(model, stored, stored).places.items()}
    told = {name: found[followed[key]] for name, key in alike.items() if followed[key] in found}
    return {name: each if each.expert is None else _numbered(each, name) for name, each in told.items()}


def _numbered(found: Found, name: str) -> Found:
    expert = _EXPERT.search(name)
    return replace(found, expert=int(expert[1])) if expert else found


@lru_cache(maxsize=2)
def _model(config: str) -> PreTrainedModel | None:
    content = json.loads(config)
    try:
        return meta_model(content)
    except UnsupportedError as problem:
        # of an unknown model_type nobody expects more, and plans warn of it themselves
        level = logging.WARNING if content.get("model_type") in CONFIG_MAPPING else logging.INFO
        logger.log(level, "%s; tensors are judged by their names", problem)
    except Exception as problem:  # whatever a model's own code raises about a configuration
        logger.warning(
            "config.json: transformers builds no %s model of it (%s: %s); tensors are judged by their names",
            content.get("model_type"), type(problem).__name__, problem,
        )  # fmt: skip
    return None


class _Modules:
    """The modules of a model, and what can be said of all of them at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._by_path = dict(model.named_modules())
        paths = {id(module): path for path, module in self._by_path.items()}
        self._head = model.get_output_embeddings()
        self._decoder = self._path_of_decoder(paths)
        self._read, self._changed = read_past(model)
        strict = model._keep_in_fp32_modules_strict or ()
        self._in_float32 = [
            re.compile(rf"(?:^|\.){re.escape(part)}(?:\.|$)")
            for part in {*strict, *(model._keep_in_fp32_modules or ())}
        ]
        self._numbers_of_experts = set(_expert_numbers(model.config.get_text_config().to_dict()))
        self._experts = {
            path: counts for path, module in self._by_path.items() if (counts := self._expert_counts(path, module))
        }

    def found(self, at: Place, stored: tuple[int, ...]) -> Found:
        path, _, parameter = at.target.rpartition(".")
        aside = self._decoder is not None and not at.target.startswith(self._decoder) and not self._is_head(path)
        found = self._found(path, parameter, at)
        refuse = found.refuse
        if at.shape is None:
            refuse = "transformers converts this tensor on loading in a way that packed weights do not follow"
        elif any(pattern.search(at.target) for pattern in self._in_float32):
            refuse = "transformers keeps this tensor in float32"
        keep = found.keep
        if found.packable and not keep and min(stored[-2:]) < _SMALLEST:
            keep = f"a matrix of {' x '.join(map(str, stored[-2:]))}: tiny"
        return Found(
            Role.TOWER if aside else found.role, found.packable and not refuse, found.transposed != at.transposed, at.expert,
            refuse, keep, aside,
        )  # fmt: skip

    def _found(self, path: str, parameter: str, at: Place) -> Found:
        module = self._by_path[path]
        dim = getattr(module, parameter).dim()
        if dim == 3 and path in self._experts:
            return self._of_experts(module, parameter, at)
        if dim != 2:
            return Found()
        if isinstance(module, nn.Embedding):
            return Found(Role.EMBEDDING, packable=True)
        if self._is_head(path):
            return Found(Role.LM_HEAD, packable=True)
        if parameter != "weight" or not isinstance(module, nn.Linear | Conv1D):
            return Found(Role.ROUTER if self._routes(path, module) else Role.UNKNOWN)
        if self._routes(path, module):
            return Found(Role.ROUTER)
        keep = self._steers(path, module)
        if keep:
            return Found(Role.RECURRENT, packable=True, transposed=isinstance(module, Conv1D), keep=keep)
        if is_among(path, self._changed):
            return Found(Role.LINEAR, refuse="the model's code changes this weight in place")
        if is_among(path, self._read):
            keep = "its weight is read by another module, past the layer's own product"
        return Found(Role.LINEAR, packable=True, transposed=isinstance(module, Conv1D), keep=keep)

    def _of_experts(self, module: Any, parameter: str, at: Place) -> Found:
        hidden = self._model.config.get_text_config().hidden_size
        transposed = is_transposed(module, hidden)
        rows, inputs = getattr(module, parameter).shape[1:]
        if transposed:
            rows, inputs = inputs, rows
        down = "down" in parameter or (rows == hidden != inputs)
        if down:
            role = Role.ROUTED_DOWN
        elif at.expert is not None and "gate" in parameter:
            role = Role.ROUTED_UP if at.row else Role.ROUTED_GATE
        else:
            role = Role.ROUTED_GATE_UP if "gate" in parameter or parameter == "weight" else Role.ROUTED_UP
        return Found(role, packable=True, transposed=transposed)

    def _is_head(self, path: str) -> bool:
        return self._head is not None and self._by_path[path] is self._head

    def _path_of_decoder(self, paths: Mapping[int, str]) -> str | None:
        """Where the part that reads text lies in a model that reads other things too; None where there is only one part."""
        config = self._model.config
        if config.get_text_config() is config or getattr(config, "is_encoder_decoder", False):
            return None
        decoder = paths.get(id(self._model.get_decoder()))
        return f"{decoder}." if decoder else None

    def _expert_counts(self, path: str, module: nn.Module) -> frozenset[int]:
        """How many experts a module's parameters hold each; nothing where it is none of that kind."""
        counts = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1}
        named = any("expert" in part.lower() for part in (*path.split("."), type(module).__name__))
        return frozenset(counts if named or counts <= self._numbers_of_experts else ())

    def _routes(self, path: str, module: nn.Module) -> bool:
        """Whether a matrix is that of a router: called so, or beside experts with one output for each."""
        if "router" in path.split("."):
            return True
        weight = getattr(module, "weight", None)
        rows = weight.shape[0] if weight is not None and weight.dim() == 2 else 0
        above = path.rpartition(".")[0]
        return any(rows in counts and experts.rpartition(".")[0] == above for experts, counts in self._experts.items())

    def _steers(self, path: str, module: nn.Module) -> str:
        """Why a projection into a recurrence is left alone; empty for large ones and elsewhere."""
        mixer = self._by_path[path.rpartition(".")[0]]
        if not any(hasattr(mixer, name) for name in _RECURRENCES):
            return ""
        sizes = [child.weight.numel() for child in mixer.children() if isinstance(child, nn.Linear)]
        small = isinstance(module, nn.Linear) and module.weight.numel() * _LARGE_SHARE < max(sizes)
        return "projection that steers a recurrence: small, and its error compounds over the sequence" if small else ""


def is_transposed(experts: Any, hidden: int) -> bool:
    """Whether a module of experts holds matrices [E, in, out]: as transformers declares it, else by its code, else by their shapes."""
    declared = getattr(experts, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    stacked = {name: p for name, p in experts.named_parameters(recurse=False) if p.dim() == 3}
    cls: Any = type(experts)
    for name in stacked:
        if (used := multiplied_from_right(cls, name)) is not None:
            return used
    for name, parameter in stacked.items():
        if (parameter.shape[1] == hidden) != (parameter.shape[2] == hidden):
            return (parameter.shape[1] == hidden) == ("down" not in name)
    return False


def _expert_numbers(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if "experts" in key and "per" not in key.split("_") and isinstance(value, int):
            yield value
