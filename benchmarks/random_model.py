"""Models of any size with random weights, in bfloat16 or packed, made where they run and never held twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Encoded, Format
from kappaquant.formats.codebook import FORMATS
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.models.skeleton import model_class
from kappaquant.planning.make import make_plan
from kappaquant.planning.plan import Choice, Plan
from kappaquant.planning.sizes import summary
from kappaquant.runtime.assemble import Assembler
from kappaquant.runtime.fused.layers import fuse

_SAMPLE = 256  # rows that are encoded; a large weight repeats them in random order, as fast to read as any


class RandomCheckpoint:
    """What ``loading.Assembler`` reads of a checkpoint, made up when it is asked for."""

    format = "kappaquant"
    path = "random weights"

    def __init__(self, shapes: dict[str, tuple[int, ...]], plan: Plan, device: str) -> None:
        self.shapes = shapes
        self.plan = plan
        self.device = device
        self._encoded: tuple[str, Encoded] | None = None

    def keys(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def format_of(self, name: str) -> Format | None:
        return self.plan.format_of(name)

    def parts(self, name: str) -> dict[str, Tensor]:
        if self._encoded is None or self._encoded[0] != name:
            fmt = self.format_of(name)
            assert fmt is not None
            wide = self.shapes[name][-1]
            weight = torch.randn(_SAMPLE, wide, device=self.device) * wide**-0.5
            self._encoded = name, dispatch.encode(weight, fmt, "fast")
        rows = torch.randint(_SAMPLE, self.shapes[name][:-1], device=self.device)
        return {suffix: part[rows] for suffix, part in self._encoded[1].parts.items()}

    def tensor(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device) * shape[-1] ** -0.5


def in_trellis(choice: Choice) -> Choice:
    """The trellis code of as many bits and the same groups in a codebook's place."""
    fmt = FORMATS.get(choice.format)
    return (
        replace(choice, format=TrellisFormat(fmt.bits, fmt.group_size).id)
        if fmt and fmt.bits in TRELLIS_BITS
        else choice
    )


def plain(config: Any, device: str) -> Any:
    """A model of this configuration in bfloat16."""
    model = empty(config).to_empty(device=device)
    with torch.no_grad():
        model.init_weights()
    return model


def packed(config: Any, device: str, trellis: bool = False, **policy: Any) -> Any:
    """The same with packed weights, as ``make_plan`` with this policy chooses; with trellis codes where there are such of as many bits."""
    model = empty(config)
    infos = tensors_of(model)
    shapes = {name: info.shape for name, info in infos.items()}
    plan = make_plan(infos, config.to_dict(), **policy)
    if trellis:
        plan = replace(plan, choices={name: in_trellis(choice) for name, choice in plan.choices.items()})
    assembler = Assembler(model, RandomCheckpoint(shapes, plan, device))  # type: ignore[arg-type]
    assembler.replace()
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()
        assembler.fill()
    fuse(model)  # as kappaquant.load does
    return model


def tensors_of(model: Any) -> dict[str, TensorInfo]:
    """What a checkpoint of a model in bfloat16 holds."""
    return {name: TensorInfo(name, "BF16", tuple(held.shape)) for name, held in model.named_parameters()}


def token_bytes(config: Any, **policy: Any) -> int:
    """Bytes of weights that decoding one token reads of such a packed model, see ``planning.sizes``."""
    infos, known = tensors_of(empty(config)), config.to_dict()
    return summary(make_plan(infos, known, **policy), infos, known).active_bytes_per_token


def empty(config: Any) -> Any:
    """The model without memory."""
    with torch.device("meta"):
        return model_class(config)._from_config(config, dtype=torch.bfloat16).eval()
