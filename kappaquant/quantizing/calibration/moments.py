"""Second moments of what the matrices of a decoder layer read: of linear layers, and of each routed expert from its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.errors import NonFiniteError

ROUTED = ("gate_up_proj", "down_proj")


@dataclass
class Sum:
    """Sum of x x^T, float32 [in, in], over ``count`` inputs."""

    gram: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """More inputs, [..., in]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.gram += flat.t() @ flat
        self.count += len(flat)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Sum:
        return cls(torch.zeros(width, width, device=device))

    def towards(self, all_inputs: Sum) -> Tensor:
        """The mean of x x^T, drawn towards that of all inputs as few of its own ask for: by width / (count + width)."""
        width = len(self.gram)
        share = width / (self.count + width)
        own = self.gram / max(self.count, 1)
        return (1 - share) * own + share * all_inputs.gram / max(all_inputs.count, 1)


@dataclass
class Routed:
    """Inputs of a block of routed experts: tokens, and the experts each went to.

    Attributes:
        tokens: [tokens, hidden], a piece for each forward.
        index: int64 [tokens, k], likewise.
    """

    module: Any
    tokens: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)

    @cached_property
    def _by_expert(self) -> tuple[Tensor, Tensor, list[int]]:
        """(all tokens, which of them go to an expert, one expert after another, and where each expert's begin)."""
        tokens, index = torch.cat(self.tokens), torch.cat(self.index)
        self.tokens, self.index = [tokens], [index]
        experts = len(self.module.gate_up_proj)
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=experts)
        return tokens, order // index.shape[1], [0, *counts.cumsum(0).tolist()]

    def of(self, expert: int) -> Tensor:
        """The tokens of one expert, [n, hidden]."""
        tokens, order, begins = self._by_expert
        return tokens[order[begins[expert] : begins[expert + 1]]]

    def inner(self, expert: int) -> Tensor:
        """What one expert's down projection reads, [n, intermediate], by the weights that are loaded now."""
        gate, up = nn.functional.linear(self.of(expert), self.module.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.module.act_fn(gate) * up

    def sums(self, projection: str) -> tuple[Callable[[int], Sum], Sum]:
        """(what gives the sum of one expert, the sum over all that the projection of any expert reads)."""
        read = self.of if projection == "gate_up_proj" else self.inner
        experts, _, width = self.module.get_parameter(projection).shape
        tokens, _, _ = self._by_expert

        def one(expert: int) -> Sum:
            made = Sum.empty(width, tokens.device)
            made.add(read(expert))
            return made

        every = Sum.empty(width, tokens.device)
        if projection == "gate_up_proj":
            every.add(tokens)
        else:
            for expert in range(experts):
                found = one(expert)
                every.gram += found.gram
                every.count += found.count
        return one, every


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, Sum], dict[str, Routed]]]:
    """Within the context, sums of what linear layers read and what blocks of experts are given, by the modules' names.

    Layers that are given the same tensor, such as q, k and v, share a sum.
    """
    sums: dict[str, Sum] = {}
    routed: dict[str, Routed] = {}
    last: list[tuple[Tensor, str]] = []  # the tensor that was seen last, and whose sum has it
    hooks = []

    def linear(name: str) -> Callable[[nn.Module, Sequence[Any]], None]:
        def see(module: nn.Module, inputs: Sequence[Any]) -> None:
            x = inputs[0]
            if last and last[0][0] is x:
                sums.setdefault(name, sums[last[0][1]])
                return
            last[:] = [(x, name)]
            _check(x, name)
            if name not in sums:
                sums[name] = Sum.empty(x.shape[-1], x.device)
            sums[name].add(x)

        return see

    def experts(name: str) -> Callable[[nn.Module, Sequence[Any]], None]:
        def see(module: nn.Module, inputs: Sequence[Any]) -> None:
            tokens, index = inputs[0], inputs[1]
            _check(tokens, name)
            routed[name].tokens.append(tokens.reshape(-1, tokens.shape[-1]))
            routed[name].index.append(index)

        return see

    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(linear(name)))
        else:
            routed[name] = Routed(module)
            hooks.append(module.register_forward_pre_hook(experts(name)))
    try:
        yield sums, routed
    finally:
        for hook in hooks:
            hook.remove()


def _check(x: Tensor, name: str) -> None:
    if not bool(x.isfinite().all()):
        raise NonFiniteError(
            f"{name}: the calibration text gives it inputs that are NaN or infinite; use other text, or quantize without "
            "--calibration"
        )
