"""Experts of mixed widths, some kept in 16 bits: against decoded matrices, whatever the router names, and in CUDA graphs."""

from __future__ import annotations

import preparations
import pytest
import torch
from gpu_products import gpu
from packed_weights import held
from torch import Tensor, nn

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.runtime.experts import ExpertBlock, ExpertWeights, KeptWeight, QuantExperts
from kappaquant.runtime.packed import PackedWeight, SharedInput

EXPERTS, TOP_K, HIDDEN, INNER = 7, 3, 256, 128
NO_EXPERTS = (-1, EXPERTS, 2**31 - 1, -(2**31), 2**63 - 1)
# (format's bits, 16 for kept; group; experts; first row; rows)
GATE_UP = (
    (3, 128, (0, 2, 4), 0, 2 * INNER), (16, 0, (1,), 0, 2 * INNER), (5, 64, (3, 5, 6), 0, INNER),
    (2, 128, (6, 3), INNER, INNER), (16, 0, (5,), INNER, INNER),
)  # fmt: skip
DOWN = ((4, 32, (0, 1, 6), 0, HIDDEN), (16, 0, (2, 5), 0, HIDDEN), (8, 128, (3, 4), 0, HIDDEN))
KEPT = ((16, 0, tuple(range(EXPERTS)), 0, HIDDEN),)


def projection(
    blocks: tuple[tuple[int, int, tuple[int, ...], int, int], ...],
    rows: int,
    width: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[ExpertWeights, Tensor]:
    """The experts' matrices, and what they are decoded, float32 [EXPERTS, rows, width]."""
    generator = torch.Generator().manual_seed(rows)
    plain, made = torch.zeros(EXPERTS, rows, width), []
    for bits, group, experts, row, height in blocks:
        values = torch.randn(len(experts), height, width, generator=generator) / width**0.5
        weight: PackedWeight | KeptWeight
        if bits == 16:
            values = values.to(dtype).float()
            weight = KeptWeight(values.shape, dtype, device)
            weight.fill((), values)
        else:
            fmt = CodebookFormat(bits, group)
            weight = PackedWeight(fmt, values.shape, device, ("grouped",))
            parts = fmt.encode(values, "fast").parts
            weight.fill((), parts)
            values = fmt.decode(parts, width)
        plain[list(experts), row : row + height] = values
        block = ExpertBlock(weight, experts, row, EXPERTS)
        if not block.everyone:
            block.slots = torch.empty(EXPERTS, dtype=torch.int64, device=device)
        block.finish()
        made.append(block)
    return ExpertWeights(made, rows), plain


class Mixed:
    def __init__(
        self, dtype: torch.dtype, device: str, down: tuple[tuple[int, int, tuple[int, ...], int, int], ...] = DOWN
    ) -> None:
        first, self.gate_up = projection(GATE_UP, 2 * INNER, HIDDEN, dtype, device)
        second, self.down = projection(down, HIDDEN, INNER, dtype, device)
        self.experts = QuantExperts(first, second, nn.functional.silu, SharedInput("float32"))

    def expected(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """In float64, slot by slot."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, chosen in enumerate(index.tolist()):
            for slot, expert in enumerate(chosen):
                if 0 <= expert < EXPERTS:
                    gate, up = (self.gate_up[expert].double() @ x[token].double()).chunk(2)
                    inner = nn.functional.silu(gate) * up
                    out[token] += weights[token, slot].double() * (self.down[expert].double() @ inner)
        return out


def routed(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return x, index, torch.rand(tokens, TOP_K, generator=generator)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_each_expert_has_its_own_width(tokens: int) -> None:
    mixed = Mixed(torch.float32, "cpu")
    x, index, weights = routed(tokens, torch.float32)
    assert error(mixed.experts(x, index, weights), mixed.expected(x, index, weights)) < 1e-5


def test_ids_that_are_no_expert_count_nothing() -> None:
    mixed = Mixed(torch.float32, "cpu")
    x, index, weights = routed(6, torch.float32)
    index.view(-1)[::4] = torch.tensor(NO_EXPERTS)
    expected = mixed.expected(x, index, weights)
    spoilt = weights.masked_fill((index < 0) | (index >= EXPERTS), torch.nan)
    assert error(mixed.experts(x, index, spoilt), expected) < 1e-5


def test_experts_rotate_tokens_once_not_once_per_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    rotations = preparations.counted(monkeypatch)
    gate_up, _ = held(torch.randn(8, 64, 32), CodebookFormat(3, 32))
    down, _ = held(torch.randn(8, 32, 32), CodebookFormat(3, 32))
    module = QuantExperts(
        ExpertWeights([ExpertBlock(gate_up, range(8), 0, 8)], 64),
        ExpertWeights([ExpertBlock(down, range(8), 0, 8)], 32),
        nn.SiLU(),
        SharedInput("float32"),
    )
    module(torch.randn(5, 32), torch.arange(10).view(5, 2) % 8, torch.rand(5, 2))
    assert rotations in ([32], [32, 32])  # one kernel rotates what is between its products itself


def test_ids_that_are_no_expert_count_nothing_among_experts_of_one_width() -> None:
    gate_up, _ = held(torch.randn(8, 64, 32), CodebookFormat(3, 32))
    down, _ = held(torch.randn(8, 32, 32), CodebookFormat(3, 32))
    module = QuantExperts(
        ExpertWeights([ExpertBlock(gate_up, range(8), 0, 8)], 64),
        ExpertWeights([ExpertBlock(down, range(8), 0, 8)], 32),
        nn.SiLU(),
        SharedInput("float32"),
    )
    x, index, weights = torch.randn(5, 32), torch.arange(10).view(5, 2) % 8, torch.rand(5, 2)
    nobody = torch.arange(10).view(5, 2) % 3 == 1
    hostile = index.masked_fill(nobody, 2**31 - 1)
    hostile[0, 1], hostile[2, 0] = -1, 8
    expected = module(x, index, weights.masked_fill(nobody | (hostile != index), 0))
    torch.testing.assert_close(
        module(x, hostile, weights.masked_fill(nobody, torch.nan)), expected, rtol=1e-5, atol=1e-4
    )
    assert torch.equal(module(x, torch.full_like(index, -1), weights), torch.zeros_like(x))


@gpu
@pytest.mark.parametrize("down", [DOWN, KEPT], ids=["mixed", "kept"])
@pytest.mark.parametrize("tokens", [1, 5, 40, 200])  # beyond 64 tokens slots are sorted
def test_a_cuda_graph_holds_them(tokens: int, down: tuple[tuple[int, int, tuple[int, ...], int, int], ...]) -> None:
    mixed = Mixed(torch.bfloat16, "cuda", down)
    assert not mixed.experts.waits_for_host()
    x, index, weights = (tensor.cuda() for tensor in routed(tokens, torch.bfloat16))
    mixed.experts(x, index, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixed.experts(x, index, weights)
    for seed in range(3):
        again = torch.Generator().manual_seed(seed)
        index.copy_(torch.stack([torch.randperm(EXPERTS, generator=again)[:TOP_K] for _ in range(tokens)]))
        if seed == 2:  # as when vLLM warms up
            index.view(-1)[::2] = torch.tensor(NO_EXPERTS, device="cuda")[
                torch.arange(len(index.view(-1)[::2])) % len(NO_EXPERTS)
            ]
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, mixed.expected(x.cpu(), index.cpu(), weights.cpu())) < 0.01


@gpu
def test_experts_kept_in_other_dtypes_take_turns() -> None:
    mixed = Mixed(torch.float32, "cuda", KEPT)
    assert mixed.experts.waits_for_host()
    x, index, weights = routed(5, torch.float32)
    y = mixed.experts(x.cuda(), index.cuda(), weights.cuda())
    assert error(y, mixed.expected(x, index, weights)) < 5e-3
