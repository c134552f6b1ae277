"""How products of many tokens with int8 inputs are spread over a Hopper GPU; ``gemm.linear`` runs them.

Tensor cores multiply int8 at twice the rate of float16. A group's sums are scaled as those of few tokens are, by the input's scale
and the weight's norm, so the error is the same: 0.6 to 0.7 % of a product's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from kappaquant.kernels.cuda import tiles
from kappaquant.kernels.cuda.launches import BARRIER_BYTES, TARGET_BYTES, Spread, split_of


@dataclass(frozen=True)
class Launch(Spread):
    """A launch of int8 inputs: 32, 64 or 128 ``tokens``; a warpgroup has 128 rows, or 64 with 128 tokens."""

    file = "int8_gemm.cu"
    half = False

    @property
    def rows(self) -> int:
        """Of a thread block."""
        return (64 if self.tokens == 128 else 128) * self.warpgroups

    def instance(self, formats: Sequence[int], group_size: int, items: bool = False) -> str:
        """Of the kernel template, for outputs of these formats (``tensor_cores.numbers``)."""
        flags = f"{self.tokens}, {self.warpgroups}, {self.split}, {self.stages}, {self.resident}"
        return f"int8_gemm<{', '.join(map(str, formats))}, {group_size}, {str(items).lower()}, {flags}>"

    def shared_bytes(self, group_size: int) -> int:
        """Shared memory of a thread block."""
        staged = self.stages * self.tokens * (tiles.INPUTS + 8 * max(1, tiles.INPUTS // group_size))
        sums = 4 * self.tokens * (self.rows + 4)
        return BARRIER_BYTES + TARGET_BYTES * self.tokens + max(staged, sums)


@cache
def choose(tokens: int, row_count: int, units: int, multiprocessors: int) -> Launch:
    """The launch of int8 inputs for ``tokens`` of products with ``row_count`` rows in all, as measured on an H200.

    Two small blocks on a multiprocessor are as fast as a large one, and more of them share the input axis where rows are few.
    """
    use = Launch(next((n for n in (32, 64) if tokens <= n), 128), 1, 1, 4, 2)
    blocks = -(-row_count // use.rows) * -(-tokens // use.tokens)
    return replace(use, split=split_of(blocks, units, multiprocessors, use.resident))
