"""The rotation: signs, an orthonormal Walsh-Hadamard transform, signs again, over blocks [group_size, M] of M groups.

The coordinate comes first: butterflies are then elementwise over long rows, and only elementwise IEEE operations occur, so that
results depend neither on the block size nor on the device. Buffers and the views that a step walks through are made once for many
blocks: on a CPU, allocating and slicing anew costs a third of the time of an encoder.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from kappaquant.formats.signs import signs


class Rotation:
    """s2 * H(s1 * x) of the columns of ``input`` into ``output``, both float32 [group_size, M]; ``input`` is overwritten."""

    def __init__(self, group_size: int, count: int, device: torch.device) -> None:
        self.input = torch.empty(group_size, count, device=device)
        self._stages = []
        source, target, h = self.input, torch.empty_like(self.input), 1
        while h < group_size:
            a, b = (t.view(group_size // (2 * h), 2, -1) for t in (source, target))
            self._stages.append((a[:, 0], a[:, 1], b[:, 0], b[:, 1]))
            source, target, h = target, source, 2 * h
        self.output = source
        self._forward, self._inverse = _columns(group_size, device)

    def forward(self) -> Tensor:
        """``output``, after rotating ``input``."""
        return self._run(*self._forward)

    def inverse(self) -> Tensor:
        """``output``, after undoing the rotation of ``input``: s1 * H(s2 * y)."""
        return self._run(*self._inverse)

    def _run(self, sign: Tensor, divisor: Tensor) -> Tensor:
        self.input.mul_(sign)
        for a, b, plus, minus in self._stages:
            torch.add(a, b, out=plus)
            torch.sub(a, b, out=minus)
        return self.output.div_(divisor)


@cache
def _columns(group_size: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For the rotation and its inverse: the first sign, and sqrt(group_size) with the last sign, as columns.

    Tensors, not numbers: CUDA divides by a host scalar as a multiplication by its reciprocal.
    """
    s1, s2 = (torch.tensor(s, dtype=torch.float32, device=device)[:, None] for s in signs(group_size))
    root = torch.tensor(math.sqrt(group_size), dtype=torch.float32, device=device)
    return (s1, s2 * root), (s2, s1 * root)
