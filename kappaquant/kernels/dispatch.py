"""The only dispatch: which kernel serves a weight, and torch custom ops on whatever the kernel has ordered.

nn modules, fused layers and serving engines all multiply through the ops here. An op takes plain tensors, numbers and a string that
names kernels and formats, so that compilers trace it by shapes alone, reuse a compiled layer for all that look the same, and a CUDA
graph can hold it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.errors import NonFiniteError, RegistrationError, UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import Effort, Encoded, Format
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels.base import Arranged, Kernel, Use
from kappaquant.kernels.cpu import encoder as native_encoder
from kappaquant.kernels.cpu import feedback as native_feedback
from kappaquant.kernels.cpu.library import absence
from kappaquant.kernels.cpu.native import Native
from kappaquant.kernels.cuda import encoder as cuda_encoder
from kappaquant.kernels.cuda import feedback as cuda_feedback
from kappaquant.kernels.cuda import trellis_encoder as cuda_trellis_encoder
from kappaquant.kernels.cuda import trellis_feedback as cuda_trellis_feedback
from kappaquant.kernels.cuda.tiled import Tiled
from kappaquant.kernels.torch import AnyFormat, Lookups

logger = logging.getLogger("kappaquant")

# Fastest first: of those that serve a use, the first that does not refuse runs.
_KERNELS: list[Kernel] = [Tiled(), Native(), Lookups(), AnyFormat()]
_ENCODERS = (cuda_encoder, native_encoder)
_TRELLIS_ENCODERS = (cuda_trellis_encoder, native_encoder)
_FEEDBACKS = (cuda_feedback, native_feedback)
_TRELLIS_FEEDBACKS = (cuda_trellis_feedback, native_feedback)
_SERVED: dict[str, tuple[Kernel, Format]] = {}
"""What a spec stands for: "<kernel>/<format key>", the same in every process that has chosen it."""
_LIBRARY = torch.library.Library("kappaquant", "FRAGMENT")
_LOST = 0.5
"""Of a weight's energy: no format loses so much of what it can hold (2 bits lose an eighth)."""
KEPT = "kept"
"""In place of a spec: a plain matrix."""
SEPARATOR = ";"
"""Between specs. A line break would not do: torch.compile writes an op's arguments into comments above the GPU kernels beside it."""


def register(kernel: Kernel) -> None:
    """Let weights that are arranged from now on try this kernel before all others, in this process.

    Raises:
        RegistrationError: the name is another kernel's already.
    """
    for held in (other for other in _KERNELS if other.name == kernel.name):
        raise RegistrationError(f"kernel {kernel.name!r} is taken by {type(held).__name__}; give yours another name")
    _KERNELS.insert(0, kernel)


def unregister(name: str) -> None:
    """Take a registered kernel back; weights that it has arranged keep it."""
    _KERNELS[:] = [kernel for kernel in _KERNELS if kernel.name != name]


def kernels() -> tuple[Kernel, ...]:
    """All there are, in the order in which they are tried."""
    return tuple(_KERNELS)


def choose(fmt: Format, parts: Mapping[str, Tensor], uses: Sequence[Use], kernel: str = "") -> tuple[Kernel, Use]:
    """The first kernel that serves a weight, and for what: the first of ``uses`` that any serves.

    Args:
        parts: of the weight, on the device where it is used.
        kernel: the name of the only one to be asked.

    Raises:
        UnsupportedError: none does (the message lists each kernel's reason), or there is none of that name.
    """
    candidates = [held for held in _KERNELS if kernel in ("", held.name)]
    if not candidates:
        raise UnsupportedError(f"no kernel is called {kernel!r}; there are {', '.join(k.name for k in _KERNELS)}")
    reasons: list[str] = []
    for use in uses:
        for candidate in candidates:
            reason = candidate.refusal(fmt, parts) if use in candidate.uses else f"does not serve {use}"
            if reason is None:
                _say_what_is_slow(candidate, reasons, parts)
                return candidate, use
            reasons.append(f"{candidate.name}: {reason}")
    raise UnsupportedError(f"no kernel for {fmt.id} ({', '.join(uses)}): {'; '.join(dict.fromkeys(reasons))}")


def _say_what_is_slow(chosen: Kernel, reasons: Sequence[str], parts: Mapping[str, Tensor]) -> None:
    device = next(iter(parts.values())).device.type
    refused = [reason for reason in reasons if "does not serve" not in reason]
    if device == "cuda" and refused and isinstance(chosen, AnyFormat):
        _say_once(f"{refused[0]}; this weight runs in torch, which is slower")
    elif device == "cpu" and absence() and absence() in refused:
        _say_once(f"{absence()}; weights run in torch, which is many times slower")


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def spec_of(kernel: Kernel, fmt: Format) -> str:
    """How ops name what has arranged a weight."""
    spec = f"{kernel.name}/{fmt.key}"
    _SERVED[spec] = kernel, fmt
    return spec


def served(spec: str) -> tuple[Kernel, Format]:
    """The kernel and format that a spec stands for."""
    return _SERVED[spec]


def _op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a custom op without what ``torch.library.custom_op`` adds for gradients, which costs as much as
    a launch; ``fake`` is its form without data."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.lstrip("_")
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kappaquant::{name}", fake, lib=_LIBRARY)
        op: Callable[..., Any] = getattr(torch.ops.kappaquant, name).default
        return op

    return register


@torch.no_grad()
def prepare(x: Tensor, spec: str, rows: int, activations: str) -> list[Tensor]:
    """What the kernel of a weight [rows, in] makes of an input x [..., in]; nothing if it takes it as it is."""
    kernel, fmt = _SERVED[spec]
    flat = x.reshape(-1, x.shape[-1])
    kind = kernel.input_kind(fmt, flat.shape[0], rows, activations, x.device)
    return [] if kind is None else kernel.prepare(flat, fmt, kind)


def _linear_fake(
    x: Tensor,
    prepared: Sequence[Tensor],
    tensors: Sequence[Tensor],
    specs: str,
    rows: Sequence[int],
    bias: Tensor | None,
    activations: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(rows))


@_op(_linear_fake)
def linear(
    x: Tensor,
    prepared: Sequence[Tensor],
    tensors: Sequence[Tensor],
    specs: str,
    rows: Sequence[int],
    bias: Tensor | None,
    activations: str,
) -> Tensor:
    """x [..., in] times weights [rows[i], in], one below the other: [..., sum(rows)] in x's dtype.

    Args:
        prepared: by ``prepare``, for the only weight; else empty, and the op prepares each kind of input once for all weights.
        tensors: of all weights, in order.
        specs: of each weight, see ``SEPARATOR``; "kept" for a plain matrix.
    """
    flat = x.reshape(-1, x.shape[-1])
    left = iter(tensors)
    inputs = _Inputs(flat, activations, prepared)
    only = len(rows) == 1
    products = []
    for held, count in zip(_resolved(specs), rows, strict=True):
        if held is None:
            products.append(F.linear(flat, next(left), bias if only else None))
            continue
        kernel, fmt, parts = held
        weight = Arranged(fmt, (count, x.shape[-1]), tuple(next(left) for _ in range(parts)))
        kind = kernel.input_kind(fmt, flat.shape[0], count, activations, x.device)
        products.append(kernel.linear(flat, inputs.of(kernel, fmt, kind), kind, weight, bias if only else None))
    y = products[0] if only else torch.cat(products, dim=1)
    if bias is not None and not only:
        y = y + bias
    return y.view(*x.shape[:-1], sum(rows))


class _Inputs:
    """What kernels make of an input [tokens, in], each kind made once for all weights."""

    def __init__(self, x: Tensor, activations: str, prepared: Sequence[Tensor]) -> None:
        self._x, self._activations, self._prepared = x, activations, prepared
        self._made: dict[tuple[str, Any], list[Tensor]] = {}

    def of(self, kernel: Kernel, fmt: Format, kind: Any) -> Sequence[Tensor]:
        if kind is None or self._prepared:
            return self._prepared
        key = kernel.name, kind
        if key not in self._made:
            self._made[key] = kernel.prepare(self._x, fmt, kind)
        return self._made[key]


@cache
def _resolved(specs: str) -> tuple[tuple[Kernel, Format, int] | None, ...]:
    """For each spec its kernel, format, and how many tensors the kernel has; None for a plain matrix."""
    found: list[tuple[Kernel, Format, int] | None] = []
    for spec in specs.split(SEPARATOR):
        if spec == KEPT:
            found.append(None)
            continue
        kernel, fmt = _SERVED[spec]
        found.append((kernel, fmt, kernel.tensor_count(fmt)))
    return tuple(found)


def _grouped_fake(x: Tensor, index: Tensor, tensors: Sequence[Tensor], spec: str, shape: Sequence[int]) -> Tensor:
    return x.new_empty(*index.shape, shape[-2], dtype=torch.float32)


@_op(_grouped_fake)
def grouped_linear(x: Tensor, index: Tensor, tensors: Sequence[Tensor], spec: str, shape: Sequence[int]) -> Tensor:
    """Products of single experts, see ``Kernel.grouped_linear``: x [tokens, in], index int64 [tokens, k] -> float32 [tokens, k, n].

    Args:
        shape: of the weight, [E, n, in].
    """
    kernel, fmt = _SERVED[spec]
    return kernel.grouped_linear(x, index, Arranged(fmt, tuple(shape), tuple(tensors)))


def _experts_fake(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    specs: str,
    shapes: Sequence[int],
    activations: str,
) -> Tensor:
    return torch.empty_like(x)


@_op(_experts_fake)
def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    specs: str,
    shapes: Sequence[int],
    activations: str,
) -> Tensor:
    """Gated experts by one kernel, see ``Kernel.experts``: x [tokens, hidden] -> [tokens, hidden].

    Args:
        specs: of gate_up [E, 2 * inner, hidden] and down [E, hidden, inner], see ``SEPARATOR``.
        shapes: of both, one after the other.
    """
    first, second = specs.split(SEPARATOR)
    (kernel, fmt), (_, other) = _SERVED[first], _SERVED[second]
    return kernel.experts(
        x, index, weights, Arranged(fmt, tuple(shapes[:3]), tuple(gate_up)),
        Arranged(other, tuple(shapes[3:]), tuple(down)), activations,
    )  # fmt: skip


def _decode_fake(tensors: Sequence[Tensor], spec: str, in_features: int) -> Tensor:
    return tensors[0].new_empty(*tensors[0].shape[:-1], in_features, dtype=torch.float32)


@_op(_decode_fake)
def decode(tensors: Sequence[Tensor], spec: str, in_features: int) -> Tensor:
    """A weight that is ordered as on disk, or rows of it, float32 [..., in_features]; for look-ups and modules that want a tensor."""
    _, fmt = _SERVED[spec]
    parts = dict(zip(fmt.parts((1, in_features)), tensors, strict=True))
    return fmt.decode(parts, in_features).contiguous()


def fused_linear(
    x: Tensor, weights: Iterable[tuple[str, Sequence[Tensor], int]], bias: Tensor | None, activations: str
) -> Tensor:
    """x [..., in] times weights given as (spec, tensors, rows), one below the other; ("kept", [matrix], rows) is a plain one."""
    specs: list[str] = []
    tensors: list[Tensor] = []
    rows: list[int] = []
    for spec, held, count in weights:
        specs.append(spec)
        tensors += held
        rows.append(count)
    return linear(x, [], tensors, SEPARATOR.join(specs), rows, bias, activations)


def encode(weight: Tensor, fmt: Format, effort: Effort = "best", *, name: str = "weight") -> Encoded:
    """``fmt.encode``, by the first encoder of its kind that takes the weight: the bytes are the same.

    Raises:
        NonFiniteError: NaN or infinity, or values that the format cannot hold, too large or so small that most of them would vanish.
    """
    made: Encoded
    taker = None
    if isinstance(fmt, CodebookFormat):
        taker = _encoder(weight, effort)
    elif isinstance(fmt, TrellisFormat):
        taker = next((each for each in _TRELLIS_ENCODERS if each.refusal(weight, effort, fmt) is None), None)
    made = taker.encode(weight, fmt, effort, name=name) if taker else fmt.encode(weight, effort, name=name)
    if made.squared_error > _LOST * made.energy:
        raise NonFiniteError(
            f"{name}: as {fmt.id} it would lose {made.relative_mse:.0%} of its energy; its largest weight is "
            f"{weight.abs().max().item():.3g}, and what is below the smallest number that the format stores becomes zero. Repair the "
            "source, or keep this tensor at 16 bits"
        )
    return made


def squared_errors(
    weight: Tensor, group_size: int, bits: Iterable[int] = BITS, name: str = "weight"
) -> dict[int, float]:
    """``codec.squared_errors``, by the first of ``_ENCODERS`` that takes the weight."""
    return (_encoder(weight, "fast") or codec).squared_errors(weight, group_size, bits, name)


def _encoder(weight: Tensor, effort: str) -> ModuleType | None:
    return next((encoder for encoder in _ENCODERS if encoder.refusal(weight, effort) is None), None)


def feedback(block: Tensor) -> ModuleType | None:
    """What rounds a group [B, size, N] as ``quantizing.rounding.groups`` does, by ``choose`` and ``descend``; None where torch has to."""
    return next((kernel for kernel in _FEEDBACKS if kernel.refusal(block) is None), None)


def trellis_feedback(block: Tensor, fmt: TrellisFormat) -> ModuleType | None:
    """What rounds a group [B, size, N] as ``quantizing.rounding.rings`` does, by ``choose``; None where torch has to."""
    return next((kernel for kernel in _TRELLIS_FEEDBACKS if kernel.refusal(block, fmt) is None), None)
