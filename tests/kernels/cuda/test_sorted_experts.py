"""Experts whose slots are sorted: compilation and launches anywhere, blocks of experts on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_products import INT8_NAMES, fits, hopper, named, prepared, random
from nvrtc_here import needs_compiler

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.kernels.cuda import gemm, int8_gemm, nvrtc, sorted_experts, tensor_cores, tiles
from kappaquant.kernels.cuda.cells import cells
from kappaquant.kernels.cuda.gemm import Launch

# None: as chosen for so many tokens
OF_EXPERTS = (
    None, Launch(16, 1, 1, 4, 4), int8_gemm.Launch(32, 1, 1, 4, 3), int8_gemm.Launch(64, 1, 1, 4, 2),
    tensor_cores.Launch(1, 4, 4, 16, 3), tensor_cores.Launch(2, 4, 4, 16, 3), tensor_cores.Launch(2, 2, 4, 16), tensor_cores.Launch(1, 1, 4, 16),
)  # fmt: skip


def weight_of_experts(name: str, experts: int = 256, rows: int = 1024, inputs: int = 2048) -> tensor_cores.Weight:
    """One that has no data."""
    fmt = named(name)
    codes = torch.empty(
        experts, rows // tiles.ROWS, inputs // tiles.INPUTS, fmt.bits, 32, 4, dtype=torch.int32, device="meta"
    )
    return tensor_cores.Weight(tiles.Tiled(codes, codes), fmt, rows, inputs)


@needs_compiler
def test_products_of_experts_compile() -> None:
    for name, tokens, half in (("k3", 250, True), ("k6", 2048, True), ("t3", 1024, False), ("k4", 512, False)):
        use = sorted_experts.choose(tokens, 8, weight_of_experts(name), half, True)
        assert not isinstance(use, tensor_cores.Launch)
        instance = use.instance([cells(named(name)).number, 0, 0, 0], 128, items=True)
        assert nvrtc.compiled(use.file, instance, "sm_90a")[0].startswith(b"\x7fELF")


@needs_compiler
def test_the_order_of_experts_compiles() -> None:
    for instance in ("sort_experts<1>", "sort_experts<8>", "combine<2, 0, 8>", "combine<0, 2, 1>"):
        assert nvrtc.compiled("sort_experts.cu", instance, "sm_90a")[0].startswith(b"\x7fELF")
    for instance in ("sort_experts<1>", "combine<2, 0, 8>"):
        for arch in ("sm_80", "sm_120"):
            assert nvrtc.compiled("sort_experts.cu", instance, arch)[0].startswith(b"\x7fELF")


def test_every_launch_fits_the_card() -> None:
    chosen = {
        sorted_experts.choose(tokens, min(experts, 8), weight_of_experts(name, experts), half, wide)
        for tokens in (1, 8, 64, 250, 512, 2048, 1 << 17)
        for experts in (1, 8, 256)
        for name in ("k3", "t4", "k8")
        for half in ((True, False) if name != "k8" else (True,))
        for wide in (True, False)
    }
    assert {type(use) for use in chosen} == {Launch, int8_gemm.Launch, tensor_cores.Launch}
    assert all(fits(use) for use in chosen if not isinstance(use, tensor_cores.Launch))


def plain_experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Every product in float32 [tokens, hidden], rounded between them as ``forward`` does."""
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for choice in range(index.shape[1]):
        inner = torch.einsum("tnk,tk->tn", gate_up.float()[index[:, choice]], x.float()).to(x.dtype)
        gate, up = inner.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        out += weights[:, choice, None].float() * torch.einsum(
            "tnk,tk->tn", down.float()[index[:, choice]], hidden.float()
        )
    return out


@hopper
@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "top_k", "tokens", "names", "group"),
    [
        (5, 256, 128, 2, 37, ("k3", "k4"), 128),
        (16, 200, 72, 4, 130, ("k3", "k4"), 64),
        (8, 512, 256, 8, 300, ("k5", "k2"), 128),
        (64, 128, 128, 2, 9, ("k4", "k6"), 32),
        (3, 256, 256, 3, 1, ("k8", "k3"), 256),
        (5, 256, 128, 2, 37, ("t3", "t4"), 128),
        (16, 200, 72, 4, 130, ("t2", "k4"), 64),
        (64, 128, 128, 2, 9, ("t4", "t2"), 32),
        (3, 256, 256, 3, 1, ("t4", "t3"), 256),
    ],
)
@pytest.mark.parametrize("launch", OF_EXPERTS, ids=str)
def test_sorted_experts(launch: sorted_experts.Launch | None, experts: int, hidden: int, inner: int, top_k: int, tokens: int, names: tuple[str, str], group: int) -> None:  # fmt: skip
    half = isinstance(launch, Launch) or not set(names) <= set(INT8_NAMES)
    if launch and half and not isinstance(launch, Launch | tensor_cores.Launch):
        pytest.skip("int8 inputs serve 2 to 5 bits")
    gate_up, plain_gate_up = prepared(named(names[0], group), experts, 2 * inner, hidden, scale=hidden**-0.5)
    down, plain_down = prepared(named(names[1], group), experts, hidden, inner, seed=1, scale=inner**-0.5)
    x = random(tokens, hidden).cuda().bfloat16()
    weights, index = random(tokens, experts, seed=2).cuda().softmax(-1).topk(top_k)
    index[: tokens // 2] = torch.arange(top_k, device=index.device)  # crowds a few experts, leaves others empty
    for given in (weights, weights.bfloat16()):
        launches = (launch, launch) if launch else None
        y = sorted_experts.forward(x, index, given, gate_up, down, half, launches)
        assert y.dtype == x.dtype
        expected = plain_experts(x, index, given, plain_gate_up, plain_down)
        allowed = 6e-3 if half else 0.02  # of which bfloat16's rounding is 3e-3
        assert float((y.float() - expected).norm() / expected.norm()) < allowed
        assert torch.equal(y, sorted_experts.forward(x, index, given, gate_up, down, half, launches))


@hopper
@pytest.mark.parametrize("half", [True, False])
def test_experts_are_sorted_on_other_cards_too(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, plain_gate_up = prepared(named("k4"), 6, 256, 256, scale=1 / 16)
    down, plain_down = prepared(named("t3"), 6, 256, 128, seed=1, scale=128**-0.5)
    x, weights = random(700, 256).cuda().bfloat16(), torch.rand(700, 2, device="cuda")
    index = random(700, 6, seed=4).cuda().topk(2).indices
    monkeypatch.setattr(gemm, "refusal", lambda _: "not Hopper")
    y = sorted_experts.forward(x, index, weights, gate_up, down, half)
    expected = plain_experts(x, index, weights, plain_gate_up, plain_down)
    assert float((y.float() - expected).norm() / expected.norm()) < (6e-3 if half else 0.02)


@hopper
@pytest.mark.parametrize("launch", OF_EXPERTS, ids=str)
def test_sorted_slots_without_an_expert_and_tokens_that_are_no_numbers(launch: sorted_experts.Launch | None) -> None:
    gate_up, _ = prepared(named("t3"), 6, 256, 256)
    down, _ = prepared(named("k4"), 6, 256, 128, seed=1)
    launches, half = (launch, launch) if launch else None, isinstance(launch, Launch)
    x, weights = random(50, 256).cuda().bfloat16(), torch.rand(50, 2, device="cuda")
    index = random(50, 6, seed=4).cuda().topk(2).indices
    nobody = torch.arange(100, device="cuda").view(50, 2) % 5 == 1
    expected = sorted_experts.forward(x, index, weights.masked_fill(nobody, 0), gate_up, down, half, launches)
    hostile, spoilt = index.masked_fill(nobody, -1), weights.masked_fill(nobody, torch.nan)
    spoilt[4], x[1], x[3, 7] = torch.nan, torch.nan, torch.inf
    y = sorted_experts.forward(x, hostile, spoilt, gate_up, down, half, launches)
    others = [t for t in range(50) if t not in (1, 3, 4)]
    assert torch.equal(y[others], expected[others])
    assert y[4].isnan().all()


@hopper
@pytest.mark.parametrize("half", [True, False])
def test_a_graph_replays_other_tokens_and_routes(half: bool) -> None:
    gate_up, plain_gate_up = prepared(CodebookFormat(3, 128), 8, 256, 128, scale=128**-0.5)
    down, plain_down = prepared(CodebookFormat(4, 128), 8, 128, 128, seed=1, scale=128**-0.5)
    x, weights = random(50, 128).cuda().bfloat16(), torch.full((50, 2), 0.5, device="cuda")
    index = torch.zeros(50, 2, dtype=torch.int64, device="cuda")
    sorted_experts.forward(x, index, weights, gate_up, down, half)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sorted_experts.forward(x, index, weights, gate_up, down, half)
    x.copy_(random(50, 128, seed=3))
    index.copy_(random(50, 8, seed=4).topk(2).indices)
    graph.replay()
    expected = plain_experts(x, index, weights, plain_gate_up, plain_down)
    assert float((y.float() - expected).norm() / expected.norm()) < (6e-3 if half else 0.02)
