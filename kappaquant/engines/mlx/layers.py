"""MLX modules that hold packed weights: nothing here ever keeps a dequantized copy.

Arrays have public names, so that ``parameters()`` counts all memory: ``tq_packed`` uint8 [..., out, G * bytes_per_group],
``tq_norms`` [..., out, G], ``codebook`` float32. Products run in float32 and return the input's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kappaquant.engines.mlx.codes import decode, decode_rotated, rotate
from kappaquant.formats.codebook import GroupedFormat

DECODED_BYTES = 64 << 20  # of float32 weights decoded at a time


class PackedMatrix(nn.Module):
    """Codes and norms of a weight [..., out, in]."""

    def __init__(self, fmt: GroupedFormat, in_features: int, packed: mx.array, norms: mx.array) -> None:
        super().__init__()
        self.fmt = fmt
        self.in_features = in_features
        self.tq_packed = packed
        self.tq_norms = norms
        self.codebook = mx.array(list(fmt.codebook), dtype=mx.float32)
        self.freeze()

    @property
    def out_features(self) -> int:
        return int(self.tq_packed.shape[-2])

    def _extra_repr(self) -> str:
        return f"{self.fmt.id}, in={self.in_features}, out={self.out_features}"

    def _product(self, rotated: mx.array, packed: mx.array, norms: mx.array) -> mx.array:
        """rotated [..., D] by a matrix [out, ...]: float32 [..., out], few rows decoded at a time."""
        rows = max(1, DECODED_BYTES // (4 * rotated.shape[-1]))
        parts: list[mx.array] = []
        for start in range(0, packed.shape[0], rows):
            codes = packed[start : start + rows]
            if parts:  # else a scheduler may decode all tiles before the first product
                codes = mx.depends(codes, parts[-1])
            tile = decode_rotated(codes, norms[start : start + rows], self.codebook, self.fmt)
            parts.append(rotated @ tile.T)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


class PackedLinear(PackedMatrix):
    """``nn.Linear`` with a packed weight [out, in]."""

    def __call__(self, x: mx.array) -> mx.array:
        rotated = rotate(x, self.fmt.group_size)
        y = self._product(rotated, self.tq_packed, self.tq_norms).astype(x.dtype)
        return y + self.bias if "bias" in self else y


class PackedEmbedding(PackedMatrix):
    """``nn.Embedding`` with a packed weight [vocabulary, dim]; ``dtype`` is what it returns, the model's."""

    dtype: mx.Dtype = mx.float32

    def __call__(self, ids: mx.array) -> mx.array:
        packed, norms = self.tq_packed[ids], self.tq_norms[ids]
        return decode(packed, norms, self.codebook, self.fmt, self.in_features).astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied head: [..., dim] -> [..., vocabulary]."""
        return self._product(rotate(x, self.fmt.group_size), self.tq_packed, self.tq_norms).astype(x.dtype)


class PackedExperts(PackedMatrix):
    """Some experts' matrices of one format, [experts, out, in]."""

    def prepare(self, x: mx.array) -> mx.array:
        return rotate(x, self.fmt.group_size)

    def one(self, prepared: mx.array, slot: int, after: mx.array | None) -> mx.array:
        """Rows [n, D] by the expert in place ``slot``, decoded once ``after`` is there: [n, out]."""
        packed = self.tq_packed[slot]
        if after is not None:
            packed = mx.depends(packed, after)
        return self._product(prepared, packed, self.tq_norms[slot])

    def few(self, prepared: mx.array, slots: mx.array) -> mx.array | None:
        """Row i of [n, D] by expert slots[i], [n, out], in one product; None if that decodes too much at once."""
        if 4 * slots.size * self.out_features * prepared.shape[-1] > DECODED_BYTES:
            return None
        weight = decode_rotated(self.tq_packed[slots], self.tq_norms[slots], self.codebook, self.fmt)
        return (weight @ prepared[..., None]).squeeze(-1)


class KeptExperts(nn.Module):
    """Experts' matrices [experts, out, in] that the plan keeps in 16 bits, beside packed ones."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight
        self.freeze()

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[-2])

    def prepare(self, x: mx.array) -> mx.array:
        return x

    def one(self, prepared: mx.array, slot: int, after: mx.array | None) -> mx.array:
        return prepared @ self.weight[slot].T


class PackedSwitchLinear(nn.Module):
    """mlx_lm's ``SwitchLinear``: one projection of all experts, in blocks of one format, for experts may differ in bits.

    Args:
        blocks: (its experts' numbers, its matrices).
    """

    def __init__(self, blocks: Sequence[tuple[Sequence[int], PackedExperts | KeptExperts]]) -> None:
        super().__init__()
        self.blocks = [block for _, block in blocks]
        self.experts = [list(experts) for experts, _ in blocks]

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.experts))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, in], whose leading axes broadcast to those of indices -> [*indices.shape, 1, out] in x's dtype."""
        flat = x.reshape(-1, x.shape[-1])
        one_token = indices.ndim > 1 and indices.size == indices.shape[-1]  # so its experts differ
        y = self._one_token(flat, indices.flatten()) if one_token else None
        if y is None:
            rows = mx.broadcast_to(mx.arange(flat.shape[0]).reshape(x.shape[:-2]), indices.shape)
            y = self._grouped(flat, np.array(rows).ravel(), np.array(indices).ravel())
        return y.astype(x.dtype).reshape(*indices.shape, 1, -1)

    def _one_token(self, x: mx.array, experts: mx.array) -> mx.array | None:
        """The step of decoding: nothing waits to learn which experts were chosen."""
        block = self.blocks[0]
        if len(self.blocks) > 1 or not isinstance(block, PackedExperts):
            return None
        prepared = block.prepare(x)
        return block.few(mx.broadcast_to(prepared, (experts.size, prepared.shape[-1])), experts)

    def _grouped(self, x: mx.array, rows: np.ndarray, experts: np.ndarray) -> mx.array:
        """[slots, out]: each expert that any slot wants is decoded once, for all its slots, one after the other."""
        outputs: list[mx.array] = []
        order: list[np.ndarray] = []
        for block, numbers in zip(self.blocks, self.experts, strict=True):
            prepared = block.prepare(x)
            for slot, mine in _slots_by_expert(numbers, experts):
                after = outputs[-1] if outputs else None
                outputs.append(block.one(prepared[mx.array(rows[mine])], slot, after))
                order.append(mine)
        return mx.concatenate(outputs)[mx.array(np.argsort(np.concatenate(order)))]


def _slots_by_expert(numbers: Sequence[int], experts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(place in the block, slots that want it) for each of a block's experts that is wanted."""
    for slot, number in enumerate(numbers):
        mine = np.flatnonzero(experts == number)
        if len(mine):
            yield slot, mine
