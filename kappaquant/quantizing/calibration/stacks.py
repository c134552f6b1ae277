"""What is rounded together: linear layers that read the same, as one matrix, and experts, as many matrices of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kappaquant.formats.codebook import GroupedFormat
from kappaquant.quantizing.rounding import feedback
from kappaquant.quantizing.rounding.feedback import Rounded

# what the matrices of a stack may take, roughly; it decides which go together, so it must not depend on the machine
_BYTES = {"cpu": 1 << 28, "cuda": 4 << 30}


@dataclass(frozen=True)
class Stack:
    """Matrices and the inputs they are rounded for; picklable.

    Attributes:
        weight: [B, N, in].
        gram: float32 [B, in, in], sums of x x^T.
        names: what messages call each.
    """

    weight: Tensor
    gram: Tensor
    fmt: GroupedFormat
    names: list[str]


def matrices_at_once(rows: int, inputs: int, device: torch.device) -> int:
    """How many matrices [rows, inputs] make a stack: float64 factors, their moments, and a dozen copies of the weights."""
    return max(1, _BYTES[device.type] // (48 * inputs * inputs + 48 * rows * inputs))


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread of torch's, so that the number of processes changes no digit."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def round_stack(stack: Stack) -> Rounded:
    """The stack in its format, on the CPU; by ``one_thread``."""
    with one_thread(stack.weight.device):
        inputs = feedback.prepare(feedback.rotated(stack.gram, stack.fmt), stack.fmt.group_size, stack.names)
        made = feedback.encode(stack.weight, stack.fmt, inputs, stack.names[0])
    parts = {suffix: part.cpu() for suffix, part in made.parts.items()}
    return Rounded(parts, made.squared_errors.cpu(), made.energies.cpu(), made.weighted_errors.cpu())
