"""Weights of codebooks and trellis codes on NVIDIA GPUs, ordered as tensor cores take them; each product chooses its launch by batch size and format.

Tensors of a weight: ``codes`` int32 and ``norms`` float16 as ``tiles`` orders them, for [n, in] or experts [E, n, in]; an input is
quantized once for all weights that read it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kappaquant.formats.base import Format
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, GroupedFormat
from kappaquant.formats.codec import norms_refusal
from kappaquant.kernels.base import Arranged, Kernel, Use, check_activations
from kappaquant.kernels.cuda import decoded, gemm, inputs, sorted_experts, tensor_cores, tiles
from kappaquant.kernels.cuda import experts as few_experts
from kappaquant.kernels.cuda.arguments import KINDS

FEW_TOKENS = 16  # up to which weights are decoded anew for every 16; beyond, Hopper's wider products are faster
# of int8 inputs beyond: (tokens, rows) up to which that goes on, for few rows leave much of a card to wider products unused
_FEW_OF_ROWS = ((32, 8192), (64, 4096))
# up to which wider products take int8, where rows are many, and few; beyond, scaling the sums costs more than is gained
INT8_TOKENS = (64, 128)
INT8_ROWS = 16384  # that count as few
# from which reading a decoded weight back costs less than decoding it for every 256; elsewhere 128
DECODED_TOKENS = 2048
# of experts that are read again for one more of their tokens, from which sorting costs less: about 7 microseconds (an H200)
_SORTED_BYTES = 16e6
_SLOTS = 192  # (token, expert) pairs that one launch takes unsorted
# that are sorted at once where there are no products of many tokens: as many items as a grid holds, and what experts make of them in memory
_SORTED_SLOTS = 1 << 15


class InputKind(NamedTuple):
    """What is made of an input.

    Attributes:
        group_size: that it is rotated in.
        half: whether it becomes float16, not int8.
        few: whether it lies as ``tensor_cores`` reads it, not ``gemm``.
    """

    group_size: int
    half: bool
    few: bool


class Tiled(Kernel):
    """Tensor-core products."""

    name = tensor_cores.NAME
    uses: frozenset[Use] = frozenset({"linear", "experts", "grouped"})

    def refusal(self, fmt: Format, parts: Mapping[str, Tensor]) -> str | None:
        device = next(iter(parts.values())).device
        return tensor_cores.refusal(device, fmt) or norms_refusal(parts[NORMS_SUFFIX])

    def arrange(self, fmt: Format, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(fmt, GroupedFormat)
        tiled = tiles.tile(parts[PACKED_SUFFIX], parts[NORMS_SUFFIX].half(), fmt)
        return {"codes": tiled.codes, "tile_norms": tiled.norms}

    def tensor_count(self, fmt: Format) -> int:
        return 2

    def restore(self, weight: Arranged) -> dict[str, Tensor]:
        fmt = weight.fmt
        assert isinstance(fmt, GroupedFormat)
        packed, norms = tiles.untile(tiles.Tiled(*weight.tensors), fmt, weight.shape[-2], fmt.groups(weight.shape[-1]))
        return {PACKED_SUFFIX: packed, NORMS_SUFFIX: norms.float() if fmt.norms == "F32" else norms}

    def input_kind(
        self, fmt: Format, tokens: int, rows: int, activations: str, device: torch.device
    ) -> Hashable | None:
        check_activations(activations, device)
        if decodes_first(tokens, device):
            return None
        assert isinstance(fmt, GroupedFormat)
        half = needs_half(activations, fmt.bits, tokens, rows)
        return InputKind(fmt.group_size, half, _counts_as_few(tokens, rows, half, device))

    def prepare(self, x: Tensor, fmt: Format, kind: Hashable) -> list[Tensor]:
        assert isinstance(fmt, GroupedFormat)
        assert isinstance(kind, InputKind)
        x = (x if x.dtype in KINDS else x.float()).contiguous()
        if not kind.few:
            ordered, _ = inputs.rotate_tokens(x, fmt, kind.half)
            return [ordered.values, ordered.scales]
        made, _ = inputs.rotate(x, fmt, kind.half)
        return [made.values, made.scales, made.offsets]

    def linear(
        self, x: Tensor, prepared: Sequence[Tensor], kind: Hashable | None, weight: Arranged, bias: Tensor | None
    ) -> Tensor:
        held = weight_of(weight)
        if kind is None:
            return decoded.linear(x, held, bias)
        dtype = x.dtype if x.dtype in KINDS else torch.float32
        biases = None if bias is None else [bias.to(dtype)]
        if prepared[0].dim() == 5:
            tokens = inputs.Tokens(prepared[0], prepared[1], held.fmt.group_size, x.shape[0])
            (y,) = gemm.linear(tokens, [held], dtype, biases)
        else:
            values, scales, offsets = prepared
            (y,) = tensor_cores.linear(
                inputs.Input(values, scales, offsets, held.fmt.group_size), [held], dtype, biases
            )
        return y.to(x.dtype)

    def grouped_linear(self, x: Tensor, index: Tensor, weight: Arranged) -> Tensor:
        """With float16 inputs, whatever the width."""
        held, expert_count = weight_of(weight), weight.shape[0]
        x, index = (x if x.dtype in KINDS else x.float()).contiguous(), index.contiguous()
        if _sorting_pays(*index.shape, held) and sorted_experts.refusal(x, held) is None:
            y = _joined([sorted_experts.linear(x[at], index[at], held, torch.float32) for at in _pieces(x, index)])
        else:
            y = x.new_empty(index.numel(), weight.shape[1], dtype=torch.float32)
            step = max(1, _SLOTS // index.shape[1])
            for at in range(0, len(x), step):
                rotated, _ = inputs.rotate(x[at : at + step], held.fmt, True)
                some = index[at : at + step]
                first = at * index.shape[1]
                y[first : first + some.numel()] = few_experts.gate_up(rotated, some, held, None, torch.float32)
        # rows of other experts were not written
        none = (index < 0) | (index >= expert_count)
        return y.view(*index.shape, -1).masked_fill_(none[..., None], 0)

    def experts_refusal(self, gate_up: Arranged, down: Arranged) -> str | None:
        return None

    def experts(
        self, x: Tensor, index: Tensor, weights: Tensor, gate_up: Arranged, down: Arranged, activations: str
    ) -> Tensor:
        dtype = x.dtype if x.dtype in KINDS else torch.float32
        first, second = weight_of(gate_up), weight_of(down)
        half = any(needs_half(activations, held.fmt.bits) for held in (first, second))
        x, weights, index = x.to(dtype).contiguous(), weights.contiguous(), index.contiguous()
        weights = weights if weights.dtype in KINDS else weights.float()
        if _sorting_pays(*index.shape, first, second) and sorted_experts.refusal(x, first) is None:
            made = [
                sorted_experts.forward(x[at], index[at], weights[at], first, second, half) for at in _pieces(x, index)
            ]
            return _joined(made)
        outs, step = [], max(1, _SLOTS // index.shape[1])
        for at in range(0, len(x), step):
            rotated, _ = inputs.rotate(x[at : at + step], first.fmt, half)
            some = slice(at, at + step)
            outs.append(few_experts.forward(rotated, index[some], weights[some], first, second, dtype))
        return torch.cat(outs) if outs else torch.empty_like(x)


def needs_half(activations: str, bits: int, tokens: int = 1, rows: int = 1) -> bool:
    """Whether ``tokens`` of float16 inputs, not int8, multiply a weight of this width with so many rows."""
    return activations != "int8" or bits not in tensor_cores.INT8_BITS or tokens > INT8_TOKENS[rows <= INT8_ROWS]


def _counts_as_few(tokens: int, rows: int, half: bool, device: torch.device) -> bool:
    if tokens <= FEW_TOKENS or gemm.refusal(device) is not None:
        return True
    return not half and any(tokens <= most and rows <= of_rows for most, of_rows in _FEW_OF_ROWS)


def _sorting_pays(tokens: int, top_k: int, *experts: tensor_cores.Weight) -> bool:
    """Whether tokens, evenly routed, meet an expert often enough."""
    count = experts[0].tiled.codes.shape[0]
    again = tokens * top_k - sorted_experts.expected_experts(tokens, top_k, count)
    return again * sum(w.tiled.codes.nbytes + w.tiled.norms.nbytes for w in experts) / count >= _SORTED_BYTES


def _pieces(x: Tensor, index: Tensor) -> list[slice]:
    """Of the tokens whose slots are sorted together."""
    step = len(x) if gemm.refusal(x.device) is None else max(1, _SORTED_SLOTS // index.shape[1])
    return [slice(at, at + step) for at in range(0, len(x), step)]


def _joined(pieces: list[Tensor]) -> Tensor:
    """One below the other; one alone as it is, which ``torch.cat`` would copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def decodes_first(tokens: int, device: torch.device) -> bool:
    """Whether so many tokens are multiplied by a decoded weight, and need not be quantized."""
    return tokens >= (DECODED_TOKENS if gemm.refusal(device) is None else 128)


def weight_of(weight: Arranged) -> tensor_cores.Weight:
    """A weight that ``Tiled`` has arranged, as launches take it."""
    fmt = weight.fmt
    assert isinstance(fmt, GroupedFormat)
    return tensor_cores.Weight(tiles.Tiled(*weight.tensors), fmt, weight.shape[-2], weight.shape[-1])
