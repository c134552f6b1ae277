"""Matrices tried in all formats: as they come back from one of them, and what their outputs lose in each. By any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import GroupedFormat, GroupSize, fitting
from kappaquant.formats.kinds import CODEBOOK, KINDS, USUAL, check_kinds
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.planning.sensitivity import TensorErrors
from kappaquant.quantizing.calibration.stacks import Stack, one_thread, round_stack


@dataclass(frozen=True)
class Trial:
    """How parts of a model are quantized to see what it costs.

    Attributes:
        bits: of every tensor.
        effort: "calibrated", for what a layer reads, or "best".
        group_size: of all formats, or "auto".
        kinds: of formats whose errors are measured, letters of ``formats.kinds``.
        kind: of the format that is tried, one of them; the losses in others follow from it, as those at other widths do.

    Raises:
        PlanError: kinds that there are not, another kind to try, or bits that it does not have.
    """

    bits: int = 3
    effort: str = "calibrated"
    group_size: GroupSize = "auto"
    kinds: tuple[str, ...] = USUAL
    kind: str = CODEBOOK

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        if self.kind not in self.kinds:
            raise PlanError(f"formats {','.join(self.kinds)}: parts are tried in {self.kind!r}, which is none of these")
        if self.bits not in KINDS[self.kind].bits:
            widths = ", ".join(map(str, KINDS[self.kind].bits))
            raise PlanError(
                f"bits = {self.bits!r}: parts are tried in {KINDS[self.kind].name}, which have {widths} bits"
            )

    def format(self, inputs: int) -> GroupedFormat:
        """Of matrices with so many inputs."""
        return KINDS[self.kind].make(self.bits, fitting(self.bits, inputs, self.group_size).group_size)


@dataclass(frozen=True)
class Piece:
    """Matrices to be tried; picklable.

    Attributes:
        weight: [B, N, in].
        drawn: float32 [B, in, in], the moments they are rounded for; None rounds them without.
        own: float32 [B, in, in], the sums over the inputs that they saw themselves; None measures errors of weights.
        names: what messages call each.
    """

    weight: Tensor
    drawn: Tensor | None
    own: Tensor | None
    names: list[str]
    trial: Trial


@dataclass(frozen=True)
class Tried:
    """By row, on the device of its piece.

    Attributes:
        decoded: float32 [rows, in], as they come back from the trial's format.
        energies: float64 [rows], squares of outputs.
        errors: format id -> float64 [rows], squares of what is lost of them.
    """

    decoded: Tensor
    energies: Tensor
    errors: dict[str, Tensor]


def kinds_by_kernels(device: str) -> tuple[str, ...]:
    """Kinds of formats that are measured unless others are asked for: trellis codes only where a kernel rounds them on the device; torch
    takes tens of times as long as a kernel."""
    fmt = TrellisFormat(3, 128)
    block = torch.empty(1, fmt.group_size, 1, device=device)
    return tuple(KINDS) if dispatch.trellis_feedback(block, fmt) else USUAL


@torch.no_grad()
def tried(piece: Piece) -> Tried:
    """A piece in every format, nearest codes but for the trial's; on CPUs by one thread, for which blocks are made."""
    weight, width = piece.weight, piece.weight.shape[-1]
    chosen = piece.trial.format(width)
    with one_thread(weight.device):
        plain, errors = weight.float(), {}
        decoded = plain
        for fmt in (
            KINDS[kind].make(bits, chosen.group_size) for kind in piece.trial.kinds for bits in KINDS[kind].bits
        ):
            back = fmt.decode(dispatch.encode(weight, fmt, "best", name=piece.names[0]).parts, width)
            errors[fmt.id] = _squares(plain - back, piece.own)
            if fmt == chosen:
                decoded = back
        if piece.drawn is not None:
            parts = round_stack(Stack(weight, piece.drawn, chosen, piece.names)).parts
            decoded = chosen.decode({suffix: part.to(weight.device) for suffix, part in parts.items()}, width)
        return Tried(decoded.flatten(0, 1), _squares(plain, piece.own), errors)


def errors_of(parts: Sequence[Tried], rows: Sequence[int]) -> list[TensorErrors]:
    """Of tensors of so many rows each, which lie one after another in these parts."""
    energies = _sums([part.energies for part in parts], rows)
    errors = {fmt: _sums([part.errors[fmt] for part in parts], rows) for fmt in parts[0].errors}
    return [
        TensorErrors(digits(whole), {fmt: digits(lost[at] / whole if whole else 0.0) for fmt, lost in errors.items()})
        for at, whole in enumerate(energies)
    ]


def digits(value: float) -> float:
    """To the six that files hold."""
    return float(f"{value:.6g}")


def _sums(parts: Sequence[Tensor], rows: Sequence[int]) -> list[float]:
    return [part.sum().item() for part in torch.cat(list(parts)).split(list(rows))]


def _squares(x: Tensor, gram: Tensor | None) -> Tensor:
    """Of outputs of [B, N, in] by row, float64 [B N]: x H x^T."""
    return (x * x if gram is None else (x @ gram) * x).sum(-1).flatten().double()
