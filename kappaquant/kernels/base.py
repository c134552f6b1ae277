"""What a kernel is: what it refuses, how it orders a weight, and its products. Who holds a weight does not know the order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.base import Format

Use = Literal["linear", "experts", "grouped", "rows"]
"""What a weight is for: products; whole blocks of routed experts; products of single experts; looking up rows."""
ACTIVATIONS = ("int8", "bf16", "float32")
"""What kernels multiply by, the default first: see docs/kernels.md and docs/cpu.md for what each loses."""


@dataclass(frozen=True)
class Arranged:
    """A weight as some kernel has ordered it.

    Attributes:
        fmt: what it is stored in.
        shape: of the weight, [..., out, in].
        tensors: the kernel's own, in the order that ``arrange`` gave them.
    """

    fmt: Format
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @property
    def parts(self) -> dict[str, Tensor]:
        """As the format describes them, of a weight that is ordered as on disk."""
        return dict(zip(self.fmt.parts(self.shape), self.tensors, strict=True))


class Kernel(ABC):
    """One way to multiply by weights. An instance holds no state and is shared by all weights.

    Attributes:
        name: in messages, and to force it.
        uses: what it serves.
        waits_for_host: those of its uses whose products look at values on the host, so that no CUDA graph can hold them.
    """

    name: str
    uses: frozenset[Use]
    waits_for_host: frozenset[Use] = frozenset()

    @abstractmethod
    def refusal(self, fmt: Format, parts: Mapping[str, Tensor]) -> str | None:
        """Why it cannot serve a weight with these parts, where they lie, or None."""

    def arrange(self, fmt: Format, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors it multiplies by, by names for a module's buffers; as on disk unless it has an order of its own."""
        return {suffix[1:]: part for suffix, part in parts.items()}

    def tensor_count(self, fmt: Format) -> int:
        """How many tensors ``arrange`` gives."""
        return len(fmt.parts((1, fmt.step)))

    def restore(self, weight: Arranged) -> dict[str, Tensor]:
        """Suffix -> part: the inverse of ``arrange``."""
        return weight.parts

    def input_kind(
        self, fmt: Format, tokens: int, rows: int, activations: str, device: torch.device
    ) -> Hashable | None:
        """What it makes of an input before it multiplies: inputs of one kind serve every weight that asks for that kind.

        None if it takes the input as it is.

        Args:
            tokens: rows of the input.
            rows: output rows of the weight.
            activations: one of ``ACTIVATIONS``, for kernels that care.
        """
        return None

    def prepare(self, x: Tensor, fmt: Format, kind: Hashable) -> list[Tensor]:
        """An input x [tokens, in] as one of that kind."""
        raise UnsupportedError(f"{self.name}: has no input of kind {kind!r}")

    @abstractmethod
    def linear(
        self, x: Tensor, prepared: Sequence[Tensor], kind: Hashable | None, weight: Arranged, bias: Tensor | None
    ) -> Tensor:
        """x [tokens, in], and what was prepared of it, times a weight [out, in]: [tokens, out] in x's dtype."""

    def grouped_linear(self, x: Tensor, index: Tensor, weight: Arranged) -> Tensor:
        """x [tokens, in] times the matrices of each token's experts, float32 [tokens, k, out], for a weight [E, out, in].

        Use "grouped".

        Args:
            index: int64 [tokens, k], the experts of each token. The result is 0 for what lies outside [0, E).
        """
        raise UnsupportedError(f"{self.name}: does not multiply by single experts")

    def experts_refusal(self, gate_up: Arranged, down: Arranged) -> str | None:
        """Why two weights, each of which it serves, cannot be one block of experts, or None; use "experts"."""
        return f"{self.name}: runs no whole blocks of experts"

    def experts(
        self, x: Tensor, index: Tensor, weights: Tensor, gate_up: Arranged, down: Arranged, activations: str
    ) -> Tensor:
        """down(silu(gate) * up) of each token's experts, weighted and added: x [tokens, hidden] -> [tokens, hidden].

        Args:
            index: int64 [tokens, top_k], the experts of each token. What lies outside [0, E) counts nothing: another card's
                expert, or what a router makes of values that are no numbers.
            weights: [tokens, top_k].
            gate_up: [E, 2 * inner, hidden], gate first.
            down: [E, hidden, inner].
        """
        raise UnsupportedError(f"{self.name}: runs no whole blocks of experts")


def check_activations(activations: str, device: torch.device | str | None = None) -> None:
    """Raise UnsupportedError unless kernels know such inputs, on a device if one is named."""
    if activations not in ACTIVATIONS:
        raise UnsupportedError(f"activations {activations!r}: must be one of {', '.join(ACTIVATIONS)}")
    if activations == "float32" and device is not None and torch.device(device).type == "cuda":
        raise UnsupportedError(
            "activations 'float32': kernels on NVIDIA GPUs multiply by int8 or by bf16; take one of these, or the CPU"
        )
