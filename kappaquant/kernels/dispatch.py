"""The only dispatch: one torch custom op per operation, an ordered list of kernels, and every reason when none fits.

Shapes: m input rows, n output rows of a weight, K = G * group_size its padded input width, E experts. ``packed`` is
uint8 [..., n, G * bytes_per_group], ``norms`` [..., n, G], ``codebook`` float32 [2**bits], ``x`` the input after
``rotate``, float32 [..., K].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import BITS, Format
from kappaquant.kernels import torch as torch_reference
from kappaquant.kernels.cuda import encoder

# Fastest first: the first that does not refuse runs.
KERNELS: tuple[ModuleType, ...] = (torch_reference,)


def select(
    fmt: Format, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, kernel: str = ""
) -> ModuleType:
    """The first kernel that takes this product, or the one called ``kernel``.

    Raises:
        UnsupportedError: none does (the message lists each kernel's reason), or there is none of that name.
    """
    request = f"{fmt.id}, m={m}, n={n}, k={k}, {dtype} on {device}"
    candidates = [k for k in KERNELS if kernel in ("", k.NAME)]
    if not candidates:
        raise UnsupportedError(f"no kernel is called {kernel!r}; there are {', '.join(k.NAME for k in KERNELS)}")
    reasons = []
    for candidate in candidates:
        reason = candidate.supports(fmt, m, n, k, dtype, device)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.NAME}: {reason}")
    raise UnsupportedError(f"no kernel for {request}: {'; '.join(reasons)}")


@torch.library.custom_op("kappaquant::rotate", mutates_args=())
def rotate(x: Tensor, group_size: int) -> Tensor:
    """The rotation of the codec on the last axis, zero-padded to whole groups: [..., in] -> float32 [..., K]."""
    return codec.rotate(x, group_size).contiguous()


@rotate.register_fake
def _(x: Tensor, group_size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], -(-x.shape[-1] // group_size) * group_size, dtype=torch.float32)


@torch.library.custom_op("kappaquant::linear", mutates_args=())
def linear(
    x: Tensor, packed: Tensor, norms: Tensor, codebook: Tensor, bits: int, group_size: int, kernel: str = ""
) -> Tensor:
    """Rotated input x [..., K] times a packed weight [n, K] -> float32 [..., n]."""
    fmt = Format(bits, group_size)
    flat = x.reshape(-1, x.shape[-1])
    chosen = select(fmt, flat.shape[0], packed.shape[0], flat.shape[1], x.dtype, x.device, kernel)
    return chosen.linear(flat, packed, norms, codebook, fmt).view(*x.shape[:-1], packed.shape[0])


@linear.register_fake
def _(
    x: Tensor, packed: Tensor, norms: Tensor, codebook: Tensor, bits: int, group_size: int, kernel: str = ""
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0], dtype=torch.float32)


@torch.library.custom_op("kappaquant::grouped_linear", mutates_args=())
def grouped_linear(
    x: Tensor,
    rows: Tensor,
    experts: Tensor,
    packed: Tensor,
    norms: Tensor,
    codebook: Tensor,
    bits: int,
    group_size: int,
    kernel: str = "",
) -> Tensor:
    """out[i] = weight[experts[i]] @ x[rows[i]]: x [m, K], rows and experts int64 [s], a weight [E, n, K] -> float32 [s, n]."""
    fmt = Format(bits, group_size)
    chosen = select(fmt, rows.shape[0], packed.shape[1], x.shape[1], x.dtype, x.device, kernel)
    return chosen.grouped_linear(x, rows, experts, packed, norms, codebook, fmt)


@grouped_linear.register_fake
def _(
    x: Tensor,
    rows: Tensor,
    experts: Tensor,
    packed: Tensor,
    norms: Tensor,
    codebook: Tensor,
    bits: int,
    group_size: int,
    kernel: str = "",
) -> Tensor:
    return x.new_empty(rows.shape[0], packed.shape[1], dtype=torch.float32)


@torch.library.custom_op("kappaquant::dequantize", mutates_args=())
def dequantize(packed: Tensor, norms: Tensor, codebook: Tensor, bits: int, group_size: int, in_features: int) -> Tensor:
    """The weight itself, float32 [..., n, in_features]; for looking up rows, and for modules that want a plain tensor."""
    return codec.decode(packed, norms, Format(bits, group_size), in_features, codebook).contiguous()


@dequantize.register_fake
def _(packed: Tensor, norms: Tensor, codebook: Tensor, bits: int, group_size: int, in_features: int) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], in_features, dtype=torch.float32)


def encode(
    weight: Tensor,
    fmt: Format,
    effort: codec.Effort = "best",
    *,
    codebook: Sequence[float] | None = None,
    norm_dtype: torch.dtype = torch.float16,
    name: str = "weight",
) -> codec.Encoded:
    """``codec.encode``, by the CUDA kernel where it takes the weight: the bytes are the same."""
    run = codec.encode if encoder.refusal(weight, effort, norm_dtype) else encoder.encode
    return run(weight, fmt, effort, codebook=codebook, norm_dtype=norm_dtype, name=name)


def squared_errors(
    weight: Tensor, group_size: int, bits: Iterable[int] = BITS, name: str = "weight"
) -> dict[int, float]:
    """``codec.squared_errors``, by the CUDA kernel where it takes the weight."""
    run = codec.squared_errors if encoder.refusal(weight) else encoder.squared_errors
    return run(weight, group_size, bits, name)
