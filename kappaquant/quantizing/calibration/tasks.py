"""What of a decoder layer is rounded for the same inputs, and the second moments of those inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.quantizing.calibration.layers import Layers
from kappaquant.quantizing.calibration.moments import ROUTED, Routed, Sum


@dataclass(frozen=True)
class Task:
    """Tensors whose rows, one tensor after another, are those of the matrices to be rounded.

    Attributes:
        path: the module that reads what the matrices multiply.
        projection: the module's parameter.
        experts: of each matrix the expert it is; None for linear layers, whose rows are one matrix.
    """

    names: list[str]
    fmt: GroupedFormat
    path: str
    projection: str
    experts: list[int] | None

    def label(self, matrix: int) -> str:
        """What messages call a matrix."""
        if self.experts is None:
            return ", ".join(self.names)
        return self.names[matrix] if len(self.names) > 1 else f"{self.names[0]}[{self.experts[matrix]}]"


@dataclass(frozen=True)
class Seen:
    """Inputs that a matrix read: its own, and ``drawn``, the moments [in, in] it is rounded for, in which few are helped by others'."""

    own: Sum
    drawn: Tensor


def packable(layers: Layers, formats: Mapping[str, GroupedFormat], number: int) -> dict[str, str]:
    """Tensor -> path of its module, of those of a layer that have a format and whose inputs can be seen.

    Raises:
        UnsupportedError: routed experts of another orientation, or with biases.
    """
    found = {}
    for name in layers.names(number):
        path, _, parameter = layers.places[name].target.rpartition(".")
        module = layers.model.get_submodule(path)
        linear = isinstance(module, nn.Linear) and parameter == "weight"
        routed = parameter in ROUTED and callable(getattr(module, "act_fn", None))
        if name not in formats:
            continue
        if routed and (getattr(module, "is_transposed", False) or getattr(module, "has_bias", False)):
            raise UnsupportedError(
                f"{name}: experts with transposed matrices or biases are not calibrated; quantize without --calibration"
            )
        if linear or routed:
            found[name] = path
    return found


def tasks_of(
    layers: Layers, formats: Mapping[str, GroupedFormat], packed: Mapping[str, str], sums: Mapping[str, Sum]
) -> list[Task]:
    """What is to be rounded of a layer. A layer is rounded whole, for what goes together decides the last digits."""
    together: dict[Any, list[str]] = {}
    for name, path in packed.items():
        at, fmt, shape = layers.places[name], formats[name], layers.source.tensors[name].shape
        key: Any = (fmt, id(sums[path])) if path in sums else (fmt, at.target, at.row, shape)
        together.setdefault(key, []).append(name)
    tasks = []
    for names in together.values():
        path, at = packed[names[0]], layers.places[names[0]]
        experts = None
        if path not in sums:
            split = [expert for name in names if (expert := layers.places[name].expert) is not None]
            experts = split or list(range(layers.source.tensors[names[0]].shape[0]))
        tasks.append(Task(names, formats[names[0]], path, at.target.rpartition(".")[2], experts))
    return tasks


def moments_of(task: Task, sums: Mapping[str, Sum], routed: Mapping[str, Routed]) -> Callable[[int], Seen]:
    """What gives the inputs of a matrix of the task."""
    if task.experts is None:
        return lambda at: Seen(sums[task.path], sums[task.path].gram)
    experts = task.experts
    one, every = routed[task.path].sums(task.projection)

    def seen(at: int) -> Seen:
        own = one(experts[at])
        return Seen(own, own.towards(every))

    return seen
