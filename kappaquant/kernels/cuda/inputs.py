"""The input side of products with rotated weights on NVIDIA GPUs, in one kernel: norm or gate, rotation, int8 or float16."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.formats.signs import signs
from kappaquant.kernels.cuda import nvrtc, tiles
from kappaquant.kernels.cuda.arguments import KINDS, address

_FEW = 64  # tokens up to which a warp for each group pays: then latency counts, not the number of blocks


class _Rotate(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("other", ctypes.c_void_p), ("sum", ctypes.c_void_p), ("gain", ctypes.c_void_p),
        ("normed", ctypes.c_void_p), ("signs", ctypes.c_void_p), ("out", ctypes.c_void_p), ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p), ("stride", ctypes.c_longlong), ("width", ctypes.c_int), ("k", ctypes.c_int), ("tokens_padded", ctypes.c_int),
        ("aligned", ctypes.c_int), ("epsilon", ctypes.c_float), ("positions", ctypes.c_void_p),
        ("copies", ctypes.c_int), ("blocks", ctypes.c_int),
    )  # fmt: skip


nvrtc.declare("rotate.cu", _Rotate)


@dataclass(frozen=True)
class Input:
    """A rotated input of ``tokens`` rows, int8 or float16 [tokens, k].

    Attributes:
        scales: float32 [k / group_size, padded tokens].
        offsets: the same shape, of int8: what product.cuh adds to sums of a group times its scale, for weights whose entries have signs: half
            the sum of the values (a quarter of each half of 256) less what sums begin with. Finite up to inputs of 1e33.
    """

    values: Tensor
    scales: Tensor
    offsets: Tensor
    group_size: int

    @property
    def half(self) -> bool:
        return self.values.dtype == torch.float16


@dataclass(frozen=True)
class Tokens:
    """A rotated input for products of many tokens, float16 or int8, ordered as Hopper's tensor cores take it.

    Blocks of 8 tokens; code c of quarter t of 128 inputs is as tiles.py says. Tokens that fill up a block are not defined.

    Attributes:
        values: float16 [k / 128, blocks, 16, 8, 8]: the code at [c // 16 * 8 + token, c // 2 % 8 ^ token, 2 * t + c % 2].
            int8 [k / 128, blocks, 8, 8, 16]: the code at [token, c // 4 ^ token, 4 * t + c % 4].
        scales: float32, of float16 [8 * blocks], one a token; of int8 [k / group_size, blocks, 4, 2, 2], for pairs of tokens
            their scales in a group, then half the sums of what they scale.
        count: tokens.
    """

    values: Tensor
    scales: Tensor
    group_size: int
    count: int

    @property
    def half(self) -> bool:
        return self.values.dtype == torch.float16

    @classmethod
    def empty(cls, k: int, blocks: int, group_size: int, count: int, half: bool, device: torch.device) -> Tokens:
        """Room for ``count`` tokens of k inputs."""
        within = (16, 8, 8) if half else (8, 8, 16)
        values = torch.empty(
            k // tiles.INPUTS, blocks, *within, dtype=torch.float16 if half else torch.int8, device=device
        )
        shape = (8 * blocks,) if half else (k // group_size, blocks, 4, 2, 2)
        return cls(values, torch.empty(shape, dtype=torch.float32, device=device), group_size, count)


def rotate(
    x: Tensor,
    fmt: GroupedFormat,
    half: bool,
    *,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    one_plus_gain: bool = False,
    epsilon: float = 1e-6,
    gate_of: Tensor | None = None,
    normed: Tensor | None = None,
    positions: Tensor | None = None,
    places: int | None = None,
) -> tuple[Input, Tensor | None]:
    """The input of such layers from x [tokens, width], in one kernel; also x + residual, where one is given.

    Args:
        residual: [tokens, width], added to x before the norm.
        gain: [width] of an RMS norm after that; ``one_plus_gain`` for norms that multiply by 1 + gain.
        gate_of: [tokens, width]: the input is silu(x) * gate_of instead.
        normed: [tokens, width], filled with what the norm gives, for layers that are not quantized.
        positions: int32 [tokens, copies]: where in ``places`` rows each copy of a token goes, -1 for nowhere; by default its own place. Rows that
            no copy goes to are not defined.

    Raises:
        UnsupportedError: a tensor's shape, strides, dtype or device do not go with x, or a residual without a norm.
    """
    _check_input(x, residual, gain, gate_of, normed)
    if (positions is None) != (places is None):
        raise UnsupportedError("positions and places go together")
    tokens, width = x.shape
    k, group = tiles.padded(width, fmt), fmt.group_size
    rows = tokens if places is None else places
    tokens_padded = padded_tokens(rows)
    values = torch.empty(rows, k, dtype=torch.float16 if half else torch.int8, device=x.device)
    scales = torch.empty(k // group, tokens_padded, device=x.device)
    offsets = scales if half else torch.empty_like(scales)
    other = gate_of if gate_of is not None else residual
    total = torch.empty_like(x) if residual is not None else None
    norm = 0 if gain is None else 2 if one_plus_gain else 1
    flags = (
        f"{str(half).lower()}, {norm}, {str(gate_of is not None).lower()}, false, {str(positions is not None).lower()}"
    )
    if not tokens:
        return Input(values, scales, offsets, group), total
    run = nvrtc.kernel("rotate.cu", f"rotate<{group}, {KINDS[x.dtype]}, {flags}>", x.device.index)
    run(
        (tokens, 1, 1), 32 * min(k // group, 32 if tokens <= _FEW else 8),
        _Rotate(
            x.data_ptr(), address(other), address(total), address(gain), address(normed),
            _signs(group, x.device).data_ptr(), values.data_ptr(), scales.data_ptr(), offsets.data_ptr(), x.stride(0),
            width, k, tokens_padded, _aligned(group, x, other, total, gain, normed), epsilon, address(positions),
            1 if positions is None else positions.shape[1],
        ),
        early=True,
    )  # fmt: skip
    return Input(values, scales, offsets, group), total


def rotate_tokens(
    x: Tensor,
    fmt: GroupedFormat,
    half: bool,
    *,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    one_plus_gain: bool = False,
    epsilon: float = 1e-6,
    gate_of: Tensor | None = None,
    positions: Tensor | None = None,
    blocks: int | None = None,
) -> tuple[Tokens, Tensor | None]:
    """What ``rotate`` does, for products of many tokens.

    Args:
        positions: int32 [tokens, copies]: where in 8 * ``blocks`` places each copy of a token goes, -1 for nowhere; by default its own place.
    """
    _check_input(x, residual, gain, gate_of, None)
    tokens, width = x.shape
    k, group = tiles.padded(width, fmt), fmt.group_size
    blocks = -(-tokens // 8) if blocks is None else blocks
    made = Tokens.empty(k, blocks, group, tokens, half, x.device)
    other = gate_of if gate_of is not None else residual
    total = torch.empty_like(x) if residual is not None else None
    norm = 0 if gain is None else 2 if one_plus_gain else 1
    if tokens:
        flags = f"{str(half).lower()}, {norm}, {str(gate_of is not None).lower()}, true"
        run = nvrtc.kernel("rotate.cu", f"rotate<{group}, {KINDS[x.dtype]}, {flags}>", x.device.index)
        run(
            (tokens, 1, 1), 32 * min(k // group, 32 if tokens <= _FEW else 8),
            _Rotate(
                x=x.data_ptr(), other=address(other), sum=address(total), gain=address(gain),
                signs=_signs(group, x.device).data_ptr(), out=made.values.data_ptr(), scales=made.scales.data_ptr(),
                stride=x.stride(0), width=width, k=k, epsilon=epsilon, positions=address(positions),
                copies=1 if positions is None else positions.shape[1], blocks=blocks,
                aligned=_aligned(group, x, other, total, gain),
            ),
            early=True,
        )  # fmt: skip
    return made, total


def padded_tokens(tokens: int) -> int:
    """Tokens in whole blocks of any launch."""
    return -(-tokens // 128) * 128 if tokens > 8 else 8


def _check_input(
    x: Tensor, residual: Tensor | None, gain: Tensor | None, gate_of: Tensor | None, normed: Tensor | None
) -> None:
    if x.dtype not in KINDS or x.dim() != 2 or x.stride(1) != 1:
        raise UnsupportedError(
            f"an input is [tokens, width] in float32, float16 or bfloat16 with neighbouring columns, "
            f"got {x.dtype} {list(x.shape)} with strides {x.stride()}"
        )
    for name, other in (("residual", residual), ("gate_of", gate_of)):
        if other is not None and _layout(other) != _layout(x):
            raise UnsupportedError(f"{name} must lie as x does: {_layout(x)}, got {_layout(other)}")
    if gain is not None and _layout(gain) != (x.dtype, x.device, x.shape[1:], (1,)):
        raise UnsupportedError(f"gain must be {x.dtype} [{x.shape[1]}] on {x.device}, got {_layout(gain)}")
    if normed is not None and (gain is None or _layout(normed) != (x.dtype, x.device, x.shape, (x.shape[1], 1))):
        raise UnsupportedError(
            f"normed must be {x.dtype} {list(x.shape)} on {x.device}, beside a gain, got {_layout(normed)}"
        )
    if residual is not None and (gain is None or gate_of is not None):
        raise UnsupportedError("a residual is added before a norm; give gain, and not gate_of")
    if x.device.type != "cuda":
        raise UnsupportedError(f"needs an NVIDIA GPU, got a tensor on {x.device}")


def _aligned(group: int, x: Tensor, *others: Tensor | None) -> bool:
    """Whether every lane's group // 32 neighbouring inputs can be read at once."""
    step = min(16, x.element_size() * group // 32)
    strides = [size * x.element_size() for size in (x.stride(0), x.shape[1])]
    return not any(at % step for at in (*strides, *(t.data_ptr() for t in (x, *others) if t is not None)))


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


@cache
def _signs(group_size: int, device: torch.device) -> Tensor:
    first, second = (torch.tensor(s, dtype=torch.float32) for s in signs(group_size))
    return torch.stack([first, second / math.sqrt(group_size)]).to(device)
